"""Programs written for the Tinker API, from documents and tutorials, run after changing their import."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import cookbook

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = Path(os.environ.get("COOKBOOK_DOCUMENTS", REPOSITORY.parent / "shared" / "seeds"))
PIRATE = REPOSITORY / "cookbook" / "embedded" / "pirate.jsonl"


def test_a_guide_that_trains_on_a_dataset_runs_as_it_is_written(
    tiny_qwen3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its fenced Python, with another import, model and dataset, and nothing else changed."""
    guides = [
        path for path in DOCUMENTS.glob("*.txt") if "train_dataset.py" in path.read_text(encoding="utf-8")
    ]
    if not guides:
        pytest.skip(f"no guide in {DOCUMENTS}; set COOKBOOK_DOCUMENTS to a folder that has it")
    program = "\n".join(
        re.findall(r"```python[^\n]*\n(.*?)```", guides[0].read_text(encoding="utf-8"), re.DOTALL)
    )
    changes = {
        "import tinker": "import cookbook as tinker",
        '"Qwen/Qwen3.5-2B"': repr(tiny_qwen3),
        'load_dataset("winglian/pirate-ultrachat-10k", split="train[:64]")': (
            f'load_dataset("json", data_files={str(PIRATE)!r}, split="train[:64]")'
        ),
    }
    for old, new in changes.items():
        assert old in program
        program = program.replace(old, new)
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(compile(program, str(guides[0]), "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d loss=([\d.]+)", out)]
    assert "prepared 64 examples" in out
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "resumable state at" in out


def test_the_flow_of_a_chat_tutorial_runs(tiny_qwen3: str, tmp_path: Path, chats: list) -> None:
    """Losses computed from `out["logprobs"]` by hand, plain lists as weights, a sample, a resume."""
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


def test_the_dataset_of_a_hub_needs_no_change_to_be_wrapped() -> None:
    """`SupervisedDatasetFromHFDataset` takes what `load_dataset` returns."""
    from cookbook.data import SupervisedDatasetFromHFDataset

    rows = datasets.load_dataset("json", data_files=str(PIRATE), split="train[:8]")
    assert isinstance(rows, datasets.Dataset)
    datum = cookbook.Datum(cookbook.ModelInput.from_ints([1]), {"target_tokens": [2], "weights": [1.0]})
    dataset = SupervisedDatasetFromHFDataset(rows, batch_size=4, map_fn=lambda row: datum)
    assert [len(dataset.get_batch(index)) for index in range(len(dataset))] == [4, 4]
