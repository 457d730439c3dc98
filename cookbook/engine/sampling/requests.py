"""Requests to a sampler, validated before they are queued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cookbook.engine.job_future import JobFuture
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling.stop_rule import StopRule, stop_items
from cookbook.errors import RequestError
from cookbook.types import SampleResponse, SamplingParams

OnToken = Callable[[int, int, float], None]
"""Called with the index of the sample, a token and its log-probability on the engine's thread, as soon as the
token is sampled."""


@dataclass(eq=False)
class SampleRequest:
    """A prompt, the number of samples to draw from it, and the settings."""

    prompt_T: np.ndarray
    """Token ids, int64."""
    num_samples: int
    params: SamplingParams
    max_tokens: int
    stop_rule: StopRule
    include_prompt_logprobs: bool = False
    on_token: OnToken | None = None
    unseeded_index: int = 0
    """The index of this request among the unseeded requests of a snapshot."""
    is_abandoned: bool = False
    prompt_logprobs: list[float | None] | None = None
    """Set by the prefill if they are requested."""
    num_top_logprobs: int = 0
    """How many of the most likely tokens are returned for each sampled one."""
    prompt_cache_hit_tokens: int | None = None
    """How many tokens of the prompt its first prefill did not compute, because other texts begin with them.
    None before."""
    future: Future[SampleResponse] = field(default_factory=JobFuture)

    def abandon(self) -> None:
        """Ends the request with its next token. Its result holds the tokens sampled by then. Thread-safe."""
        self.is_abandoned = True


@dataclass(eq=False)
class ScoreRequest:
    """A request for the log-probability of every token of a text."""

    tokens_T: np.ndarray
    """Token ids, int64."""
    is_argmax_T: list[bool | None] = field(default_factory=list)
    """Whether each token is the most likely one at its position. Set when the future is done."""
    num_top_logprobs: int = 0
    """How many of the most likely tokens are returned for each position."""
    targets_TJ: np.ndarray | None = None
    """Tokens to score in the place of each token but the first, int64 [T - 1, J]. -1 names none."""
    top_logprobs: list[list[tuple[int, float]] | None] | None = None
    target_logprobs_TJ: np.ndarray | None = None
    """These two are set when the future is done, if they were requested."""
    future: Future[list[float | None]] = field(default_factory=JobFuture)


Request = SampleRequest | ScoreRequest


def sample_request(
    base: BaseModel,
    prompt: Sequence[int],
    num_samples: int = 1,
    params: SamplingParams | None = None,
    include_prompt_logprobs: bool = False,
    on_token: OnToken | None = None,
    num_top_logprobs: int = 0,
) -> SampleRequest:
    """Returns a request for `num_samples` samples. Raises RequestError for unsupported settings."""
    params = SamplingParams() if params is None else SamplingParams.model_validate(params)
    numbers = {
        "temperature": _number("temperature", params.temperature, float),
        "top_p": _number("top_p", params.top_p, float),
        "top_k": _number("top_k", params.top_k, int),
        "seed": None if params.seed is None else _number("seed", params.seed, int),
        "max_tokens": None if params.max_tokens is None else _number("max_tokens", params.max_tokens, int),
    }
    params = replace(params, **numbers)
    num_samples = _number("num_samples", num_samples, int)
    prompt_T = _checked_tokens(base, prompt)
    if num_samples < 1:
        raise RequestError(f"Invalid num_samples={num_samples}: must be >= 1.")
    if not params.temperature >= 0:
        raise RequestError(f"Invalid temperature={params.temperature}: must be >= 0 (0 is greedy).")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"Invalid top_p={params.top_p}: must be > 0 and <= 1 (1 is no limit).")
    if params.top_k == 0 or params.top_k < -1:
        raise RequestError(f"Invalid top_k={params.top_k}: must be >= 1, or -1 for no limit.")
    if params.seed is not None and params.seed < 0:
        raise RequestError(f"Invalid seed={params.seed}: must be >= 0.")
    if "" in stop_items(params):
        raise RequestError(
            f"Invalid stop={params.stop!r}: an empty stop string occurs in every text. Remove it."
        )
    room = base.context_length - len(prompt_T)
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens < 1 or max_tokens > room:
        raise RequestError(
            f"max_tokens={params.max_tokens} after a prompt of {len(prompt_T)} tokens does not fit the "
            f"context length of {base.context_length}. "
            + (f"Use 1 to {room}." if room else "Use a shorter prompt.")
        )
    stop_rule = StopRule(base, params)
    return SampleRequest(
        prompt_T,
        num_samples,
        params,
        max_tokens,
        stop_rule,
        include_prompt_logprobs,
        on_token,
        num_top_logprobs=_checked_top(base, "topk_sample_logprobs", num_top_logprobs),
    )


def score_request(
    base: BaseModel,
    tokens: Sequence[int],
    num_top_logprobs: int = 0,
    targets_TJ: np.ndarray | None = None,
) -> ScoreRequest:
    """Returns a request for the log-probabilities of `tokens`, of the most likely tokens, and of targets.

    Raises RequestError if they do not fit.
    """
    tokens_T = _checked_tokens(base, tokens)
    if targets_TJ is not None:
        if targets_TJ.dtype.kind != "i" or targets_TJ.ndim != 2 or len(targets_TJ) != len(tokens_T) - 1:
            raise RequestError(
                f"target_prompt_logprobs has shape {[*targets_TJ.shape]} and dtype {targets_TJ.dtype}, and a "
                f"prompt of {len(tokens_T)} tokens needs whole numbers of shape [{len(tokens_T) - 1}, K]."
            )
        outside = targets_TJ[(targets_TJ < -1) | (targets_TJ >= base.vocab_size)]
        if len(outside):
            raise RequestError(
                f"target_prompt_logprobs has token {outside[0]}, outside the vocabulary of "
                f"{base.vocab_size}; -1 names none."
            )
    top = _checked_top(base, "topk_prompt_logprobs", num_top_logprobs)
    return ScoreRequest(tokens_T, num_top_logprobs=top, targets_TJ=targets_TJ)


def _checked_top(base: BaseModel, name: str, count: int) -> int:
    count = _number(name, count, int)
    if not 0 <= count <= base.vocab_size:
        raise RequestError(f"Invalid {name}={count}: must be 0 to the vocabulary's size, {base.vocab_size}.")
    return count


def _checked_tokens(base: BaseModel, tokens: Sequence[int]) -> np.ndarray:
    if not len(tokens):
        raise RequestError("The prompt is empty. Give at least one token.")
    outside = [token for token in tokens if not 0 <= token < base.vocab_size]
    if outside:
        raise RequestError(f"The prompt has token {outside[0]}, outside the vocabulary of {base.vocab_size}.")
    if len(tokens) > base.context_length:
        raise RequestError(
            f"The prompt has {len(tokens)} tokens, more than the context length of {base.context_length}."
        )
    return np.array(tokens, np.int64)


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """Returns `value` as a plain int or float. Other values would fail later, in a batch of requests."""
    try:
        number = kind(value + kind(0))
        is_exact = kind is float or bool(number == value)
    except (TypeError, ValueError, OverflowError):
        is_exact = False
    if not is_exact:
        raise RequestError(f"Invalid {name}={value!r}: must be a {'whole ' if kind is int else ''}number.")
    return number
