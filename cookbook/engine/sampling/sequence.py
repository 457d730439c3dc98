"""`Sequence`, the unit of work of a sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cookbook.engine.sampling.requests import SampleRequest
from cookbook.types import StopReason


@dataclass(eq=False)
class Sequence:
    """One sample that is being drawn: it waits to be admitted, runs, and stops.

    It depends on its request and its own random stream alone, never on what runs beside it.
    """

    request: SampleRequest
    index: int
    """Which of the request's samples it is."""
    generator: np.random.Generator
    """Its random stream: one number for each token."""
    tokens: list[int] = field(default_factory=list)
    """The tokens drawn so far."""
    logprobs: list[float] = field(default_factory=list)
    """The log-probability of each of `tokens`, before temperature, top-k and top-p, in nats."""
    stop_reason: StopReason | None = None
    """None until it is complete."""
    length: int = field(init=False)
    """The number of tokens, with those of the prompt."""
    uniform: float = field(init=False)
    """The number in [0, 1) that the next token is drawn with, the same if it is preempted before that."""
    capacity: int = 0
    """The length bucket of the KV cache that holds it; 0 while none does."""
    row: int = -1
    """Its row in that bucket."""

    def __post_init__(self) -> None:
        self.length = len(self.request.prompt_T)
        self.uniform = self.generator.random()

    @property
    def text_T(self) -> np.ndarray:
        """The prompt and the tokens drawn so far, int64."""
        return np.concatenate([self.request.prompt_T, np.array(self.tokens, np.int64)])

    def append(self, token: int, logprob: float) -> None:
        """Adds a drawn token, sets `stop_reason` if it is the last, and calls the request's `on_token`."""
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
            request.on_token(self.index, token)
