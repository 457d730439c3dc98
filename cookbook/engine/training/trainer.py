"""One adapter in training: accumulated gradients, an optimizer, and their checkpoints.

A pass (`forward`, `forward_backward`) is partitioned over the processes and into micro-batches. Each
micro-batch is packed into one row, run through the model, and scored.

Shape suffixes: T tokens of one sequence, P scored positions of a micro-batch, C positions of a chunk.
Log-probabilities and weights have a further axis if positions have several targets.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cookbook import models
from cookbook.engine import checkpoint
from cookbook.engine.model import microbatches
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.dropout import PassOfData
from cookbook.engine.model.memory import FIRST_PATIENCE, MicrobatchLimits, Recovery, is_out_of_memory
from cookbook.engine.model.packing import PackedBatch, TokenSequence, check_data, copy_to, pack
from cookbook.engine.model.prefix_tree import Family, families
from cookbook.engine.training import memory_needs, sharded_state, state_checks
from cookbook.engine.training.adaptive_limits import AdaptiveLimits, DoesNotFit
from cookbook.engine.training.losses import Loss, get_loss
from cookbook.engine.training.optimizer import Optimizer
from cookbook.engine.training.partition import partition_families
from cookbook.engine.training.results import (
    MicrobatchResult,
    PassResult,
    Readback,
    all_reduce_results,
    all_reduce_summaries,
    empty_summary,
)
from cookbook.errors import CheckpointError, RequestError, TrainingError
from cookbook.types import IGNORED_TARGET, AdamParams, Datum, LoraConfig

logger = logging.getLogger(__name__)

CustomLossFn = Callable[[list[Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Request:
    """A checked forward or forward_backward request."""

    sequences: list[TokenSequence]
    loss: Loss
    loss_config: Mapping[str, float]
    trained_only: bool
    """Score only positions with a weight other than 0. The others read 0.0."""
    with_argmax: bool = False
    """Also find whether each scored target is the most likely token. Not supported with gradients."""
    loss_only: bool = False
    """Return only the weighted sum, the minimum and the maximum of the log-probabilities."""


class Trainer:
    """An adapter, its gradients and its AdamW. Not thread-safe: one thread makes all calls, in order."""

    def __init__(
        self,
        base: BaseModel,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
        first_patience: int = FIRST_PATIENCE,
    ) -> None:
        """`first_patience` is the initial number of passes after which lowered limits are raised again."""
        self.base = base
        self.adapter: Adapter = base.adapters.add(lora)
        self.user_metadata = dict(user_metadata or {})
        self.rng = np.random.default_rng(lora.seed)
        """The random numbers that seed this adapter's unseeded samples. They are saved with the state."""
        with base.adapters.removing_on_failure(self.adapter):
            self._optimizer = Optimizer(
                self.adapter.weights,
                memory_needs.can_undo_steps(base, self.adapter),
                base.options.optimizer_bits,
            )
            self.limits = AdaptiveLimits(base, self.adapter, first_patience)
        self._has_gradient = False
        self._num_passes = 0
        """The number of passes that computed gradients since the last step."""
        self._world = base.world
        if lora.dropout and base.min_shared_tokens is not None:
            logger.info("With lora_dropout, what sequences share is computed for each of them.")

    # -- one training step ------------------------------------------------------------------

    def check(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        trained_only: bool = False,
        allow_unknown_inputs: bool = False,
        with_argmax: bool = False,
        loss_only: bool = False,
    ) -> Request:
        """Returns the checked request. Raises RequestError if it cannot be run. Callable from any thread."""
        loss, config = get_loss(loss_fn, loss_fn_config)
        per_token = {name: config[name] for name in loss.per_token}
        sequences = check_data(
            data, loss.required_inputs, self.base.vocab_size, allow_unknown_inputs, per_token
        )
        longest = max(len(sequence.tokens_T) for sequence in sequences)
        if longest > self.base.context_length:
            raise RequestError(
                f"A sequence of {longest} tokens exceeds the context length of {self.base.context_length} "
                f"of {self.base.name}. Truncate it: max_length={self.base.context_length}."
            )
        return Request(sequences, loss, config, trained_only, with_argmax, loss_only)

    def forward(self, request: Request) -> PassResult:
        self._check_not_half_stepped()
        return self._run(request, backward=False)

    def forward_backward(self, request: Request) -> PassResult:
        """Adds the gradient of the summed loss to the accumulated gradients. A failed pass adds nothing."""
        self._check_not_half_stepped()
        earlier = self._optimizer.take_gradients()
        try:
            result = self._run(request, backward=True)
        except Exception as error:
            self._optimizer.discard_gradients()
            if self._world.is_broken:
                raise
            raise TrainingError(f"forward_backward failed: {type(error).__name__}: {error}") from error
        finally:
            self._optimizer.add_gradients(earlier)
        self._has_gradient = True
        self._num_passes += 1
        return result

    def forward_backward_custom(self, data: list[Datum], request: Request, fn: CustomLossFn) -> PassResult:
        """Differentiates `fn` by the log-probabilities, then the model by the gradient of `fn`.

        This takes two passes over the model, so micro-batches stay independent even if `fn` couples
        sequences.
        """
        self._check_not_half_stepped()
        first = self._run(request, backward=False, is_training=True)
        logprobs = [torch.from_numpy(array).requires_grad_() for array in first.logprobs()]
        with self._world.failing_together():
            try:
                value, metrics = fn(data, logprobs)
                gradients = torch.autograd.grad(value, logprobs, allow_unused=True)
                result = replace(first, custom_loss=float(value.detach()), custom_metrics=dict(metrics))
            except Exception as error:
                raise TrainingError(f"The custom loss failed: {type(error).__name__}: {error}") from error
        # d value = sum(gradient * d logprob), which is a cross-entropy weighted by the negative gradient.
        weighted = [
            TokenSequence(
                sequence.tokens_T,
                sequence.targets_T,
                np.zeros_like(sequence.weights_T) if gradient is None else -gradient.numpy(),
                {},
            )
            for sequence, gradient in zip(request.sequences, gradients, strict=True)
        ]
        loss, config = get_loss("cross_entropy", None)
        self.forward_backward(Request(weighted, loss, config, trained_only=True))
        return result

    def optim_step(self, params: AdamParams) -> Readback:
        """Takes one AdamW step on the gradients and clears them. Returns their norm before clipping.

        Does not wait for the device. A failed step changes neither weights nor optimizer. The gradients are
        cleared in this case too, so that the next step is not taken on two batches.
        """
        self._check_not_half_stepped()
        if not self._has_gradient:
            raise TrainingError("optim_step has nothing to step on: no forward_backward since the last one.")
        try:
            norm = self._optimizer.step(params, self._world)
        except Exception as error:
            if self._world.is_broken:
                raise
            self._check_not_half_stepped(error)
            raise TrainingError(
                f"optim_step failed: {type(error).__name__}: {error}. Weights and optimizer are unchanged; "
                "its gradients are discarded."
            ) from error
        finally:
            self.discard_gradients()
        return Readback([norm])

    def discard_gradients(self) -> None:
        self._optimizer.discard_gradients()
        self._has_gradient = False
        self._num_passes = 0

    def _check_not_half_stepped(self, error: Exception | None = None) -> None:
        if self._optimizer.is_half_stepped:
            raise TrainingError(
                "An optim_step failed half-way, and there was no memory to undo it: some weights are a step "
                "ahead of others. Load a checkpoint with load_state_with_optimizer."
            ) from error

    def _run(self, request: Request, backward: bool, is_training: bool | None = None) -> PassResult:
        """Runs this process's part of the sequences. Returns the results of all parts.

        `is_training` says whether inputs of the adapter are dropped; by default they are if `backward`. If
        memory runs out, all micro-batches of this process are run again in smaller ones.
        """
        self.base.forget_prompts()
        lengths = [len(sequence.tokens_T) for sequence in request.sequences]
        drops = self.adapter.lora.dropout > 0 and (backward if is_training is None else is_training)
        seed = self.adapter.lora.seed or 0
        masks = PassOfData(seed, self._optimizer.num_steps, self._num_passes) if drops else None
        # With dropout, each sequence has masks of its own on what it shares, and a shared position is scored
        # against one target at a time.
        has_one_target = all(sequence.num_targets == 1 for sequence in request.sequences)
        min_shared = self.base.min_shared_tokens if masks is None and has_one_target else None
        tokens = [sequence.tokens_T for sequence in request.sequences]
        found = families(tokens, min_shared, microbatches.rope_kinds(self.base, lengths))
        own = partition_families(found, self._world.size)[self._world.rank]
        results: list[MicrobatchResult] | None = None
        if self.base.is_sharded:
            results = self._run_sharded(request, own, backward, masks)
        else:
            with self._world.failing_together():
                while results is None:
                    try:
                        with self.base.adapters.using(self.adapter):
                            results = self._run_microbatches(request, own, backward, masks)
                    except DoesNotFit as failure:
                        # The next pass runs after this block, when the tensors in the traceback of the
                        # failure are freed.
                        tight = (failure.microbatch, failure.is_checkpointed, failure.is_offloaded)
                    if results is None:
                        if backward:
                            self._optimizer.discard_gradients()
                        self.limits.lower(*tight)
        self.limits.end_pass(backward)
        if not self._world.is_alone and request.loss_only:
            results = all_reduce_summaries(self._world, results, self.base.device)
        elif not self._world.is_alone:
            results = all_reduce_results(
                self._world, results, request.sequences, self.base.device, request.with_argmax
            )
        return PassResult(
            request.sequences,
            [(result.indices, result.layout) for result in results],
            Readback([result.logprobs_P for result in results]),
            Readback([result.is_argmax_P for result in results if result.is_argmax_P is not None]),
            Readback([result.loss for result in results]),
            request.loss_only,
        )

    def _run_sharded(
        self, request: Request, own: list[Family], backward: bool, masks: PassOfData | None
    ) -> list[MicrobatchResult]:
        """Does `_run_microbatches`. A failure ends the run, because the other processes wait in a gather."""
        is_trained = any(sequence.weights_T.any() for sequence in request.sequences)
        try:
            with self.base.adapters.using(self.adapter):
                return self._run_microbatches(request, own, backward and is_trained, masks)
        except DoesNotFit as failure:
            num_tokens = sum(family.size() for family in failure.microbatch)
            error: Exception = TrainingError(
                f"A micro-batch of {num_tokens} tokens does not fit in the memory of {self.base.device}, and "
                f"with shard=full it cannot be tried again in smaller ones: the other processes wait for it. "
                f"Start again in another log_path with max_tokens_per_microbatch={max(1, num_tokens // 2)} "
                f"or gradient_checkpointing=on. {memory_needs.describe(self.base, self.adapter, num_tokens)}"
            )
        except Exception as raised:
            error = raised
        raise self._world.abort(error) from error

    def _run_microbatches(
        self, request: Request, own: list[Family], backward: bool, masks: PassOfData | None
    ) -> list[MicrobatchResult]:
        """Plans, packs and runs the micro-batches of the sequences `own`. Raises DoesNotFit."""
        limits = self.limits.current
        plan = microbatches.plan(
            self.base, own, limits.max_tokens, limits.size, limits.size_in_memory, limits.max_in_memory
        )
        # all processes gather the weights for each micro-batch, so all run equally many
        if self.base.is_sharded:
            (num_microbatches,) = self._world.all_reduce_max(len(plan))
            plan += [[] for _ in range(num_microbatches - len(plan))]
        results = []
        for microbatch in plan:
            indices = [index for family in microbatch for index in family.indices]
            sequences = [request.sequences[index] for index in indices] or [_untrained(request)]
            size = microbatches.size_of(self.base, microbatch, limits.size_without_checkpointing) or 1
            is_checkpointed = backward and size > limits.max_tokens_without_checkpointing
            num_tokens = microbatches.size_of(self.base, microbatch, int)
            is_offloaded = is_checkpointed and num_tokens > limits.max_tokens_without_offloading
            try:
                batch = pack(
                    sequences, self.base.device, request.trained_only, microbatch, self.base.is_padded
                )
                keys = None
                if masks is not None:
                    lengths = [stop - start for start, stop in batch.attention.segments]
                    keys = masks.keys(indices or [len(request.sequences)], lengths)
                with self.base.dropping(keys):
                    result = self._run_microbatch(
                        batch, indices, request, backward, is_checkpointed, is_offloaded
                    )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise DoesNotFit(
                    microbatch, is_checkpointed or not backward, is_offloaded or not backward
                ) from None
            if indices:
                results.append(result)
        return results

    def _run_microbatch(
        self,
        batch: PackedBatch,
        indices: list[int],
        request: Request,
        backward: bool,
        is_checkpointed: bool,
        is_offloaded: bool,
    ) -> MicrobatchResult:
        num_trained, is_argmax_P = batch.layout.num_trained, None
        inputs = dict(batch.extras)

        def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
            extras = {name: values_P[part] for name, values_P in inputs.items()}
            return request.loss.fn(logprobs_C, batch.weights_P[part], extras, request.loss_config)

        def prepare(logprobs_P: Tensor) -> None:
            assert request.loss.of_sequences is not None
            part = slice(len(logprobs_P))
            extras = {name: values_P[part] for name, values_P in batch.extras.items()}
            sequence_P = copy_to(self.base.device, batch.layout.sequence_P[part])
            inputs.update(request.loss.of_sequences(logprobs_P, extras, sequence_P))

        couples = request.loss.of_sequences is not None
        if backward and (num_trained or self.base.is_sharded):
            logprobs_P, loss = self.base.backpropagate(
                batch, token_loss, is_checkpointed, prepare if couples else None, is_offloaded
            )
            self._optimizer.collect_gradients()
        else:
            if request.with_argmax:
                logprobs_P, is_argmax_P = self.base.scores(batch)
            else:
                logprobs_P = self.base.logprobs(batch)
            if couples:
                prepare(logprobs_P[:num_trained])
            loss = token_loss(logprobs_P[:num_trained], slice(0, num_trained))
        if request.loss_only:
            weights_P = batch.weights_P[:num_trained].double()
            trained_P = logprobs_P[:num_trained].double()
            if weights_P.ndim == 2:  # some targets of a trained position may have weight 0
                weights_P, trained_P = weights_P[weights_P != 0], trained_P[weights_P != 0]
            logprobs_P = empty_summary(self.base.device)
            if num_trained:
                logprobs_P = torch.stack([weights_P @ trained_P, *trained_P.aminmax()])
        return MicrobatchResult(indices, batch.layout, logprobs_P, is_argmax_P, loss)

    # -- state ------------------------------------------------------------------------------

    def save(
        self,
        path: Path,
        with_optimizer: bool,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a checkpoint, with `user_metadata` besides that of this adapter.

        Raises TrainingError if a number in it is not finite.
        """
        limits, recovery = self.limits.saved() if with_optimizer else (None, None)
        info = checkpoint.StateInfo(
            base_model=models.canonical_name(self.base.name),
            lora=self.adapter.lora,
            optimizer_steps=self._optimizer.num_steps if with_optimizer else 0,
            rng_state=self.rng.bit_generator.state if with_optimizer else None,
            microbatch_limits=limits,
            microbatch_recovery=recovery,
            world_size=self._world.size,
            user_metadata={**self.user_metadata, **(user_metadata or {})},
            expires_at=None if ttl_seconds is None else _seconds_from_now(ttl_seconds),
        )
        self._check_not_half_stepped()
        optimizer = self._optimizer.tensors() if with_optimizer else None
        state_checks.check_finite(path, self.adapter.weights, optimizer or {}, self._world)
        state_checks.check_weights_agree(self.adapter.weights, self._world)
        if self.base.is_sharded and self.adapter.is_full:
            sharded_state.save(path, info, self.base, self.adapter.weights, optimizer, overwrite)
            return
        write_weights = functools.partial(self.base.adapters.write, self.adapter)
        # Not a lambda: the error of a failed save would keep the lambda's scope, and the weights in it.
        self._world.on_rank0(
            functools.partial(checkpoint.save, path, info, write_weights, optimizer, overwrite)
        )

    def load(self, path: str, with_optimizer: bool) -> None:
        """Replaces the weights (and the optimizer) by those of a checkpoint, and drops accumulated gradients.

        Everything is read and checked before anything is changed.
        """
        with self._world.failing_together(), self.base.loading_in_turn():
            info = checkpoint.read_info(path)
            weights = self.base.adapters.read(path, info.lora)
            state_checks.check_weights_fit(path, info, weights, self.adapter, self.base)
            optimizer = (
                sharded_state.read_optimizer(path, self._optimizer.masters, self.base.model)
                if with_optimizer
                else None
            )
            if optimizer is not None:
                self._optimizer.check(path, optimizer)
            rng, limits = self._read_progress(path, info)
        if with_optimizer and info.world_size != self._world.size:
            logger.info(
                "%s was saved by a run of %d processes; this one has %d. Its "
                "results will be reproduced to rounding, not bit for bit"
                ".",
                path,
                info.world_size,
                self._world.size,
            )
        dropout = checkpoint.dropout_of(path)
        if dropout != self.adapter.lora.dropout:
            logger.warning(
                "%s was trained with lora_dropout=%g, and is trained with %g here.",
                path,
                dropout,
                self.adapter.lora.dropout,
            )
        with torch.no_grad():
            for name, parameter in self.adapter.weights.items():
                parameter.copy_(weights[name])
        self.discard_gradients()
        self._optimizer.reset()
        if optimizer is not None:
            self._optimizer.restore(optimizer, info.optimizer_steps)
            self.rng = rng
            self.limits.restore(*limits)

    def _read_progress(
        self, path: str, info: checkpoint.StateInfo
    ) -> tuple[np.random.Generator, tuple[MicrobatchLimits, Recovery]]:
        """Returns the random numbers of a checkpoint, and its limits. Raises CheckpointError if damaged."""
        rng = self.rng
        try:
            if info.rng_state is not None:
                rng = np.random.default_rng(0)
                rng.bit_generator.state = dict(info.rng_state)
                rng.random()  # fails here if the saved state is not valid
                rng.bit_generator.state = dict(info.rng_state)
            limits = self.limits.of_checkpoint(info)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{Path(path) / checkpoint.STATE_FILE} is damaged: `rng_state`, `microbatch_limits` or "
                f"`microbatch_recovery` cannot be used ({error}). Load an earlier checkpoint."
            ) from error
        return rng, limits


def _seconds_from_now(seconds: int) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def _untrained(request: Request) -> TokenSequence:
    """Returns a sequence without a trained token."""
    extras = dict.fromkeys(request.sequences[0].extras, np.zeros(1, np.float32))
    return TokenSequence(np.zeros(1, np.int64), np.full(1, IGNORED_TARGET), np.zeros(1, np.float32), extras)
