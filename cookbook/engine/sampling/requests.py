"""What is asked of a sampler, checked before it is queued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from cookbook.engine.job_future import JobFuture
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling.stop_rule import StopRule, stop_items
from cookbook.errors import RequestError
from cookbook.types import SampleResponse, SamplingParams

OnToken = Callable[[int, int], None]
"""(which continuation, token): called on the engine's thread as soon as a token is chosen."""


@dataclass(eq=False)
class SampleRequest:
    """Some continuations of one prompt."""

    prompt_T: Sequence[int]
    num_samples: int
    params: SamplingParams
    max_tokens: int
    stop_rule: StopRule
    include_prompt_logprobs: bool = False
    index_of_unseeded: int = 0
    """Among the requests of a snapshot that bring no seed."""
    on_token: OnToken | None = None
    is_abandoned: bool = False
    future: Future[SampleResponse] = field(default_factory=JobFuture)

    def abandon(self) -> None:
        """Nobody waits for more: what there is by the next token is the answer. From any thread."""
        self.is_abandoned = True


@dataclass(eq=False)
class ScoreRequest:
    """The log-probability of every token of a sequence."""

    tokens_T: Sequence[int]
    is_argmax_T: Sequence[bool | None] = ()
    """Whether each token is the most likely one in its place: there when the future is done."""
    future: Future[list[float | None]] = field(default_factory=JobFuture)


Request = SampleRequest | ScoreRequest


def sample_request(
    base: BaseModel,
    prompt_T: Sequence[int],
    num_samples: int = 1,
    params: SamplingParams | None = None,
    include_prompt_logprobs: bool = False,
    on_token: OnToken | None = None,
) -> SampleRequest:
    """Raises RequestError for what cannot be sampled."""
    params = _with_numbers(params or SamplingParams())
    num_samples = _whole("num_samples", num_samples)
    _check_prompt(base, prompt_T)
    if num_samples < 1:
        raise RequestError(f"num_samples={num_samples}. Ask for at least one sample.")
    if not params.temperature >= 0 or not 0 < params.top_p <= 1 or params.top_k == 0 or params.top_k < -1:
        raise RequestError(
            f"temperature={params.temperature}, top_p={params.top_p}, top_k={params.top_k} cannot be sampled "
            f"with. Use temperature >= 0, 0 < top_p <= 1, and top_k >= 1 or -1 for no limit."
        )
    if params.seed is not None and params.seed < 0:
        raise RequestError(f"seed={params.seed} cannot be sampled with. Use 0 or more.")
    if "" in stop_items(params):
        raise RequestError(
            f"stop={params.stop!r} has an empty stop string, which every text holds. Leave it out."
        )
    room = base.context_length - len(prompt_T)
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens < 1 or max_tokens > room:
        raise RequestError(
            f"max_tokens={params.max_tokens} after a prompt of {len(prompt_T)} tokens does not fit the "
            f"context length of {base.context_length}. Use 1 to {room}."
        )
    return SampleRequest(
        prompt_T,
        num_samples,
        params,
        max_tokens,
        StopRule(base, params),
        include_prompt_logprobs,
        on_token=on_token,
    )


def _with_numbers(params: SamplingParams) -> SamplingParams:
    """The same with plain numbers: what is none would fail in the midst of other requests."""
    whole: dict[str, Any] = {
        name: _whole(name, value)
        for name in ("max_tokens", "seed", "top_k")
        if (value := getattr(params, name)) is not None
    }
    return replace(
        params,
        **whole,
        temperature=_real("temperature", params.temperature),
        top_p=_real("top_p", params.top_p),
    )


def _whole(name: str, value: Any) -> int:
    try:
        whole = int(value)
        is_whole = bool(whole == value)
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise RequestError(f"{name}={value!r} cannot be sampled with. Use a whole number.")
    return whole


def _real(name: str, value: Any) -> float:
    try:
        return float(value + 0.0)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{name}={value!r} cannot be sampled with. Use a number.") from error


def score_request(base: BaseModel, tokens_T: Sequence[int]) -> ScoreRequest:
    """Raises RequestError for what cannot be scored."""
    _check_prompt(base, tokens_T)
    return ScoreRequest(tokens_T)


def _check_prompt(base: BaseModel, prompt_T: Sequence[int]) -> None:
    if not prompt_T:
        raise RequestError("The prompt is empty. Give at least one token.")
    outside = [token for token in prompt_T if not 0 <= token < base.vocab_size]
    if outside:
        raise RequestError(f"The prompt has token {outside[0]}, outside the vocabulary of {base.vocab_size}.")
    if len(prompt_T) > base.context_length:
        raise RequestError(
            f"The prompt has {len(prompt_T)} tokens, more than the context length of {base.context_length}."
        )
