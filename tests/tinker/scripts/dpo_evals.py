"""DPO with an evaluator of held-out pairs: dpo_evals.py LOG."""

import sys

import tinker
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.recipes.preference.dpo.train import get_dataset_builder


class LengthOfAnswers(SamplingClientEvaluator):
    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        prompt = tinker.ModelInput.from_ints([1, 20, 30, 40])
        params = tinker.SamplingParams(max_tokens=8, seed=1)
        response = await sampling_client.sample_async(prompt, num_samples=4, sampling_params=params)
        return {"test/length": sum(len(one.tokens) for one in response.sequences) / 4}


builder = get_dataset_builder("hhh", "Qwen/Qwen3-8B", "qwen3", max_length=512, batch_size=4)
train_dpo.main(
    train_dpo.Config(
        log_path=sys.argv[1],
        model_name="Qwen/Qwen3-8B",
        recipe_name="dpo_evals",
        renderer_name="qwen3",
        dataset_builder=builder,
        evaluator_builders=[LengthOfAnswers],
        eval_every=1,
        save_every=1,
        lora_rank=4,
        max_steps=2,
    )
)
