"""The settings and the results of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from cookbook.types.tensor_data import TensorData
from cookbook.types.values import Value

StopReason: TypeAlias = Literal["stop", "length"]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]


@dataclass(unsafe_hash=True)
class SamplingParams(Value):
    """The settings for continuing a prompt.

    `stop` (strings or token ids) and `stop_token_ids` both apply. Without them, the model's own
    end-of-sequence tokens stop it. An empty `stop` of `[]` differs from None: nothing stops a continuation
    before `max_tokens`, as in Tinker. If `max_tokens` is None, the limit is the model's context length.
    `top_k` of -1 keeps the whole vocabulary. `temperature` of 0 takes the most likely token. Attributes may
    be set; a request takes them as they are when it is made.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (str, tuple))):
                setattr(self, name, [*(value.tolist() if hasattr(value, "tolist") else value)])


@dataclass(frozen=True)
class SampledSequence(Value):
    """One continuation. `tokens` include the token that stopped it, if one did.

    `logprobs[t]` is the model's own log-probability of `tokens[t]`, before temperature, top-k and top-p.
    `sequence_id` is different for every sequence, and a Datum may name it (`Datum.with_provenance`).
    """

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: StopReason
    sequence_id: str = field(default="", compare=False)
    topk_logprobs: list[list[tuple[int, float]] | None] | None = None
    """The most likely tokens at each position with their log-probabilities, if they were requested."""

    @property
    def tokens_np(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)

    @property
    def logprobs_np(self) -> np.ndarray | None:
        return None if self.logprobs is None else np.array(self.logprobs, np.float32)


@dataclass(frozen=True)
class SampleResponse(Value):
    """The sampled sequences. `prompt_logprobs[0]` is None, because nothing precedes the first token."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    prompt_cache_hit_tokens: int = field(default=0, compare=False)
    """How many tokens of the prompt were not computed, because an earlier text of this snapshot, or another
    prompt of the same pass, begins with them. The prompt counts once, however many samples it has. It is 0 if
    a server sampled. Responses compare equal whatever was reused."""
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    """For each token of the prompt the most likely tokens in its place, if they were requested."""
    target_prompt_logprobs: TensorData | None = None
    """The log-probabilities of the requested tokens, in their shape; 0 where none was named."""

    @property
    def prompt_logprobs_np(self) -> np.ndarray | None:
        """The log-probabilities of the prompt as float32, nan where there is none."""
        if self.prompt_logprobs is None:
            return None
        return np.array([math.nan if one is None else one for one in self.prompt_logprobs], np.float32)


@dataclass(frozen=True)
class PromptScores(Value):
    """A model's scores of given tokens. The first entries are None: nothing precedes the first token."""

    logprobs: list[float | None]
    is_argmax: list[bool | None]
    """Whether every other token has a lower probability at that position. Tokens that tie are not argmax."""
