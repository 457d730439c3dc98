"""Chooses the decoder to sample a model with, by comparing each decoder with the model's own forward pass."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model import architecture, packed_weights, rounding_noise
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import is_out_of_memory
from cookbook.engine.sampling.decoders import (
    Decoder,
    UncachedDecoder,
    WholeModelDecoder,
    has_own_windows,
)
from cookbook.engine.sampling.packed_decoder import PackedDecoder
from cookbook.engine.sampling.prompt_tree import PromptTree
from cookbook.engine.sampling.requests import sample_request
from cookbook.engine.sampling.sequence import Sequence
from cookbook.types import SamplingParams

logger = logging.getLogger(__name__)

DECODERS: tuple[type[Decoder], ...] = (PackedDecoder, WholeModelDecoder, UncachedDecoder)
"""Ordered from the fastest decoder to the one that is always exact."""
_TOLERANCE_FP32, _TOLERANCE_16_BIT = 2e-5, 0.05
"""The largest difference of logits, as a share of the largest logit. Rounding in fp32 is below 5e-6. The
steps of transformers 5.23 for Zamba2 do not bound the time step, with differences of 2e-5 to 4e-4."""


@torch.no_grad()
def make_decoder(base: BaseModel, decoders: tuple[type[Decoder], ...] = DECODERS) -> Decoder:
    """Returns the first of `decoders` whose logits equal those of the model's forward pass without a cache.

    Each decoder is compared once per loaded model, when the model is first sampled from, and the result is
    kept in `base.make_decoder`. The last decoder is the forward pass itself and needs no comparison. While
    the model's own logits are nan, no comparison is possible: the last decoder is used, and the comparison is
    repeated later.
    """
    if base.make_decoder is not None:
        decoder: Decoder = base.make_decoder(base)
        return decoder
    *candidates, last = decoders if base.packs_all_lengths else decoders[1:]
    base.row_multiple = _row_multiple(base)
    if base.options.pack_weights and base.device.type == "cpu" and not base.options.compile:
        base.packed_weights = packed_weights.pack(base.model, base.dtype)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(base.vocab_size, (length,), generator=generator).numpy() for length in (6, 7, 8)]
    texts[2][:6] = texts[1][:6]
    with base.adapters.using(None):
        expected = [UncachedDecoder(base).logits(text_T) for text_T in texts]
        if any(logits_TV.isnan().any() for logits_TV in expected):
            return last(base)
        found = last
        for number, candidate in enumerate(candidates):
            reason = _why_not(base, candidate, texts, expected)
            if reason is None:
                found = candidate
                break
            logger.warning(
                "%s is not sampled from with %s: %s. Sampling falls back to %s, which is slower.",
                base.name,
                candidate.__name__,
                reason,
                [*candidates, last][number + 1].__name__,
            )
    base.make_decoder, base.decodes_packed = found, found is PackedDecoder
    if found is last:
        base.cache_bytes = 0, 0
    with base.adapters.using(None):
        reason = _why_not_reused(base, texts[1:], expected[1:])
        if found is WholeModelDecoder:
            _warn_of_own_windows(base, texts[2])
    base.reuses_prompts = reason is None
    if reason is not None:
        logger.info("%s computes every prompt from its first token when sampling: %s.", base.name, reason)
    return found(base)


_ROWS_TRIED = (4, 8, 12, 20, 28, 44, 64)
"""Libraries choose kernels by the number of rows, so several are tried on each side of powers of two."""


def _row_multiple(base: BaseModel) -> int:
    """Returns 4 if this CPU's products of 4 rows with the model's weights have the bits of those of more.

    They take two thirds of the time of 8 rows. Products of fewer rows round differently on all CPUs seen.
    """
    if base.device.type != "cpu" or base.is_sharded:
        return BaseModel.row_multiple
    matrices = [
        weight for weight in base.model.parameters() if weight.ndim == 2 and weight.dtype == base.dtype
    ]
    generator = torch.Generator().manual_seed(0)
    for weight_OI in {weight.shape: weight[: packed_weights.OUTPUTS_TRIED] for weight in matrices}.values():
        rows_RI = torch.randn(_ROWS_TRIED[-1], weight_OI.shape[1], generator=generator).to(base.dtype)
        expected_RO = rows_RI @ weight_OI.T
        if any(not torch.equal(rows_RI[:num] @ weight_OI.T, expected_RO[:num]) for num in _ROWS_TRIED):
            return BaseModel.row_multiple
    return 4


def _why_not(
    base: BaseModel,
    candidate: type[Decoder],
    texts: list[np.ndarray],
    expected: list[Tensor],
) -> str | None:
    """Returns why this decoder would sample from another distribution than the model's, or None."""

    def differences() -> Iterator[float]:
        decoder = candidate(base)
        yield from _differences(base, decoder, texts, expected)
        base.cache_bytes = decoder.cache_bytes()

    return _why_different(base, differences, texts, expected)


def _why_different(
    base: BaseModel,
    differences: Callable[[], Iterator[float]],
    texts: list[np.ndarray],
    expected: list[Tensor],
) -> str | None:
    """Returns why logits after texts move by more than rounding, or why they cannot be compared, or None."""
    try:
        found = sorted(differences())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        base.discard_pass()
        return f"{type(error).__name__}: {error}"
    tolerance, difference = _TOLERANCE_FP32, found[-1]
    if base.dtype != torch.float32:  # a router may choose another expert for one token
        tolerance, difference = _TOLERANCE_16_BIT, found[-2]
    if difference > tolerance and base.dtype != torch.float32:
        tolerance = rounding_noise.tolerance_in_16_bits(
            tolerance,
            base.model.get_input_embeddings(),
            lambda: max(
                _difference(expected_V, found_V)
                for text_T, expected_TV in zip(texts, expected, strict=True)
                for expected_V, found_V in zip(expected_TV, UncachedDecoder(base).logits(text_T), strict=True)
            ),
        )
    return None if difference <= tolerance else f"its logits would move by {difference:.1e} of the largest"


