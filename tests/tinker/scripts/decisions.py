"""Trains and samples decisions, with both kinds of targets: decisions.py LOG."""

import asyncio

import tinker
from tinker_cookbook import renderers
from tinker_cookbook.recipes.decisions import (
    Decision,
    DecisionRenderer,
    decision_choice_datums,
    decision_dist_datums,
    probability_loss,
    sample_decision,
)
from tinker_cookbook.tokenizer_utils import get_tokenizer

MODEL = "Qwen/Qwen3-8B"


async def main() -> None:
    renderer = DecisionRenderer(renderers.get_renderer("qwen3", get_tokenizer(MODEL)))
    decision = Decision("Which is a colour?", [("green", "a colour"), ("seven", "a number")])
    service = tinker.ServiceClient()
    training = await service.create_lora_training_client(base_model=MODEL, rank=4, seed=0)
    before = await sample_decision(
        await training.save_weights_and_get_sampling_client(), renderer.render(decision)
    )
    for _ in range(3):
        datums = decision_choice_datums(renderer, [(decision, "green")])
        first = training.forward_backward(datums, loss_fn="cross_entropy")
        datums = decision_dist_datums(renderer, [(decision, {"green": 1.0})])
        loss = probability_loss(lambda probs, target: ((probs - target) ** 2).sum())
        second = training.forward_backward_custom(datums, loss)
        step = training.optim_step(tinker.AdamParams(learning_rate=1e-2))
        await first
        print((await second).metrics)
        await step
    after = await sample_decision(
        await training.save_weights_and_get_sampling_client(), renderer.render(decision)
    )
    print(before, after)
    assert after["green"] > before["green"]


asyncio.run(main())
