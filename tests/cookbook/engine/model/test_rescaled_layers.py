"""RWKV divides the weights of later layers in evaluation mode. Here it runs as in training mode."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cookbook import SamplingClient, ServiceClient
from cookbook.export import export
from cookbook.export.config import ExportConfig
from cookbook.types import AdamParams, Datum, ModelInput, SamplingParams

NUM_LAYERS, EVERY = 8, 3
TOKENS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
DATUM = Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:]})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = families.save("rwkv", tmp_path_factory.mktemp("models") / "rwkv")
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.rescale_every = NUM_LAYERS, EVERY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceClient:
    return ServiceClient(checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))


def trained(service: ServiceClient, folder: Path, rank: int) -> Any:
    """Returns a client after two steps that change its log-probabilities."""
    client = service.create_lora_training_client(str(folder), rank=rank, seed=0)
    for _ in range(2):
        client.forward_backward([DATUM], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.02)).result()
    return client


@torch.no_grad()
def plain_logprobs(model: Any, tokens: list[int] = TOKENS) -> Tensor:
    """Returns the log-probabilities of plain transformers in training mode. It has no dropout."""
    logits_TV = model.train()(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def assert_agrees(client: Any, model: Any) -> None:
    """Asserts that training, evaluation and sampling have the log-probabilities of a plain model."""
    expected_T = plain_logprobs(model)
    found_T = client.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(found_T, expected_T, rtol=0, atol=2e-4)
    sampler: SamplingClient = client.save_weights_and_get_sampling_client()
    scored = sampler.compute_logprobs(ModelInput.from_ints(TOKENS)).result()
    torch.testing.assert_close(torch.tensor(scored[1:]), expected_T, rtol=0, atol=2e-4)
    params = SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    (sequence,) = sampler.sample(ModelInput.from_ints(TOKENS), 1, params).result().sequences
    expected_T = plain_logprobs(model, [*TOKENS, *sequence.tokens])[-6:]
    torch.testing.assert_close(torch.tensor(sequence.logprobs), expected_T, rtol=0, atol=2e-4)


def test_an_adapter_agrees_with_peft_in_training_mode_and_so_does_its_merged_export(
    service: ServiceClient, published: Path, tmp_path: Path
) -> None:
    client = trained(service, published, rank=4)
    path = client.save_weights_for_sampler("adapter").result().path
    base = AutoModelForCausalLM.from_pretrained(published)
    without = plain_logprobs(base)
    adapted = PeftModel.from_pretrained(base, path)
    assert (plain_logprobs(adapted) - without).abs().max() > 0.1
    assert_agrees(client, adapted)

    config = ExportConfig(checkpoint=path, to=str(tmp_path / "merged"), format="merged")
    asyncio.run(export.main(config))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.rescale_every == EVERY
    torch.testing.assert_close(plain_logprobs(merged), plain_logprobs(adapted), rtol=0, atol=2e-4)
    with torch.no_grad():  # the merged weights are those that evaluation mode may divide
        logits = merged.eval()(input_ids=torch.tensor([TOKENS])).logits
        torch.testing.assert_close(
            logits, merged.train()(input_ids=torch.tensor([TOKENS])).logits, rtol=0, atol=2e-4
        )


def test_all_weights_are_trained_and_saved_undivided(service: ServiceClient, published: Path) -> None:
    client = trained(service, published, rank=0)
    path = client.save_weights_for_sampler("full").result().path
    assert_agrees(client, AutoModelForCausalLM.from_pretrained(path))


def test_in_4_bits_the_weights_are_rounded_once(published: Path, tmp_path: Path) -> None:
    """The truth rounds the published weights with bitsandbytes itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    service = ServiceClient(checkpoint_dir=tmp_path, quantization="nf4")
    client = service.create_lora_training_client(str(published), rank=4, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(published)
    for module in plain.rwkv.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data.copy_(dequantize_4bit(packed, state))
    found_T = client.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(found_T, plain_logprobs(plain), rtol=0, atol=2e-3)
