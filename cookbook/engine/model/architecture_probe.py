"""Tries a model when it is loaded: which ways of running its sequences give its own results.

Shape suffixes: N tokens of a packed row, P scored positions of its sequences, S hidden states with targets
that are scored (`packing`), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.engine.model import architecture, attention, backward_trial, rounding_noise
from cookbook.engine.model.architecture import LogitScaling
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.model.passes import ModelPasses
from cookbook.engine.model.prefix_tree import MIN_SHARED_TOKENS, families
from cookbook.errors import ModelError

logger = logging.getLogger(__name__)

_FAILURES = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)
"""What a model raises in a trial that does not fit it."""
_TOLERANCE_FP32, _TOLERANCE_16_BIT = 1e-4, 0.05
"""The largest relative difference of log-probabilities."""
_GRADIENT_TOLERANCE_16_BIT = 0.5
"""The same of gradients. Where a router chooses another expert for a token, they move by a third."""


@torch.no_grad()
def probe(base: ModelPasses) -> None:
    """Sets `has_plain_head`, `is_packed` and `is_padded`, and selects the attention accordingly.

    A config does not describe an architecture completely (sinks, recurrent layers, scaled logits). So two
    short sequences are run, with windows that are shorter, and each optimisation is used only if the results
    equal those of the model itself. Sequences are packed, or else padded, or else run one at a time.
    """
    generator = torch.Generator().manual_seed(0)
    sequences: list[TokenSequence] = []
    for length in (13, 6):
        ids_T = torch.randint(base.vocab_size, (length,), generator=generator).numpy()
        if sequences:  # they share a beginning
            ids_T[:3] = sequences[0].tokens_T[:3]
        sequences.append(TokenSequence(ids_T, ids_T, np.ones(length, np.float32), {}))
    alone = [pack([sequence], base.device, trained_only=False) for sequence in sequences]
    base.is_packed = base.is_padded = False
    with contextlib.ExitStack() as spans:
        spans.enter_context(architecture.short_spans(base.decoder, base.model.config.get_text_config()))
        try:
            expected = [base.logprobs_of_whole_model(batch) for batch in alone]
        except _FAILURES as error:
            logger.debug("%s is tried with its own windows (%s).", base.name, error)
            base.discard_pass()
            spans.close()
            expected = _logprobs_of_text_alone(base, alone)
        _check_causal(base, sequences[0], expected[0])
        _choose_passes(base, sequences, alone, torch.cat(expected), _gradients_alone(base, alone))


def _logprobs_of_text_alone(base: ModelPasses, alone: list[PackedBatch]) -> list[Tensor]:
    """Raises ModelError for a model that needs more than text, such as a picture."""
    try:
        return [base.logprobs_of_whole_model(batch) for batch in alone]
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{base.name} ({type(base.model).__name__}) does not run on text alone: {error}\n"
            f"Training and sampling give a model nothing but text. Choose a model that chats without "
            f"pictures or sound."
        ) from error


def _choose_passes(
    base: ModelPasses,
    sequences: list[TokenSequence],
    alone: list[PackedBatch],
    expected_S: Tensor,
    gradients: list[Tensor],
) -> None:
    """Does what `probe` says, given the results of the sequences run alone: their log-probabilities, and the
    gradients of the embeddings, or none if there is no backward pass."""
    own_attention = base.model.config._attn_implementation
    noise = functools.cache(lambda: _rounding_noise(base, alone, expected_S, own_attention))

    def why_not(compute: Callable[[], Tensor]) -> str | None:
        try:
            found_S = compute()
        except _FAILURES as error:
            base.discard_pass()
            logger.debug("%s failed in a trial (%s: %s).", base.name, type(error).__name__, error)
            return str(error) if isinstance(error, ValueError) else "it fails in a trial"
        difference = _difference(base, found_S, expected_S)
        if difference <= _TOLERANCE_FP32 or (base.dtype != torch.float32 and difference <= noise()):
            return None
        return f"its log-probabilities would move by {difference:.2%}"

    base.has_plain_head = True
    reason = why_not(lambda: _logprobs_of_plain_head(base, alone))
    if reason is not None:
        base.has_plain_head = False
        logger.info("%s computes all its logits: they are more than a projection (%s).", base.name, reason)
    base.is_packed = True
    base.recurrent.passes_borders = bool(base.recurrent.mixers)
    if base.has_plain_head:
        reason = why_not(lambda: _packed_logprobs(base, sequences, gradients))
    if reason is not None and base.recurrent.passes_borders:  # no kernels that keep sequences apart
        base.recurrent.passes_borders = False
        logger.debug("%s splits rows at the borders of sequences (%s).", base.name, reason)
        reason = why_not(lambda: _packed_logprobs(base, sequences, gradients))
    if reason is None:
        _choose_sharing(base, lambda: why_not(lambda: _logprobs_of_tree(base, sequences, gradients)))
        return
    base.is_padded = True
    base.model.set_attn_implementation(own_attention)
    logger.debug("%s runs padded sequences: it cannot be packed (%s).", base.name, reason)
    cannot_share = reason
    reason = why_not(lambda: _padded_logprobs(base, sequences, gradients))
    if reason is not None:
        base.is_packed = base.is_padded = False
        logger.info("%s runs one sequence at a time: it cannot be packed (%s).", base.name, reason)
    else:
        logger.info("%s computes what sequences share for each of them (%s).", base.name, cannot_share)
    warn_if_slow(base.name, base.device, base.is_padded, cannot_share)


def _rounding_noise(
    base: ModelPasses, alone: list[PackedBatch], expected_S: Tensor, own_attention: str
) -> float:
    """Returns the difference that rounding explains in 16 bits."""
    with _one_at_a_time(base, own_attention):
        return rounding_noise.tolerance_in_16_bits(
            _TOLERANCE_16_BIT,
            base.model.get_input_embeddings(),
            lambda: _difference(
                base, torch.cat([base.logprobs_of_whole_model(batch) for batch in alone]), expected_S
            ),
        )


def _choose_sharing(base: ModelPasses, why_not_shared: Callable[[], str | None]) -> None:
    """Sets whether packed sequences compute what they share once, given why its trial fails, or None."""
    reason = why_not_shared()
    if reason is not None and base.recurrent.mixers:
        base.recurrent.hands_states_on = False
        logger.debug("%s runs recurrent layers over whole sequences (%s).", base.name, reason)
        reason = why_not_shared()
    base.min_shared_tokens = MIN_SHARED_TOKENS if reason is None else None
    if reason is not None:
        logger.info("%s computes what sequences share for each of them (%s).", base.name, reason)


def _difference(base: ModelPasses, found_S: Tensor, expected_S: Tensor) -> float:
    """Returns the largest relative difference of a log-probability, or in 16 bits that of all together.

    There a few tokens may differ by much, for which a router chooses another expert.
    """
    if base.dtype == torch.float32:
        return float(((found_S - expected_S).abs() / expected_S.abs()).max())
    return backward_trial.relative_difference(found_S, expected_S)


@contextlib.contextmanager
def _one_at_a_time(base: ModelPasses, own_attention: str) -> Iterator[None]:
    """Lets the model run as it is in the body of a trial of another way."""
    before = base.is_packed, base.is_padded, base.model.config._attn_implementation
    base.is_packed = base.is_padded = False
    base.model.set_attn_implementation(own_attention)
    try:
        yield
    finally:
        base.is_packed, base.is_padded, attention_of_trial = before
        base.model.set_attn_implementation(attention_of_trial)


def _check_causal(base: ModelPasses, sequence: TokenSequence, expected_S: Tensor) -> None:
    """Raises ModelError if a token's log-probability changes with a later token, as in prefix models."""
    changed_T = sequence.tokens_T.copy()
    changed_T[-1] = (changed_T[-1] + 1) % base.vocab_size
    changed = pack([replace(sequence, tokens_T=changed_T)], base.device, trained_only=False)
    before_S, after_S = expected_S[:-1], base.logprobs_of_whole_model(changed)[:-1]
    difference = ((after_S - before_S).abs() / before_S.abs()).max().item()
    if difference > (1e-3 if base.dtype == torch.float32 else 0.05):
        raise ModelError(
            f"{base.name} ({type(base.model).__name__}) attends to later tokens: log-probabilities move "
            f"by {difference:.1%} when a later token is changed. In training it would read the tokens "
            f"that it has to predict. Choose a causal language model."
        )


