"""The limits of a trainer's micro-batches, which are lowered when memory runs out and raised again later."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace

from cookbook.engine import checkpoint
from cookbook.engine.model import microbatches
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import MicrobatchLimits, Recovery
from cookbook.engine.model.prefix_tree import Family
from cookbook.engine.training import memory_needs
from cookbook.errors import TrainingError

logger = logging.getLogger(__name__)


class DoesNotFit(Exception):
    """A micro-batch ran out of memory."""

    def __init__(self, microbatch: list[Family], is_checkpointed: bool, is_offloaded: bool) -> None:
        """A pass that kept no activations at all counts as both."""
        self.microbatch = microbatch
        self.is_checkpointed = is_checkpointed
        self.is_offloaded = is_offloaded


class AdaptiveLimits:
    """The current limits of an adapter's micro-batches.

    All processes have the same ones, so that a checkpoint of one process has the limits of all.
    """

    def __init__(self, base: BaseModel, adapter: Adapter, first_patience: int) -> None:
        self.current = memory_needs.limits(base, adapter)
        self.recovery = Recovery()
        self._base = base
        self._adapter = adapter
        self._first_patience = first_patience
        self._ran_out_of_memory = False
        """Whether memory ran out in the current pass, of any process once they agree."""
        self._agree()
        self.full = self.current
        """The limits before memory ran out."""

    def lower(self, microbatch: list[Family], is_checkpointed: bool, is_offloaded: bool) -> None:
        """Lowers the limits after a micro-batch did not fit, so that the pass can be tried again.

        Raises TrainingError if that cannot help.
        """
        self.current = self._lowered(microbatch, is_checkpointed, is_offloaded)
        self._ran_out_of_memory = True

    def end_pass(self, backward: bool) -> None:
        """Agrees on limits with the other processes, and raises lowered limits again after some passes.

        Only training passes count: a resumed run may evaluate less often.
        """
        self._agree()
        if self._ran_out_of_memory:
            self.recovery = self.recovery.after_failure(self._first_patience)
            self._ran_out_of_memory = False
        elif backward:
            self.recovery, limits = self.recovery.after_pass(self.current, self.full)
            if limits != self.current:
                logger.info("Micro-batches of up to %d tokens are tried again.", limits.max_tokens)
            self.current = limits

    def saved(self) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """Returns `microbatch_limits` and `microbatch_recovery` of a checkpoint, from lowered limits.

        A run that resumes with them plans the same micro-batches.
        """
        if not self.recovery.is_needed:
            return None, None
        limits = {
            "max_tokens": self.current.max_tokens,
            "max_tokens_without_checkpointing": self.current.max_tokens_without_checkpointing,
            "max_in_memory": self.current.max_in_memory,
            "max_tokens_without_offloading": self.current.max_tokens_without_offloading,
        }
        return limits, asdict(self.recovery)

    def of_checkpoint(self, info: checkpoint.StateInfo) -> tuple[MicrobatchLimits, Recovery]:
        """Returns the limits of a checkpoint. Raises TypeError or ValueError if they are damaged."""
        if info.microbatch_limits is not None:
            limits = replace(self.current, **info.microbatch_limits)
            saved = info.microbatch_recovery  # earlier versions never raised lowered limits again
            return limits, Recovery(**saved) if saved else Recovery().after_failure(self._first_patience)
        if self.recovery.is_needed:
            return self.full, Recovery()
        return self.current, self.recovery

    def restore(self, limits: MicrobatchLimits, recovery: Recovery) -> None:
        self.current, self.recovery = limits, recovery

    def _agree(self) -> None:
        """Takes the tightest limits of all processes."""
        current = self.current
        tokens, tokens_without, in_memory, without_offloading, has_memory = self._base.world.all_reduce_min(
            current.max_tokens,
            current.max_tokens_without_checkpointing,
            current.max_in_memory,
            current.max_tokens_without_offloading,
            not self._ran_out_of_memory,
        )
        self.current = replace(
            current,
            max_tokens=tokens,
            max_tokens_without_checkpointing=tokens_without,
            max_in_memory=in_memory,
            max_tokens_without_offloading=without_offloading,
        )
        self._ran_out_of_memory = not has_memory

    def _lowered(
        self, microbatch: list[Family], is_checkpointed: bool, is_offloaded: bool
    ) -> MicrobatchLimits:
        limits = self.current

        def size(size_of: Callable[[int], int] = int) -> int:
            return microbatches.size_of(self._base, microbatch, size_of)

        num_tokens = size()
        if sum(len(family.indices) for family in microbatch) > 1:
            logger.warning(
                "A micro-batch of %d tokens does not fit in memory: continuing with %d at most.",
                num_tokens,
                num_tokens // 2,
            )
            lower = replace(limits, max_tokens=min(limits.max_tokens, size(limits.size) // 2))
            if len(microbatch) > 1:
                return lower
            return replace(lower, max_in_memory=size(limits.size_in_memory) // 2)
        is_automatic = self._base.options.gradient_checkpointing == "auto"
        if is_automatic and not is_checkpointed:
            logger.warning(
                "A sequence of %d tokens does not fit in memory: its layers are checkpointed from now on.",
                num_tokens,
            )
            checkpointed = size(limits.size_without_checkpointing)
            return replace(limits, max_tokens_without_checkpointing=checkpointed - 1)
        can_offload = self._base.can_offload and not is_offloaded
        if is_automatic and can_offload:
            logger.warning(
                "A sequence of %d tokens does not fit in memory with checkpointed layers: their inputs are "
                "kept in host memory from now on.",
                num_tokens,
            )
            return replace(limits, max_tokens_without_offloading=num_tokens - 1)
        checkpointing = " gradient_checkpointing=auto," if can_offload or not is_checkpointed else ""
        raise TrainingError(
            f"A sequence of {num_tokens} tokens does not fit in the memory of {self._base.device}, even "
            f"alone. Use{checkpointing} a smaller max_length, a dtype of fewer bytes, or a smaller model. "
            f"{memory_needs.describe(self._base, self._adapter, num_tokens)}"
        )
