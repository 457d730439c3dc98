"""Decoders, which run the model over sequences: prefill over their text, then decode token by token.

Shape suffixes: G groups, R sequences, N tokens of a packed row, T tokens of one sequence, S scored positions,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model import architecture
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import copy_to
from cookbook.engine.sampling.prompt_tree import PromptTree
from cookbook.engine.sampling.sequence import Sequence


class Decoder(ABC):
    """Runs the model over sequences: once over the text of each, then over one token of each at a time."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.prompts: PromptTree | None = None
        """What earlier texts leave to later ones that begin alike, for decoders that can reuse it."""

    @abstractmethod
    def prefill(self, groups: list[list[Sequence]]) -> Tensor:
        """Runs the model over the text of each group, which the group's sequences share.

        Returns the logits after the text: [G, V] fp32. Sets `prompt_logprobs` of the requests that include
        them.
        """

    @abstractmethod
    def decode(self, sequences: list[Sequence]) -> Tensor:
        """Runs the model over the last token of every sequence that was prefilled and not removed.

        Returns the logits after that token: [R, V] fp32.
        """

    def num_known(self, sequence: Sequence) -> int:
        """Returns how many tokens of a sequence's text a prefill would not compute."""
        return 0

    def remove(self, sequence: Sequence) -> None:
        """Frees the memory of a sequence."""

    def cache_bytes(self) -> tuple[int, int]:
        """Returns the bytes of one cached position and of one sequence's states, or zeros if unknown."""
        return 0, 0


class WholeModelDecoder(Decoder):
    """Runs the model's own attention over transformers' cache, with one batch for each group."""

    def __init__(self, base: BaseModel) -> None:
        accepted = inspect.signature(base.model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in accepted]
        if not names:
            raise ValueError(f"{type(base.model).__name__} does not accept a cache")
        super().__init__(base)
        self._cache_name = names[0]
        self._takes_positions = "position_ids" in accepted
        self._last_only = _last_logits_only(base)
        self._longrope_thresholds = architecture.longrope_thresholds(base.model.config.get_text_config())
        self._groups: list[tuple[Any, list[Sequence]]] = []
        """The cache of each group, and its sequences in the order of that cache's rows."""

    def prefill(self, groups: list[list[Sequence]]) -> Tensor:
        logits = []
        for group in groups:
            tokens_1T = torch.from_numpy(group[0].text_T[None]).to(self._base.device)
            needs_logprobs = needs_prompt_logprobs(group)
            cache = _new_cache(self._base)
            logits_TV = self._run(tokens_1T, cache, **({} if needs_logprobs else self._last_only))[0]
            if needs_logprobs:
                group[0].request.prompt_logprobs = _logprobs_of(logits_TV, tokens_1T[0])
            logits.append(logits_TV[-1].float())
            cache.reorder_cache(copy_to(self._base.device, np.zeros(len(group), np.int64)))
            self._groups.append((cache, list(group)))
        return torch.stack(logits)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        logits: dict[Sequence, Tensor] = {}
        for number, (cache, group) in enumerate(self._groups):
            length = group[0].length
            if length - 1 in self._longrope_thresholds:  # RoPE of the cached positions used other frequencies
                cache = _new_cache(self._base)
                self._groups[number] = (cache, group)
                texts = np.stack([sequence.text_T for sequence in group])
                logits_RTV = self._run(
                    torch.from_numpy(texts).to(self._base.device), cache, **self._last_only
                )
            else:
                token_R1 = torch.tensor(
                    [sequence.tokens[-1:] for sequence in group], device=self._base.device
                )
                # Some models do not count what is in their cache, so the position is passed.
                position_R1 = torch.full_like(token_R1, length - 1)
                positions = {"position_ids": position_R1} if self._takes_positions else {}
                logits_RTV = self._run(token_R1, cache, **positions)
            logits.update(zip(group, logits_RTV[:, -1].float(), strict=True))
        return torch.stack([logits[sequence] for sequence in sequences])

    def remove(self, sequence: Sequence) -> None:
        number = next(number for number, (_, group) in enumerate(self._groups) if sequence in group)
        cache, group = self._groups[number]
        if len(group) == 1:
            del self._groups[number]
            return
        rows = [row for row, other in enumerate(group) if other is not sequence]
        group.remove(sequence)
        # beam search does this too, so it also works for layers without keys
        cache.reorder_cache(copy_to(self._base.device, np.array(rows)))

    def _run(self, tokens_RT: Tensor, cache: Any, **arguments: Any) -> Tensor:
        arguments = {self._cache_name: cache, "use_cache": True, **arguments}
        logits_RTV: Tensor = self._base.model(tokens_RT, **arguments).logits
        return logits_RTV


class UncachedDecoder(Decoder):
    """Runs the model over the whole sequence for every token, without a cache. Slow, and always exact."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base)
        self._last_only = _last_logits_only(base)

    def prefill(self, groups: list[list[Sequence]]) -> Tensor:
        logits = []
        for group in groups:
            text_T = group[0].text_T
            needs_logprobs = needs_prompt_logprobs(group)
            logits_TV = self.logits(text_T, **({} if needs_logprobs else self._last_only))
            if needs_logprobs:
                tokens_T = copy_to(self._base.device, text_T)
                group[0].request.prompt_logprobs = _logprobs_of(logits_TV, tokens_T)
            logits.append(logits_TV[-1])
        return torch.stack(logits)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        return torch.stack([self.logits(sequence.text_T, **self._last_only)[-1] for sequence in sequences])

    def logits(self, tokens_T: np.ndarray, **arguments: Any) -> Tensor:
        """Returns the logits after every token: [T, V] fp32."""
        tokens_1T = copy_to(self._base.device, tokens_T[None])
        logits_TV: Tensor = self._base.model(input_ids=tokens_1T, use_cache=False, **arguments).logits[0]
        return logits_TV.float()


def needs_prompt_logprobs(group: list[Sequence]) -> bool:
    request = group[0].request
    return request.include_prompt_logprobs and request.prompt_logprobs is None


def _logprobs_of(logits_TV: Tensor, tokens_T: Tensor) -> list[float | None]:
    logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
    return [None, *logprobs_TV.gather(1, tokens_T[1:, None])[:, 0].tolist()]


def _last_logits_only(base: BaseModel) -> dict[str, int]:
    """Returns the argument that makes a model return only the last logits, if it accepts one."""
    accepted = inspect.signature(base.model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}


def _new_cache(base: BaseModel) -> Any:
    """Returns a transformers cache that keeps all positions: some models do not use the window they name.

    A model with sliding layers of a kind of its own uses its window (DeepSeek V4), and makes one mask for
    them all.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=base.model.config)
    if not has_own_windows(base):
        sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        cache.layers = [DynamicLayer() if layer in sliding else layer for layer in cache.layers]
    return cache


def has_own_windows(base: BaseModel) -> bool:
    """Returns whether a model's cache has sliding layers of a kind of its own."""
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    layers = DynamicCache(config=base.model.config).layers
    sliding = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return any(type(layer) is not DynamicSlidingWindowLayer for layer in sliding)
