"""A base model: its weights, the adapters on it, and its forward and backward pass.

Shape suffixes: N tokens of a packed row, S scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine import processes
from cookbook.engine.model import architecture, fsdp, unembedding
from cookbook.engine.model.adapters import GLOBAL_STATE, Adapter, Adapters
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.compiling import compile_layers
from cookbook.engine.model.loading import load_model, resolve_device, resolve_dtype, return_freed_memory
from cookbook.engine.model.memory import (
    ActivationCost,
    MicrobatchLimits,
    addresses,
    checkpointed_layers,
    decoder_layers,
    limits_for,
    measure_activations,
    usable_memory,
)
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.model.peft_settings import is_same
from cookbook.engine.model.unembedding import Head, LoraOnHead, Scores, TokenLoss
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.optimizer import bytes_to_train, bytes_to_undo
from cookbook.errors import ConfigError


class BaseModel:
    """Loads one model once; every training and sampling client on it shares the weights."""

    def __init__(
        self, model_name: str, options: EngineOptions | None = None, is_trained: bool = False
    ) -> None:
        """`is_trained`: all of its own weights are to be, which takes memory too."""
        self.name = model_name
        self.options = options or EngineOptions()
        self.world = processes.current().duplicate()
        self.device = resolve_device(self.options.device)
        self.dtype = resolve_dtype(self.options.dtype, self.device)
        self.tokenizer = models.get_tokenizer(model_name)
        with GLOBAL_STATE:
            self.is_sharded = fsdp.should_shard(
                self.options, self.world, model_name, self.device, self.dtype, is_trained
            )
            """Whether each of several processes holds a part of the weights."""
            self.model: Any = self._load(is_trained)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.num_logits: int = getattr(self.model.get_output_embeddings(), "out_features", self.vocab_size)
        self.context_length: int = getattr(self.model.config, "max_position_embeddings", None) or 2**20
        self.adapters = Adapters(self.model, model_name, self.tokenizer)
        self.is_packed = False
        self.has_plain_head = False
        """Whether sequences share a row, and whether logits are made by blocks: see `architecture`."""
        self.decodes_packed: bool | None = None
        self.make_decoder: Callable[[BaseModel], Any] | None = None
        """Whether continuations share a row too, and what decodes them: see `sampling.decoders`, which finds
        both out when the first one is sampled."""
        architecture.find_what_is_safe(self)
        fsdp.reshard(self.model)
        self._prepare_layers()
        return_freed_memory()

    def _load(self, is_trained: bool) -> Any:
        if not self.is_sharded:
            return load_model(self.name, self.device, self.dtype, self.options.quantization)
        with self.room_to_load():
            model = load_model(self.name, torch.device("cpu"), self.dtype)
            model.requires_grad_(is_trained)
            fsdp.shard(model, self.world, self.device, self.name)
        return model

    @contextlib.contextmanager
    def room_to_load(self) -> Iterator[None]:
        """For a model whose parts fit: one process of a machine at a time has all of it in memory."""
        with self.world.one_after_another() if self.is_sharded else contextlib.nullcontext():
            yield

    def has_weight(self, weight: Tensor, module: str) -> bool:
        """Whether the module of this name has this weight, whatever adapters are on it."""
        found = dict(self.model.named_modules()).get(module)
        own = getattr(getattr(found, "base_layer", found), "weight", None)
        if own is None or own.shape != weight.shape:
            return False
        part = fsdp.local_part(fsdp.part_like(weight, own))
        return is_same(part, fsdp.local_part(own))

    def _prepare_layers(self) -> None:
        layers = decoder_layers(self.model)
        if not layers and (self.options.compile or self.options.gradient_checkpointing == "on"):
            raise ConfigError(
                f"{self.name} has no layers that transformers knows how to run again or compile. Leave out "
                f"compile and gradient_checkpointing=on."
            )
        if self.options.compile:
            compile_layers(layers)

    # -- one micro-batch --------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """The log-probability of the target at every scored position: [S], fp32."""
        if not self.has_plain_head:
            return self.logprobs_of_whole_model(batch)
        hidden_SD = self.hidden(batch).index_select(0, batch.scored_S)
        return unembedding.score(self.head(), hidden_SD, batch.targets_S)

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Scores:
        """`logprobs`, and whether each target is the most likely token at its position: see `Scores`."""
        if not self.has_plain_head:
            logits_SV, targets_S1 = self._logits_of_whole_model(batch), batch.targets_S[:, None]
            others_SV = logits_SV.scatter(1, targets_S1, -torch.inf)
            is_argmax_S = logits_SV.gather(1, targets_S1)[:, 0] > others_SV.amax(1)
            return Scores(_log_probabilities(logits_SV, batch.targets_S), is_argmax_S)
        hidden_SD = self.hidden(batch).index_select(0, batch.scored_S)
        return unembedding.score_and_compare(self.head(), hidden_SD, batch.targets_S)

    def backpropagate(
        self, batch: PackedBatch, token_loss: TokenLoss, checkpoint_layers: bool
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the loss of the trained positions: log-probabilities [S], and that loss.

        The batch has a trained position. `token_loss` is as `unembedding.score_and_backpropagate` has it.
        """
        num_trained = batch.layout.num_trained
        with torch.enable_grad(), checkpointed_layers(self.model, checkpoint_layers):
            if not self.has_plain_head:
                logprobs_S = self.logprobs_of_whole_model(batch)
                loss = token_loss(logprobs_S[:num_trained], slice(0, num_trained))
                loss.backward()
                return logprobs_S.detach(), loss.detach()
            hidden_ND = self.hidden(batch)
        # The projection forms its own gradient, so it stays out of autograd's graph.
        hidden_SD = hidden_ND.detach().index_select(0, batch.scored_S)
        head = self.head()
        trained_logprobs, loss, grad_SD = unembedding.score_and_backpropagate(
            head, hidden_SD[:num_trained], batch.targets_S[:num_trained], token_loss
        )
        logprobs_S = trained_logprobs
        if len(hidden_SD) > num_trained:
            others = unembedding.score(head, hidden_SD[num_trained:], batch.targets_S[num_trained:])
            logprobs_S = torch.cat([trained_logprobs, others])
        if hidden_ND.requires_grad:
            grad_ND = torch.zeros_like(hidden_ND).index_copy_(0, batch.scored_S[:num_trained], grad_SD)
            hidden_ND.backward(grad_ND)
        return logprobs_S, loss

    def hidden(self, batch: PackedBatch) -> Tensor:
        """What goes into the projection to the vocabulary: [N, D]."""
        return self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)

    def hidden_of(self, tokens_1N: Tensor, positions_1N: Tensor, layout: AttentionLayout) -> Tensor:
        packed = {"position_ids": positions_1N, "layout": layout} if self.is_packed else {}
        assert self.is_packed or len(layout.segments) == 1
        decode = self.model.decode if self.is_sharded else self.model.get_decoder()
        out = decode(input_ids=tokens_1N, use_cache=False, **packed)
        hidden_1ND: Tensor = out.last_hidden_state
        return hidden_1ND[0]

    def head(self) -> Head:
        """The projection to the vocabulary, with the adapter that is in use."""
        module: Any = self.model.get_output_embeddings()
        base = getattr(module, "base_layer", module)
        lora = None
        if base is not module and not module.disable_adapters:
            active = [name for name in module.active_adapters if name in module.lora_A]
            if active:
                a, b = module.lora_A[active[0]].weight, module.lora_B[active[0]].weight
                lora = LoraOnHead(a, b, module.scaling[active[0]])
        config = self.model.config.get_text_config()
        return Head(
            base.weight,
            base.bias,
            lora,
            scale=(getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def logprobs_of_whole_model(self, batch: PackedBatch) -> Tensor:
        """For models whose logits are more than a projection, one sequence at a time."""
        return _log_probabilities(self._logits_of_whole_model(batch), batch.targets_S)

    def _logits_of_whole_model(self, batch: PackedBatch) -> Tensor:
        assert len(batch.layout.segments) == 1
        logits_NV = self.model(input_ids=batch.tokens_1N, use_cache=False).logits[0]
        return logits_NV.index_select(0, batch.scored_S)

    def limits(self, adapter: Adapter) -> MicrobatchLimits:
        """How large micro-batches may be with one more adapter in training."""
        return limits_for(
            self.options, self.device, lambda: self._activation_cost(adapter), self._reserved_bytes(adapter)
        )

    def can_undo_steps(self, adapter: Adapter) -> bool:
        """Whether there is memory for what takes back a step that fails, while no activations are held."""
        needed = self._reserved_bytes(adapter) + bytes_to_undo(_local_parts(adapter))
        return needed <= usable_memory(self.device)

    def _reserved_bytes(self, adapter: Adapter) -> int:
        """What is held beside activations: the weights, and what training those of `adapter` takes."""
        weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        if self.is_sharded:
            weight_bytes = fsdp.bytes_held(self.model)
        return weight_bytes + bytes_to_train(_local_parts(adapter))

    def _activation_cost(self, adapter: Adapter) -> ActivationCost:
        lengths = (min(64, self.context_length), min(128, self.context_length))
        short, long = (self._activation_cost_at(adapter, num_tokens) for num_tokens in lengths)
        return short.with_growth(long, lengths)

    def _activation_cost_at(self, adapter: Adapter, num_tokens: int) -> ActivationCost:
        config = self.model.config.get_text_config()
        tokens_T = np.zeros(num_tokens, np.int64)
        batch = pack(
            [TokenSequence(tokens_T, tokens_T, np.ones(num_tokens, np.float32), {})], self.device, True
        )
        run = self.hidden if self.has_plain_head else self.logprobs_of_whole_model
        weights = [fsdp.local_part(parameter) for parameter in self.model.parameters()]
        held = addresses([*weights, *self.model.buffers()])
        with self.adapters.using(adapter), fsdp.noting_whole_weights(self.model, held):
            cost = measure_activations(
                lambda: run(batch),
                held,
                num_tokens,
                config.num_hidden_layers,
                config.hidden_size * self.dtype.itemsize,
            )
        self.give_pass_up()
        return cost

    def give_pass_up(self) -> None:
        """To be called after a pass that has no end: one that failed, or whose backward part is not run."""
        if self.is_sharded:
            fsdp.start_over(self.model)


def _local_parts(adapter: Adapter) -> list[Tensor]:
    return [fsdp.local_part(weight) for weight in adapter.weights.values()]


def _log_probabilities(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")
