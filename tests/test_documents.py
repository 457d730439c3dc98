"""Programs for the Tinker API, from documents and tutorials, run after a change of their import."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import cookbook

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = Path(os.environ.get("COOKBOOK_DOCUMENTS", REPOSITORY.parent / "shared" / "seeds"))
PIRATE = REPOSITORY / "cookbook" / "embedded" / "pirate.jsonl"


PROGRAM = """
from datasets import load_dataset
import tinker

service = tinker.ServiceClient()
trainer = service.create_lora_training_client(base_model="BASE MODEL", rank=16)
tokenizer = trainer.get_tokenizer()


def to_datum(row):
    *context, answer = row["messages"]
    asked = tokenizer.apply_chat_template(context, tokenize=False, add_generation_prompt=True)
    before = tokenizer.encode(asked, add_special_tokens=False)
    said = tokenizer.encode(answer["content"], add_special_tokens=False)
    targets = tinker.TensorData(
        data=[-100] * (len(before) - 1) + said, dtype="int64", shape=[len(before) + len(said) - 1]
    )
    tokens = tinker.ModelInput.from_ints((before + said)[:-1])
    return tinker.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": targets})


data = [to_datum(row) for row in load_dataset("DATASET", split="train[:64]")]
print(f"prepared {len(data)} examples")
for step in range(8):
    result = trainer.forward_backward(data=data[8 * step : 8 * step + 8]).result(timeout=600.0)
    trainer.optim_step(tinker.AdamParams(learning_rate=4e-5)).result(timeout=600.0)
    print(f"step {step} loss={result.loss:.4f}")

state = trainer.save_state(name="first").result(timeout=600.0)
print(f"resumable state at {state.path}")
weights = trainer.save_weights_for_sampler(name="first").result(timeout=600.0)
sampler = trainer.create_sampling_client(model_path=weights.path)
question = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Where is the gold?"}], tokenize=False, add_generation_prompt=True
)
reply = sampler.sample(
    prompt=tinker.ModelInput.from_ints(tokenizer.encode(question, add_special_tokens=False)),
    num_samples=1,
    sampling_params=tinker.SamplingParams(max_tokens=48),
)
print(tokenizer.decode(reply.sequences[0].tokens))
"""


def published_program() -> str:
    """Returns the program of a published guide that trains on a dataset. Skips the test if it is missing."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.glob("*.txt"))]
    guides = [text for text in texts if "train_dataset.py" in text]
    if not guides:
        pytest.skip(f"needs a guide in {DOCUMENTS}; set COOKBOOK_DOCUMENTS to a folder that has it")
    program = "\n".join(re.findall(r"```python[^\n]*\n(.*?)```", guides[0], re.DOTALL))
    return program.replace("Qwen/Qwen3.5-2B", "BASE MODEL").replace(
        "winglian/pirate-ultrachat-10k", "DATASET"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [lambda: PROGRAM, pytest.param(published_program, marks=pytest.mark.published)],
    ids=["own", "published"],
)
def test_a_published_program_that_trains_on_a_dataset_runs(
    program: Callable[[], str],
    tiny_qwen3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Only the import, the model and the dataset are changed."""
    source = program()
    changes = {
        "import tinker": "import cookbook as tinker",
        '"BASE MODEL"': repr(tiny_qwen3),
        'load_dataset("DATASET", ': f'load_dataset("json", data_files={str(PIRATE)!r}, ',
    }
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d loss=([\d.]+)", out)]
    assert "prepared 64 examples" in out
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "resumable state at" in out


@pytest.mark.slow
def test_the_flow_of_a_chat_tutorial_runs(tiny_qwen3: str, tmp_path: Path, chats: list) -> None:
    """The flow computes losses from `out["logprobs"]`, passes lists as weights, samples and resumes."""
    types = cookbook.types
    service_client = cookbook.ServiceClient(checkpoint_dir=tmp_path)
    training_client = service_client.create_lora_training_client(
        base_model=tiny_qwen3, rank=8, train_mlp=True, train_attn=True, train_unembed=True, seed=0
    )
    tokenizer = training_client.get_tokenizer()

    def to_datum(messages: list[dict[str, str]]) -> Any:
        tokens: list[int] = []
        weights: list[float] = []
        for i, message in enumerate(messages):
            text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            new = tokenizer.encode(text, add_special_tokens=False)[len(tokens) :]
            tokens += new
            weights += [float(message["role"] == "assistant")] * len(new)
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": list(tokens[1:]), "weights": np.array(weights[1:]).tolist()},
        )

    def mean_nll(result: Any, data: list[Any]) -> float:
        total_loss = total_weight = 0.0
        for out, datum in zip(result.loss_fn_outputs, data, strict=True):
            for logprob, weight in zip(
                out["logprobs"].tolist(), datum.loss_fn_inputs["weights"].tolist(), strict=True
            ):
                total_loss += -logprob * weight
                total_weight += weight
        return total_loss / max(total_weight, 1)

    data = [to_datum(messages) for messages in chats]
    train_data, test_data = data[:16], data[16:]
    losses = []
    for step in range(6):
        batch = train_data[step % 4 :: 4]
        result = training_client.forward_backward(batch, loss_fn="cross_entropy").result()
        training_client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(mean_nll(result, batch))
        assert losses[-1] == pytest.approx(result.loss, rel=1e-5)
    assert losses[-1] < losses[0]

    evaluated = training_client.forward(test_data, loss_fn="cross_entropy").result()
    assert mean_nll(evaluated, test_data) < losses[0]

    sampling_client = training_client.save_weights_and_get_sampling_client(name="tutorial")
    prompt = tokenizer.apply_chat_template(chats[0][:1], tokenize=False, add_generation_prompt=True)
    sampled = sampling_client.sample(
        prompt=types.ModelInput.from_ints(tokenizer.encode(prompt, add_special_tokens=False)),
        num_samples=1,
        sampling_params=types.SamplingParams(
            max_tokens=16, temperature=0.7, stop_token_ids=[tokenizer.eos_token_id]
        ),
    ).result()
    assert isinstance(tokenizer.decode(sampled.sequences[0].tokens), str)

    checkpoint = training_client.save_state(name="tutorial-final").result()
    resumed = service_client.create_training_client_from_state_with_optimizer(checkpoint.path)
    again = resumed.forward(test_data, loss_fn="cross_entropy").result()
    assert again.loss == evaluated.loss


def test_a_dataset_of_the_hub_is_wrapped_without_changes() -> None:
    """`SupervisedDatasetFromHFDataset` takes what `load_dataset` returns."""
    from cookbook.data import SupervisedDatasetFromHFDataset

    rows = datasets.load_dataset("json", data_files=str(PIRATE), split="train[:8]")
    assert isinstance(rows, datasets.Dataset)
    datum = cookbook.Datum(cookbook.ModelInput.from_ints([1]), {"target_tokens": [2], "weights": [1.0]})
    dataset = SupervisedDatasetFromHFDataset(rows, batch_size=4, map_fn=lambda row: datum)
    assert [len(dataset.get_batch(index)) for index in range(len(dataset))] == [4, 4]
