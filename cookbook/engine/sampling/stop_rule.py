"""When a continuation is complete."""

from __future__ import annotations

from collections.abc import Sequence

from cookbook.engine.model.base_model import BaseModel
from cookbook.types import SamplingParams


class StopRule:
    """Decides whether a continuation is complete. Not thread-safe."""

    def __init__(self, base: BaseModel, params: SamplingParams) -> None:
        stop = stop_items(params)
        self._strings = [item for item in stop if isinstance(item, str)]
        self._token_ids = {int(item) for item in stop if not isinstance(item, str)}
        self._token_ids.update(params.stop_token_ids or ())
        if params.stop is None and not self._token_ids:
            self._token_ids = _end_of_sequence_ids(base)
        self._decode = base.tokenizer.decode
        self._tail_tokens = max((len(string.encode()) for string in self._strings), default=0) + 4
        """No token is shorter than a byte, so a stop string ends within so many tokens."""

    def is_met(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self._token_ids:
            return True
        if not self._strings:
            return False
        tail = self._decode(list(tokens[-self._tail_tokens :]))
        return any(string in tail for string in self._strings)


def stop_items(params: SamplingParams) -> list[str | int]:
    return [params.stop] if isinstance(params.stop, str) else list(params.stop or ())


def _end_of_sequence_ids(base: BaseModel) -> set[int]:
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = base.tokenizer.eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, (list, tuple)) else {int(configured)}
