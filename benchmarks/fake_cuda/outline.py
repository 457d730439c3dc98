"""The engine on the fake CUDA device with a model of any size, whose weights take no memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.fake_cuda.costs import Costs
from benchmarks.fake_cuda.device import FakeCuda
from benchmarks.fake_cuda.runtime import DEVICE
from cookbook import embedded
from cookbook.engine.model import attention
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.packed_decoder import PackedDecoder
from cookbook.engine.sampling.requests import sample_request
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits
from cookbook.engine.training.trainer import Trainer
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

_LIMITS = SamplingLimits(max_sequences=256, max_prefill_tokens=2**20, max_cached_tokens=2**30)


class Outline(BaseModel):
    """A model that is made from its config on the device.

    It takes the passes of a model without peculiarities: packed rows, and log-probabilities from blocks of
    logits.
    """

    def __init__(self, config: Any, options: EngineOptions) -> None:
        self._config = config
        super().__init__(embedded.MODEL_NAME, options)  # whose tokenizer it has

    def _load(self, is_trained: bool) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(self._config, dtype=self.dtype)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def _probe_architecture(self) -> None:
        # a layer that does not run here would get no adapter
        self.model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=self.device), use_cache=False)
        self.has_plain_head = self.is_packed = True
        self.model.set_attn_implementation(attention.NAME)
        self.make_decoder, self.decodes_packed = PackedDecoder, True
        self.is_captured = False  # each kernel is counted


def outline(config: Any, checkpointing: Any = "off") -> Outline:
    return Outline(
        config,
        EngineOptions(device="cuda", max_tokens_per_microbatch=2**20, gradient_checkpointing=checkpointing),
    )


def step_costs(device: FakeCuda, base: BaseModel, lengths: Sequence[int], lora: LoraConfig) -> Costs:
    """Returns the costs of a training step on sequences of these lengths, every token trained."""
    rng = np.random.default_rng(0)
    data = [
        Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
        for tokens in (rng.integers(3, base.vocab_size, length + 1) for length in lengths)
    ]
    trainer = Trainer(base, lora)
    request = trainer.check(data, "cross_entropy", None, trained_only=True, loss_only=True)
    costs = Costs(lengths)
    with device.recording(costs) as record:
        trainer.forward_backward(request)
        trainer.optim_step(AdamParams(grad_clip_norm=1.0))
    costs.num_waits = record.waits.total()
    return costs


def token_costs(
    device: FakeCuda, base: BaseModel, num_sequences: int, context: int, params: SamplingParams
) -> Costs:
    """Returns the costs of the next token of so many sequences after a context of this many tokens.

    They are the difference between sampling three tokens and sampling two.
    """
    found = []
    for max_tokens in (2, 3):
        params = replace(params, max_tokens=max_tokens)
        request = sample_request(base, [3] * context, num_sequences, params)
        prepared: Future[Any] = Future()
        prepared.set_result((None, 0))
        costs = Costs([context] * num_sequences)
        with device.recording(costs) as record:
            Sampler(base, prepared, _LIMITS).run(request, list)
        costs.num_waits = record.waits.total()
        found.append(costs)
    return found[1].plus(found[0], -1)
