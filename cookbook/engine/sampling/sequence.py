"""`Sequence`, the unit of work of a sampler, and `CachedText`, that of its cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cookbook.engine.sampling.requests import SampleRequest
from cookbook.types import StopReason


@dataclass(eq=False, kw_only=True)
class CachedText:
    """A text whose keys, values and states are in the cache, or will be."""

    length: int = 0
    """The number of tokens."""
    capacity: int = 0
    """The capacity of the length bucket that holds it, or 0 if none does."""
    row: int = -1
    """The row in that bucket."""


@dataclass(eq=False)
class Sequence(CachedText):
    """One sample in progress: it waits to be admitted, runs, and stops.

    It depends on its request and its own random stream alone, never on what it is batched with.
    """

    request: SampleRequest
    index: int
    """The index of this sample in its request."""
    generator: np.random.Generator
    """The random stream, with one number for each token."""
    tokens: list[int] = field(default_factory=list)
    """The tokens sampled so far."""
    logprobs: list[float] = field(default_factory=list)
    """The log-probability of each of `tokens`, before temperature, top-k and top-p, in nats."""
    top_logprobs: list[list[tuple[int, float]] | None] = field(default_factory=list)
    """The most likely tokens in the place of each of `tokens`, if they were requested."""
    stop_reason: StopReason | None = None
    """None until the sequence is complete."""
    uniform: float = field(init=False)
    """The number in [0, 1) with which the next token is sampled. A preemption does not change it."""

    def __post_init__(self) -> None:
        self.length = len(self.request.prompt_T)
        self.uniform = self.generator.random()

    @property
    def text_T(self) -> np.ndarray:
        """The prompt and the tokens sampled so far, int64."""
        return np.concatenate([self.request.prompt_T, np.array(self.tokens, np.int64)])

    def append(self, token: int, logprob: float) -> None:
        """Adds a sampled token, sets `stop_reason` if it is the last, and calls the request's `on_token`."""
        request = self.request
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.length += 1
        self.uniform = self.generator.random()
        if request.stop_rule.is_met(self.tokens):
            self.stop_reason = "stop"
        elif len(self.tokens) == request.max_tokens or request.is_abandoned:
            self.stop_reason = "length"
        if request.on_token is not None:
            request.on_token(self.index, token, logprob)