def _logprobs_of_plain_head(base: ModelPasses, alone: list[PackedBatch]) -> Tensor:
    """Returns the log-probabilities from blocks of logits, after setting how logits are scaled."""
    base.logit_scaling = LogitScaling()
    hidden_ND = base.hidden_of(alone[0].tokens_1N, alone[0].positions_1N, alone[0].attention)
    projection_SV = base.head().logits(hidden_ND.index_select(0, alone[0].scored_S))
    logits_SV = base.logits_of_whole_model(alone[0]).float()
    config = base.model.config.get_text_config()
    scaling = architecture.logit_scaling(config, projection_SV, logits_SV, base.dtype)
    if scaling is None:
        raise ValueError("its logits are no multiple of its projection")
    base.logit_scaling = scaling
    return torch.cat([base.logprobs(batch) for batch in alone])


def _gradients_alone(base: ModelPasses, alone: list[PackedBatch]) -> list[Tensor]:
    """Returns the gradients of the embeddings, one sequence at a time through the model's own logits.

    There are none without a backward pass, which sampling does not need, and none are computed for a
    sharded model, whose processes would have to agree on a failure.
    """
    if base.is_sharded:
        return []
    try:
        return [_gradient(base, batch) for batch in alone]
    except _FAILURES as error:
        logger.warning(
            "%s cannot be trained here: its backward pass fails in a trial (%s: %s).",
            base.name,
            type(error).__name__,
            error,
        )
        return []


