"""The forward and backward passes of a model over one micro-batch.

Shape suffixes: N tokens of a packed row, P scored positions of its sequences, S hidden states with targets
that are scored (`packing`), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.engine.model import fsdp, loss_scaling, unembedding
from cookbook.engine.model.adapters import Adapters
from cookbook.engine.model.architecture import LogitScaling
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.memory import checkpointed_layers
from cookbook.engine.model.offloading import InputsOnHost
from cookbook.engine.model.packed_weights import PackedLinear
from cookbook.engine.model.packing import PackedBatch, copy_to
from cookbook.engine.model.peft_layers import projection_of
from cookbook.engine.model.recurrence import RecurrentLayers
from cookbook.engine.model.tiled_mlp import tiled
from cookbook.engine.model.unembedding import BlockSizes, Head, Scores, TokenLoss


class ModelPasses:
    """A loaded model, and how its passes run, which `architecture_probe` finds out."""

    name: str
    device: torch.device
    dtype: torch.dtype
    is_sharded: bool
    """Whether the weights are sharded over several processes."""
    model: Any
    decoder: nn.Module
    """The part of the model that computes hidden states from text."""
    recurrent: RecurrentLayers
    adapters: Adapters
    block_sizes: BlockSizes
    vocab_size: int
    longrope_thresholds: set[int]
    """The lengths beyond which longrope encodes all positions of a sequence differently."""
    is_packed = False
    """Whether sequences can share a row."""
    min_shared_tokens: int | None = None
    """The shortest beginning that sequences share in a row, or None if they share none."""
    is_padded = False
    """Whether the sequences of a row run as a batch, padded to the longest, through the model's own
    attention. It is set where that attention cannot keep the sequences of one row apart."""
    has_plain_head = False
    """Whether logits can be computed in blocks."""
    logit_scaling = LogitScaling()
    """How logits follow from the projection."""
    mlp_tile = 0
    """The tokens of a tile of an MLP in a checkpointed layer; 0 if MLPs are not tiled."""

    @property
    def can_offload(self) -> bool:
        """Whether tensors of the device can be kept in another memory, which is that of the host."""
        return self.device.type == "cuda"

    @property
    def packs_all_lengths(self) -> bool:
        """Whether any sequences can share a row, each seeing its own part of it."""
        return self.is_packed and not self.is_padded and not self.longrope_thresholds

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Returns the log-probability of the target at every scored position: [P], fp32."""
        if not self.has_plain_head:
            return self.logprobs_of_whole_model(batch)
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        hidden_SD = hidden_ND.index_select(0, batch.scored_S)
        logprobs_S = unembedding.score(self.head(batch.scored_S), hidden_SD, batch.targets_S)
        return logprobs_S if batch.shared is None else batch.shared.by_position(logprobs_S)

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Scores:
        """Returns the log-probabilities, and whether each target is the argmax (see `Scores`)."""
        if not self.has_plain_head:
            logits_SV, targets_S1 = self.logits_of_whole_model(batch), batch.targets_S[:, None]
            others_SV = logits_SV.scatter(1, targets_S1, -torch.inf)
            is_argmax_S = logits_SV.gather(1, targets_S1)[:, 0] > others_SV.amax(1)
            return Scores(_log_probabilities(logits_SV, batch.targets_S), is_argmax_S)
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        hidden_SD = hidden_ND.index_select(0, batch.scored_S)
        found = unembedding.score_and_compare(self.head(), hidden_SD, batch.targets_S)
        return found if batch.shared is None else Scores(*map(batch.shared.by_position, found))

    @torch.no_grad()
    def top_tokens(self, batch: PackedBatch, count: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` most likely tokens at every scored position, and their log-probabilities.

        Both are [P, count], the most likely first. The batch must not share beginnings.
        """
        assert batch.shared is None
        if not self.has_plain_head:
            best, tokens = unembedding.top(self.logits_of_whole_model(batch).float().log_softmax(1), count)
            return tokens, best
        hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        return unembedding.score_top(self.head(), hidden_ND.index_select(0, batch.scored_S), count)

    def backpropagate(
        self,
        batch: PackedBatch,
        token_loss: TokenLoss,
        checkpoint_layers: bool,
        prepare: Callable[[Tensor], None] | None = None,
        offload_inputs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the trained positions' loss. Returns log-probabilities [P] and the loss.

        The batch must have a trained position. `unembedding.score_and_backpropagate` documents `token_loss`,
        which gets trained positions [P]. `prepare` is called before with the log-probabilities of all of
        them: for a loss that couples the tokens of a sequence, the projection is computed once more.
        `offload_inputs` keeps the inputs of checkpointed layers in host memory.
        """
        num_trained, tiling = batch.num_trained, None
        on_host = InputsOnHost(self.device) if checkpoint_layers and offload_inputs else None
        if 0 < self.mlp_tile < batch.tokens_1N.numel():
            tiling = functools.partial(tiled, tile=self.mlp_tile, dropout_keys=self.adapters.dropout_keys)
        with torch.enable_grad(), checkpointed_layers(self.model, checkpoint_layers, on_host, tiling):
            if not self.has_plain_head:
                logprobs_S = self.logprobs_of_whole_model(batch)
                if prepare is not None:
                    prepare(logprobs_S[:num_trained].detach())
                loss = token_loss(logprobs_S[:num_trained], slice(0, num_trained))
                self._backward(loss, torch.ones_like(loss))
                return logprobs_S.detach(), loss.detach()
            hidden_ND = self.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        # The gradient of the projection is computed outside of autograd.
        hidden_SD = hidden_ND.detach().index_select(0, batch.scored_S)
        head = self.head(batch.scored_S)
        if prepare is not None:
            trained = slice(num_trained)
            first_S = unembedding.score(head.at(trained), hidden_SD[trained], batch.targets_S[trained])
            shared = batch.shared
            prepare(
                first_S
                if shared is None
                else first_S.index_select(0, shared.place_P[: batch.layout.num_trained])
            )
        if batch.shared is not None:
            token_loss = batch.shared.loss_of(token_loss)
        trained_logprobs, loss, grad_SD = unembedding.score_and_backpropagate(
            head.at(slice(num_trained)), hidden_SD[:num_trained], batch.targets_S[:num_trained], token_loss
        )
        logprobs_S = trained_logprobs
        if len(hidden_SD) > num_trained:
            rest = head.at(slice(num_trained, None))
            others = unembedding.score(rest, hidden_SD[num_trained:], batch.targets_S[num_trained:])
            logprobs_S = torch.cat([trained_logprobs, others])
        if hidden_ND.requires_grad:
            trained_S = batch.scored_S[:num_trained]
            if batch.shared is None:
                grad_ND = torch.zeros_like(hidden_ND, dtype=grad_SD.dtype).index_copy_(0, trained_S, grad_SD)
            else:  # a hidden state may have several targets, whose terms are summed in fp32
                grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
                grad_ND = grad_ND.index_add_(0, trained_S, grad_SD.float()).to(grad_SD.dtype)
            self._backward(hidden_ND, grad_ND)
        return logprobs_S if batch.shared is None else batch.shared.by_position(logprobs_S), loss

    def _backward(self, output: Tensor, gradient: Tensor) -> None:
        """Runs the backward pass from `output`. In float16 gradients are scaled, unless they are sharded."""
        if self.dtype != torch.float16 or self.is_sharded:
            output.backward(gradient.to(output.dtype))
            return
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        loss_scaling.backpropagate(output, gradient.float(), trained)

    def dropping(self, keys_N: np.ndarray | None) -> contextlib.AbstractContextManager[None]:
        """Drops inputs of the active adapter in the body, by keys of the row's tokens. None drops none."""
        keys = None if keys_N is None else copy_to(self.device, keys_N)
        return self.adapters.dropout_keys.set_to(keys)

    def hidden_of(self, tokens_1N: Tensor, positions_1N: Tensor, layout: AttentionLayout) -> Tensor:
        """Returns the hidden states that are the input of the projection to the vocabulary: [N, D]."""
        is_row = self.is_packed and not self.is_padded
        assert is_row or self.is_padded or len(layout.segments) == 1
        packed = {"position_ids": positions_1N, "layout": layout} if is_row else {}
        decode = self.model.decode if self.is_sharded else self.decoder
        tokens_BT = tokens_1N.view(len(layout.segments), -1) if self.is_padded else tokens_1N
        out = decode(input_ids=tokens_BT, use_cache=False, **packed)
        hidden_BTD: Tensor = out.last_hidden_state
        # The states between the layers of Mamba are fp32. The model's class converts them here too.
        return hidden_BTD.flatten(0, 1).to(self.model.get_output_embeddings().weight.dtype)

    def head(self, scored_S: Tensor | None = None) -> Head:
        """Returns the projection to the vocabulary, including the active adapter.

        `scored_S` are the positions to be scored, which dropout needs in training.
        """
        projection = projection_of(self.model.get_output_embeddings())
        lora, keys_N = projection.lora, self.adapters.dropout_keys.keys_N
        if lora is not None and keys_N is not None and scored_S is not None:
            lora = replace(lora, keys_S=keys_N[scored_S])
        return Head(
            projection.module.weight,
            self.block_sizes,
            projection.module.bias,
            lora,
            projection.rows,
            scale=self.logit_scaling.scale,
            softcap=self.logit_scaling.softcap,
            packed=forward if isinstance(forward := projection.module.forward, PackedLinear) else None,
        )

    def logprobs_of_whole_model(self, batch: PackedBatch) -> Tensor:
        """Returns the log-probabilities from the model's own logits, for padded sequences or a single one.

        This is for models whose logits are more than a projection of the hidden states.
        """
        return _log_probabilities(self.logits_of_whole_model(batch), batch.targets_S)

    def logits_of_whole_model(self, batch: PackedBatch) -> Tensor:
        # Sequences are padded, or there is one alone.
        tokens_BT = batch.tokens_1N.view(len(batch.layout.segments), -1)
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV.flatten(0, 1).index_select(0, batch.scored_S)

    def discard_pass(self) -> None:
        """Resets the shards after a pass that failed or whose backward part does not run."""
        if self.is_sharded:
            fsdp.reset(self.model)


def _log_probabilities(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Returns the log-probabilities of one target [S], or of several [S, J], at each position."""
    if targets_S.ndim == 2:
        return logits_SV.float().log_softmax(1).gather(1, targets_S)
    return -nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")