def _why_not_reused(base: BaseModel, texts: list[np.ndarray], expected: list[Tensor]) -> str | None:
    """Returns why prompts do not reuse what they share with earlier ones, or None if they do."""
    if not base.decodes_packed:
        return "its prompts do not share rows"
    if base.min_shared_tokens is None:
        return "its layers do not compute what sequences share once"
    return _why_different(base, lambda: _differences_of_reuse(base, texts, expected), texts, expected)


def _differences_of_reuse(
    base: BaseModel, texts: list[np.ndarray], expected: list[Tensor]
) -> Iterator[float]:
    """Yields the difference of logits after texts that share a row, and after texts that reuse their keys.

    Texts are continued from states in passes of their own: by several tokens, by one and by none.
    """
    decoder, has_states = PackedDecoder(base), bool(base.recurrent.mixers)
    decoder.prompts, decoder.min_shared = PromptTree(weakref.WeakSet()), 1
    decoder.prompts.limit(2 * sum(map(len, texts)))
    for number_of_tokens in (-5, -2, -1) if has_states else (-1, -2):
        parts = [text_T[:number_of_tokens] for text_T in texts]
        groups = [[sequence] for text_T in parts for sequence in _start(base, text_T, 1)]
        passes = [[group] for group in groups] if has_states else [groups]
        found = [logits_V for each in passes for logits_V in decoder.prefill(each)]
        for text_T, expected_TV, found_V in zip(parts, expected, found, strict=True):
            yield _difference(expected_TV[len(text_T) - 1], found_V)
        for (sequence,), text_T in zip(groups, texts, strict=True):
            sequence.append(int(text_T[sequence.length]), 0.0)
        sequences = [sequence for (sequence,) in groups]
        for sequence, expected_TV, found_V in zip(
            sequences, expected, decoder.decode(sequences), strict=True
        ):
            yield _difference(expected_TV[sequence.length - 1], found_V)
            decoder.remove(sequence)


def _warn_of_own_windows(base: BaseModel, text_T: np.ndarray) -> None:
    """Warns about a model in whose own cache a reply reaches fewer tokens than in a forward pass.

    This shows beyond a window, so windows are shorter meanwhile.
    """
    if not has_own_windows(base):
        return
    with architecture.short_spans(base.decoder, base.model.config.get_text_config()):
        expected_TV = UncachedDecoder(base).logits(text_T)
        reason = _why_different(
            base, lambda: _differences_of_steps(base, text_T, expected_TV), [text_T], [expected_TV]
        )
    if reason is not None:
        logger.warning(
            "%s is sampled from as by its own `generate`, in whose cache long replies reach fewer tokens "
            "than in training or a forward pass: their log-probabilities differ from those there.",
            base.name,
        )


def _differences_of_steps(base: BaseModel, text_T: np.ndarray, expected_TV: Tensor) -> Iterator[float]:
    """Yields the difference of logits after each token behind the second, which are decoded one by one."""
    decoder = WholeModelDecoder(base)
    (sequence,) = _start(base, text_T[:2], 1)
    decoder.prefill([[sequence]])
    for token, expected_V in zip(text_T[2:], expected_TV[2:], strict=True):
        sequence.append(int(token), 0.0)
        yield _difference(expected_V, decoder.decode([sequence])[0])


def _start(base: BaseModel, prompt_T: np.ndarray, num_samples: int) -> list[Sequence]:
    settings = SamplingParams(stop_token_ids=[-1])
    request = sample_request(base, prompt_T.tolist(), num_samples, settings)
    return [Sequence(request, index, np.random.default_rng(0)) for index in range(num_samples)]


def _difference(expected_V: Tensor, found_V: Tensor) -> float:
    """Returns the largest difference of two rows of logits, as a share of the largest logit."""
    off_V = torch.where(found_V == expected_V, 0.0, found_V - expected_V)
    largest = expected_V.masked_fill(expected_V.isinf(), 0.0).abs().max()
    share = (off_V.abs().max() / largest.clamp_min(1e-6)).item()
    return math.inf if math.isnan(share) else share


def _differences(
    base: BaseModel, decoder: Decoder, texts: list[np.ndarray], expected: list[Tensor]
) -> Iterator[float]:
    """Yields the difference of each pass's logits from `expected`, as a share of the largest logit.

    The first text runs alone for a token. Then two samples of a second, longer prompt join it and diverge,
    and one of them is removed early.
    """

    def difference(sequence: Sequence, found_V: Tensor) -> float:
        return _difference(expected[text_of[sequence]][sequence.length - 1], found_V)

    def decode(*sequences: Sequence) -> Iterator[float]:
        for sequence in sequences:
            sequence.append(int(texts[text_of[sequence]][sequence.length]), 0.0)
        for sequence, found_V in zip(sequences, decoder.decode(list(sequences)), strict=True):
            yield difference(sequence, found_V)

    (alone,), (one, other) = _start(base, texts[0][:3], 1), _start(base, texts[1][:6], 2)
    text_of = {alone: 0, one: 1, other: 2}
    yield difference(alone, decoder.prefill([[alone]])[0])
    yield from decode(alone)
    yield difference(one, decoder.prefill([[one, other]])[0])
    yield from decode(alone, one, other)
    decoder.remove(one)
    yield from decode(other, alone)
