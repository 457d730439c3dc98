"""Sampling with a key-value cache: one prompt, many continuations.

Shape suffixes: B continuations still running, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.adapters import Adapter
from cookbook.engine.base_model import BaseModel
from cookbook.engine.packing import TokenSequence, pack
from cookbook.errors import RequestError
from cookbook.types import SampledSequence, SampleResponse, SamplingParams


class StopRule:
    """Decides whether a continuation is complete. Not thread-safe."""

    def __init__(self, base: BaseModel, params: SamplingParams) -> None:
        stop = _stop_items(params)
        self.strings = [item for item in stop if isinstance(item, str)]
        self.token_ids = {int(item) for item in stop if not isinstance(item, str)}
        self.token_ids.update(params.stop_token_ids or ())
        if not self.strings and not self.token_ids:
            self.token_ids = _end_of_sequence_ids(base)
        self._decode = base.tokenizer.decode
        self._tail_tokens = max((len(string.encode()) for string in self.strings), default=0) + 4
        """No token is shorter than a byte, so a stop string ends within so many tokens."""

    def is_met(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        tail = self._decode(list(tokens[-self._tail_tokens :]))
        return any(string in tail for string in self.strings)


def _stop_items(params: SamplingParams) -> list[str | int]:
    return [params.stop] if isinstance(params.stop, str) else list(params.stop or [])


def _end_of_sequence_ids(base: BaseModel) -> set[int]:
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = base.tokenizer.eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, (list, tuple)) else {int(configured)}


def check_sampling(base: BaseModel, prompt_T: Sequence[int], num_samples: int, params: SamplingParams) -> int:
    """How many tokens may be sampled. Raises RequestError for what cannot be sampled."""
    check_prompt(base, prompt_T)
    if num_samples < 1:
        raise RequestError(f"num_samples={num_samples}. Ask for at least one sample.")
    if not params.temperature >= 0 or not 0 < params.top_p <= 1 or params.top_k == 0 or params.top_k < -1:
        raise RequestError(
            f"temperature={params.temperature}, top_p={params.top_p}, top_k={params.top_k} cannot be sampled "
            f"with. Use temperature >= 0, 0 < top_p <= 1, and top_k >= 1 or -1 for no limit."
        )
    if "" in _stop_items(params):
        raise RequestError(
            f"stop={params.stop!r} has an empty stop string, which every text holds. Leave it out."
        )
    room = base.context_length - len(prompt_T)
    wanted = room if params.max_tokens is None else params.max_tokens
    if wanted < 1 or wanted > room:
        raise RequestError(
            f"max_tokens={params.max_tokens} after a prompt of {len(prompt_T)} tokens does not fit the "
            f"context length of {base.context_length}. Use 1 to {room}."
        )
    return wanted


def check_prompt(base: BaseModel, prompt_T: Sequence[int]) -> None:
    if not prompt_T:
        raise RequestError("The prompt is empty. Give at least one token.")
    outside = [token for token in prompt_T if not 0 <= token < base.vocab_size]
    if outside:
        raise RequestError(f"The prompt has token {outside[0]}, outside the vocabulary of {base.vocab_size}.")
    if len(prompt_T) > base.context_length:
        raise RequestError(
            f"The prompt has {len(prompt_T)} tokens, more than the context length of {base.context_length}."
        )


@torch.no_grad()
def sample(
    base: BaseModel,
    adapter: Adapter | None,
    prompt_T: Sequence[int],
    num_samples: int,
    params: SamplingParams,
    seed: int,
    include_prompt_logprobs: bool = False,
) -> SampleResponse:
    """Continues one prompt `num_samples` times. Continuation i is drawn with seed + i.

    Reported log-probabilities are the model's own, before temperature, top-k and top-p.
    """
    from transformers import DynamicCache

    max_tokens = check_sampling(base, prompt_T, num_samples, params)
    stop_rule = StopRule(base, params)
    tokens: list[list[int]] = [[] for _ in range(num_samples)]
    logprobs: list[list[float]] = [[] for _ in range(num_samples)]
    stopped = [False] * num_samples
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    running = list(range(num_samples))

    with base.adapters.using(adapter):
        prompt_logprobs = _prompt_logprobs(base, prompt_T) if include_prompt_logprobs else None
        cache = DynamicCache(config=base.model.config)
        prompt_1T = torch.tensor([prompt_T], device=base.device)
        out = base.model(prompt_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logprobs_BV = out.logits[:, -1].float().log_softmax(-1).expand(num_samples, -1)
        if num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
        while True:
            chosen_B = _choose(logprobs_BV, params, [generators[i] for i in running])
            chosen_logprobs = logprobs_BV.gather(1, chosen_B[:, None])[:, 0].tolist()
            for i, token, logprob in zip(running, chosen_B.tolist(), chosen_logprobs, strict=True):
                tokens[i].append(token)
                logprobs[i].append(logprob)
                stopped[i] = stop_rule.is_met(tokens[i])
            going_on = [row for row, i in enumerate(running) if not stopped[i]]
            if not going_on or len(tokens[running[0]]) == max_tokens:
                break
            if len(going_on) < len(running):
                rows = torch.tensor(going_on, device=base.device)
                cache.batch_select_indices(rows)
                chosen_B = chosen_B[rows]
                running = [running[row] for row in going_on]
            out = base.model(chosen_B[:, None], past_key_values=cache, use_cache=True)
            logprobs_BV = out.logits[:, -1].float().log_softmax(-1)

    sequences = [
        SampledSequence(tokens[i], logprobs[i], "stop" if stopped[i] else "length")
        for i in range(num_samples)
    ]
    return SampleResponse(sequences, prompt_logprobs)


@torch.no_grad()
def compute_logprobs(base: BaseModel, adapter: Adapter | None, prompt_T: Sequence[int]) -> list[float | None]:
    """The log-probability of each token given those before it; None for the first."""
    check_prompt(base, prompt_T)
    with base.adapters.using(adapter):
        return _prompt_logprobs(base, prompt_T)


def _prompt_logprobs(base: BaseModel, prompt_T: Sequence[int]) -> list[float | None]:
    if len(prompt_T) == 1:
        return [None]
    ids_T = np.asarray(prompt_T, dtype=np.int64)
    sequence = TokenSequence(ids_T[:-1], ids_T[1:], np.ones(len(ids_T) - 1, np.float32), {})
    return [None, *base.logprobs(pack([sequence], base.device, trained_only=False)).tolist()]


def _choose(logprobs_BV: Tensor, params: SamplingParams, generators: Sequence[torch.Generator]) -> Tensor:
    if params.temperature == 0:
        return logprobs_BV.argmax(-1)
    scaled_BV = logprobs_BV / params.temperature
    if 0 < params.top_k < scaled_BV.shape[-1]:
        lowest_kept = scaled_BV.topk(params.top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < lowest_kept, -torch.inf)
    probs_BV = scaled_BV.softmax(-1)
    if params.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        dropped_BV = torch.zeros_like(probs_BV, dtype=torch.bool).scatter(
            -1, order_BV, before_BV >= params.top_p
        )
        probs_BV = probs_BV.masked_fill(dropped_BV, 0)
    # Each row has its own generator, so a continuation does not depend on its neighbours.
    rows = [
        torch.multinomial(probs_V, 1, generator=generator)
        for probs_V, generator in zip(probs_BV.cpu(), generators, strict=True)
    ]
    return torch.cat(rows).to(logprobs_BV.device)