def _gradient(base: ModelPasses, batch: PackedBatch) -> Tensor:
    return backward_trial.gradient_of_embeddings(
        base.model.get_input_embeddings(),
        lambda: base.backpropagate(batch, lambda logprobs_C, part: -logprobs_C.sum(), False),
    )


def _check_backward(base: ModelPasses, batch: PackedBatch, gradients: list[Tensor]) -> None:
    """Raises ValueError, after a warning, if the backward pass of sequences together fails, or has other
    gradients than one sequence at a time."""
    if not gradients:
        return
    reason = None
    try:
        found_ND = _gradient(base, batch)
    except _FAILURES as error:
        reason = f"its backward pass fails: {type(error).__name__}: {error}"
    else:
        ranges = batch.layout.segments
        # What sequences share has the sum of their gradients, and in float16 each pass has its own scale.
        if batch.shared is None and base.dtype != torch.float16:
            found = torch.cat([found_ND[start:stop] for start, stop in ranges])
            difference = backward_trial.relative_difference(found, torch.cat(gradients))
            if difference > (1e-3 if base.dtype == torch.float32 else _GRADIENT_TOLERANCE_16_BIT):
                reason = f"its gradients would move by {difference:.2%}"
    if reason is not None:
        how = "as a padded batch" if base.is_padded else "in one row"
        logger.warning("%s falls back to a slower way: %s with sequences %s.", base.name, reason, how)
        raise ValueError(reason)


def _packed_logprobs(base: ModelPasses, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
    """Returns the log-probabilities of `sequences` in one row. Raises ValueError if packing is unsafe."""
    base.model.set_attn_implementation(attention.NAME)
    batch = pack(sequences, base.device, trained_only=False)
    windows: list[int | None] = []
    found_S = base.logprobs(replace(batch, attention=replace(batch.attention, windows_seen=windows)))
    num_recurrent = base.recurrent.num_calls
    reason = architecture.why_not_packed(base.model.config.get_text_config(), windows, num_recurrent)
    if reason is not None:
        raise ValueError(reason)
    _check_apart(base, batch)
    _check_backward(base, batch, gradients)
    return found_S


def _padded_logprobs(base: ModelPasses, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
    """Returns the log-probabilities of `sequences` as a batch. Raises ValueError if padding is unsafe."""
    batch = pack(sequences, base.device, trained_only=False, is_padded=True)
    found_S = base.logprobs(batch)
    _check_apart(base, batch)
    _check_backward(base, batch, gradients)
    return found_S


def _check_apart(base: ModelPasses, batch: PackedBatch) -> None:
    """Raises ValueError if the first sequence of a row changes others.

    A small leak could go unnoticed, so the first one is set to nan, which would spread.
    """
    (start, stop), *_ = batch.layout.segments

    def set_nan(module: nn.Module, inputs: Any, embeddings_BTD: Tensor) -> Tensor:
        with_nan_BTD = embeddings_BTD.clone()
        with_nan_BTD[0, start:stop] = torch.nan
        return with_nan_BTD

    hook = base.model.get_input_embeddings().register_forward_hook(set_nan)
    try:
        if base.logprobs(batch)[stop:].isnan().any():
            raise ValueError("information may leak from one sequence into another")
    finally:
        hook.remove()


def _logprobs_of_tree(base: ModelPasses, sequences: list[TokenSequence], gradients: list[Tensor]) -> Tensor:
    """Returns the log-probabilities of `sequences` in one row that has what they share once.

    Recurrent layers that run whole sequences learn in a first pass which projections they share, so the
    second one counts.
    """
    (family,) = families([sequence.tokens_T for sequence in sequences], min_shared=1)
    batch = pack([sequences[index] for index in family.indices], base.device, False, [family])
    for _ in range(2 if base.recurrent.runs_paths else 1):
        logprobs_P = base.logprobs(batch).cpu().numpy()
    _check_backward(base, batch, gradients)
    found = dict(zip(family.indices, batch.layout.split(logprobs_P), strict=True))
    return torch.from_numpy(np.concatenate([found[0], found[1]])).to(base.device)


def warn_if_slow(name: str, device: torch.device, is_padded: bool, reason: str) -> None:
    """Warns about a model on CUDA whose sequences do not share rows, for this reason."""
    if device.type != "cuda":
        return
    how = "in batches that are padded to the longest" if is_padded else "one at a time"
    logger.warning(
        "%s cannot be packed on %s (%s). Its sequences run %s, which is slower.", name, device, reason, how
    )
