"""Compares training all of a model's own weights with plain transformers and torch's AdamW."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook.clients.service import ServiceClient
from cookbook.clients.training import TrainingClient
from cookbook.engine.model.memory import MicrobatchLimits
from cookbook.errors import CheckpointError
from cookbook.types import AdamParams, Datum, ModelInput

ADAM = AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.9, eps=1e-9, weight_decay=0.1)


def make_data(seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(3, 300, length) for length in (9, 20, 14)]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


@pytest.fixture(params=["untied", "tied"])
def model_folder(request: Any, tmp_path: Path, make_model_folder: Any) -> str:
    return str(make_model_folder(tmp_path / "model", "qwen3", tie_word_embeddings=request.param == "tied"))


def make_client(folder: str, tmp_path: Path, **options: Any) -> TrainingClient:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints", **options)
    return service.create_lora_training_client(folder, rank=0)


def weights_of(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in client._trainer.adapter.weights.items()}


def train(client: TrainingClient, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        forward_backward = client.forward_backward(make_data(seed))
        client.optim_step(ADAM).result()
        losses.append(forward_backward.result().metrics["loss:sum"])
    return losses


@pytest.mark.cases(2)
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_gradients_and_steps_are_those_of_plain_transformers_and_adamw(
    model_folder: str, tmp_path: Path, max_tokens: int
) -> None:
    client = make_client(model_folder, tmp_path)
    client._trainer.limits.current = MicrobatchLimits(max_tokens, max_tokens_without_checkpointing=2**62)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), eps=1e-9, weight_decay=0.1)
    for seed in range(3):
        loss = client.forward_backward(make_data(seed)).result().metrics["loss:sum"]
        for datum in make_data(seed):
            logits = model(torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()
            term = F.cross_entropy(logits, targets, reduction="sum")
            term.backward()
            loss -= float(term.detach())
        assert abs(loss) < 1e-3
        expected = dict(model.named_parameters())
        assert weights_of(client).keys() == expected.keys()
        for name, weight in client._trainer.adapter.weights.items():
            gradient = expected[name].grad
            assert weight.grad is not None
            assert gradient is not None
            torch.testing.assert_close(
                weight.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name
            )
        client.optim_step(ADAM).result()
        optimizer.step()
        optimizer.zero_grad()
        # Adam divides by the size of the gradient, so rounding decides where the gradient is close to zero.
        for name, weight in weights_of(client).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)


def test_a_checkpoint_is_a_model_folder(model_folder: str, tmp_path: Path) -> None:
    client = make_client(model_folder, tmp_path)
    train(client, range(2))
    path = client.save_state("two").result().path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights_of(client)[name])
    assert AutoTokenizer.from_pretrained(path).get_vocab() == client.get_tokenizer().get_vocab()


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_state_resumes_bit_for_bit(model_folder: str, tmp_path: Path, dtype: str) -> None:
    client = make_client(model_folder, tmp_path, dtype=dtype)
    train(client, range(2))
    path = client.save_state("two").result().path
    losses = train(client, range(2, 4))

    resumed = make_client(model_folder, tmp_path, dtype=dtype)
    resumed.load_state_with_optimizer(path).result()
    assert train(resumed, range(2, 4)) == losses
    service = ServiceClient(dtype=dtype)
    from_path = service.create_training_client_from_state_with_optimizer(path)
    assert train(from_path, range(2, 4)) == losses
    for name, weight in weights_of(client).items():
        assert torch.equal(weight, weights_of(resumed)[name])
        assert torch.equal(weight, weights_of(from_path)[name])


@pytest.mark.slow
def test_steps_below_the_resolution_of_bfloat16_accumulate(model_folder: str, tmp_path: Path) -> None:
    """Adam moves every weight by about the learning rate, far below the resolution of bfloat16 here."""
    client = make_client(model_folder, tmp_path, dtype="bfloat16")
    before = {name: weight.clone() for name, weight in weights_of(client).items()}
    for _ in range(40):
        client.forward_backward(make_data())
        client.optim_step(AdamParams(learning_rate=1e-4)).result()
    moved = [(weight != before[name]).float().mean().item() for name, weight in weights_of(client).items()]
    assert np.mean(moved) > 0.5


@pytest.mark.slow
def test_neither_a_snapshot_nor_training_changes_the_other(model_folder: str, tmp_path: Path) -> None:
    client, alone = make_client(model_folder, tmp_path), make_client(model_folder, tmp_path)
    train(client, range(1))
    snapshot = client.save_weights_and_get_sampling_client()
    path = client.save_weights_for_sampler("one").result().path
    prompt = make_data()[0].model_input
    before = snapshot.compute_logprobs(prompt).result()
    train(client, range(1, 3))
    assert snapshot.compute_logprobs(prompt).result() == before
    assert client.save_weights_and_get_sampling_client().compute_logprobs(prompt).result() != before
    train(alone, range(3))
    for name, weight in weights_of(client).items():
        assert torch.equal(weight, weights_of(alone)[name])
    saved = ServiceClient().create_sampling_client(model_path=path).compute_logprobs(prompt).result()
    np.testing.assert_allclose(saved[1:], before[1:], atol=1e-6)


@pytest.mark.slow
def test_a_full_fine_tune_does_not_change_the_shared_base(model_folder: str, tmp_path: Path) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    prompt = make_data()[0].model_input
    base = service.create_sampling_client(base_model=model_folder)
    before = base.compute_logprobs(prompt).result()
    train(service.create_lora_training_client(model_folder, rank=0), range(2))
    assert base.compute_logprobs(prompt).result() == before


@pytest.mark.slow
def test_a_checkpoint_that_was_overwritten_is_sampled_with_its_new_weights(
    model_folder: str, tmp_path: Path
) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_lora_training_client(model_folder, rank=0)
    prompt = make_data()[0].model_input
    found = []
    for seed in range(2):
        train(client, range(seed, seed + 1))
        path = client.save_weights_for_sampler("x", overwrite=True).result().path
        found.append(service.create_sampling_client(model_path=path).compute_logprobs(prompt).result())
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_full_checkpoint_is_not_loaded_as_an_adapter(model_folder: str, tmp_path: Path) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    path = service.create_lora_training_client(model_folder, rank=0).save_state("x").result().path
    lora = service.create_lora_training_client(model_folder, rank=4)
    with pytest.raises(CheckpointError, match="does not fit rank 4"):
        lora.load_state(path).result()
    with pytest.raises(CheckpointError, match="is a full model"):
        lora.create_sampling_client(path)


def test_a_damaged_full_checkpoint_is_detected(model_folder: str, tmp_path: Path) -> None:
    client = make_client(model_folder, tmp_path)
    path = Path(client.save_state("x").result().path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what was saved"):
        client.load_state_with_optimizer(path).result()


@pytest.mark.slow
def test_a_run_with_rank_zero_resumes_to_the_same_weights(tmp_path: Path) -> None:
    from cookbook.data import NamedChatDatasetBuilder
    from cookbook.data.types import ChatDatasetBuilderCommonConfig
    from cookbook.supervised import train as training

    def run(name: str, *stops: int) -> Path:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer="cookbook/tiny-chat", batch_size=2, max_length=48
        )
        for max_steps in stops:
            config = training.Config(
                log_path=str(tmp_path / name),
                model_name="cookbook/tiny-chat",
                dataset_builder=NamedChatDatasetBuilder(common_config=common),
                lora_rank=0,
                lr_schedule="constant",
                max_steps=max_steps,
                save_every=2,
                eval_every=0,
            )
            folder = tmp_path / name / "checkpoints"
            if (folder / "final").exists():  # simulates a run that was killed after its last periodic save
                rows = (
                    (tmp_path / name / "checkpoints.jsonl")
                    .read_text(encoding="utf-8")
                    .splitlines(keepends=True)
                )
                kept = [row for row in rows if json.loads(row)["name"] != "final"]
                (tmp_path / name / "checkpoints.jsonl").write_text("".join(kept), encoding="utf-8")
            asyncio.run(training.main(config))
        return folder / "final"

    whole, resumed = run("whole", 4), run("resumed", 4, 4)
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = load_file(resumed / file), load_file(whole / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
