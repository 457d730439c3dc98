"""Computes log-probabilities of given tokens and their gradients from hidden states, block by block.

With a vocabulary of 151,936 the logits of a batch are the largest tensor of a run, and the projection is
most of the work of a small model. So only one block of logits exists at a time, and everything that needs
it is computed while it is in the cache. With queries q = h and keys K = W:

    log p(y) = q . K_y - log sum_v exp(q . K_v)
    d log p(y) / d q = K_y - softmax(q K^T) K

The second line is attention over the vocabulary, so a running softmax gives both with two matrix products
and computes the logits only once. An adapter on the projection widens both sides: q = [h, s A h] and
K = [W, B]. A bias is one more column. For trained weights of the projection,
d K_v = sum_t g_t (1[y_t = v] - p_tv) q_t takes a third product, over the trained columns alone.

A position may have several targets (soft targets): then the softmax is computed once for all of them.

Shape suffixes: S scored positions, C positions of a chunk, J targets of a position, D hidden size,
V vocabulary, Q columns of queries and keys, K rows of a block of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cookbook.engine.model import kernels
from cookbook.engine.model.dropout import KeyedDropout
from cookbook.engine.model.packed_weights import PackedLinear

TokenLoss = Callable[[Tensor, slice], Tensor]
"""Maps the log-probabilities of some positions, [C] or [C, J], and the slice of those positions, to their
summed loss."""


@dataclass(frozen=True)
class BlockSizes:
    """The numbers of positions and of vocabulary tokens in a block of logits."""

    positions: int
    vocabulary: int
    kept_elements: int
    """The number of softmax terms kept at once for the gradient of trained weights of the projection."""

    @staticmethod
    def on(device: torch.device) -> BlockSizes:
        """Returns sizes for which a block stays in the cache on a CPU, and fills the device on CUDA."""
        if device.type == "cuda":
            return BlockSizes(positions=2048, vocabulary=32768, kept_elements=2**28)
        return BlockSizes(positions=1024, vocabulary=2048, kept_elements=2**26)


@dataclass(frozen=True)
class LoraOnHead:
    a_RD: Tensor
    b_VR: Tensor
    scaling: float
    dropout: KeyedDropout | None = None
    keys_S: Tensor | None = None
    """The keys of the scored positions for the dropout, in training."""

    def drop(self, values_CD: Tensor) -> Tensor:
        """Returns hidden states after the dropout, or a gradient before it."""
        if self.dropout is None or self.keys_S is None:
            return values_CD
        return self.dropout.drop(values_CD, self.keys_S)


@dataclass(frozen=True)
class TrainedRows:
    """Rows of the embeddings or of the projection that are trained in the place of those of the model."""

    indices: list[int]
    values_MD: Tensor
    place_V: Tensor
    """The place of each vocabulary entry in `values_MD`, or -1."""

    @staticmethod
    def table(indices: list[int], weight_VD: Tensor) -> Tensor:
        place_V = torch.full((len(weight_VD),), -1, device=weight_VD.device)
        place_V[indices] = torch.arange(len(indices), device=weight_VD.device)
        return place_V

    def put_into(self, weight_KD: Tensor, rows: slice | Tensor) -> Tensor:
        """Returns the given rows of the weight with the trained rows in their places."""
        if isinstance(rows, slice) and not any(rows.start <= index < rows.stop for index in self.indices):
            return weight_KD
        place_K = self.place_V[rows]
        trained_KD = self.values_MD.detach().to(weight_KD.dtype)[place_K.clamp(min=0)]
        return torch.where((place_K >= 0)[:, None], trained_KD, weight_KD)


@dataclass(frozen=True)
class Head:
    """logits = scale * (W h + bias + adapter), bounded to +-softcap if that is set."""

    weight_VD: Tensor
    blocks: BlockSizes
    bias_V: Tensor | None = None
    lora: LoraOnHead | None = None
    rows: TrainedRows | None = None
    scale: float = 1.0
    softcap: float | None = None
    packed: PackedLinear | None = None
    """The projection in another layout, while the model is sampled with it."""

    def at(self, part: slice) -> Head:
        """Returns the head for a part of the scored positions."""
        if self.lora is None or self.lora.keys_S is None:
            return self
        return replace(self, lora=replace(self.lora, keys_S=self.lora.keys_S[part]))

    def queries(self, hidden_CD: Tensor) -> Tensor:
        columns = [hidden_CD]
        if self.lora is not None:
            a_CR = self.lora.drop(hidden_CD) @ self.lora.a_RD.to(hidden_CD.dtype).T
            columns.append(a_CR * self.lora.scaling)
        if self.bias_V is not None:
            columns.append(torch.ones_like(hidden_CD[:, :1]))
        return (torch.cat(columns, dim=1) if len(columns) > 1 else hidden_CD) * self.scale

    def keys(self, rows: slice | Tensor) -> Tensor:
        weight_KD = self.weight_VD[rows]
        if self.rows is not None:
            weight_KD = self.rows.put_into(weight_KD, rows)
        columns = [weight_KD]
        if self.lora is not None:
            columns.append(self.lora.b_VR[rows].to(weight_KD.dtype))
        if self.bias_V is not None:
            columns.append(self.bias_V[rows, None])
        return torch.cat(columns, dim=1) if len(columns) > 1 else weight_KD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Returns the logits of a few positions: [S, V], fp32."""
        if self.packed is not None:
            logits_SV = self._packed_logits(self.packed, hidden_SD)
        else:
            logits_SV = product(hidden_SD, self.weight_VD.T)
            if self.rows is not None:
                values_MD = self.rows.values_MD.detach().to(hidden_SD.dtype)
                logits_SV[:, self.rows.indices] = product(hidden_SD, values_MD.T)
            if self.bias_V is not None:
                logits_SV += self.bias_V
            if self.lora is not None:
                a_SR = hidden_SD @ self.lora.a_RD.to(hidden_SD.dtype).T * self.lora.scaling
                logits_SV += product(a_SR, self.lora.b_VR.to(a_SR.dtype).T)
        if self.scale != 1:
            logits_SV *= self.scale
        if self.softcap is not None:
            logits_SV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_SV

    def _packed_logits(self, packed: PackedLinear, hidden_SD: Tensor) -> Tensor:
        logits_SV = packed(hidden_SD)
        if self.lora is None:
            return logits_SV
        return packed.add_lora(logits_SV, hidden_SD, self.lora.a_RD, self.lora.b_VR, self.lora.scaling)

    def trained_keys(self) -> list[tuple[slice, Tensor]]:
        """Returns the columns of the keys that are trained, each with its parameter: [V] or [V, columns]."""
        size = self.weight_VD.shape[1]
        trained = [(slice(0, size), self.weight_VD)]
        if self.lora is not None:
            rank = self.lora.b_VR.shape[1]
            trained.append((slice(size, size + rank), self.lora.b_VR))
            size += rank
        if self.bias_V is not None:
            trained.append((slice(size, size + 1), self.bias_V))
        return [(columns, parameter) for columns, parameter in trained if parameter.requires_grad]


class Scores(NamedTuple):
    """The scores of targets, computed without gradients."""

    logprobs_S: Tensor
    """fp32"""
    is_argmax_S: Tensor
    """bool: whether the target's logit exceeds the logits of all other entries of the vocabulary, including
    padding entries. A tie does not count; the comparison is exact, because both sides are from the same
    logits."""


def score(head: Head, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    """Returns log p(targets_S | hidden_SD): [S] or [S, J], the shape of the targets, fp32."""
    logprobs_S = torch.empty(targets_S.shape, device=hidden_SD.device)
    with torch.no_grad():
        for part in _chunks(len(targets_S), head.blocks.positions):
            logprobs_S[part] = _Logprobs(head.at(part), hidden_SD[part], targets_S[part]).logprobs_C
    return logprobs_S


@torch.no_grad()
def score_and_compare(head: Head, hidden_SD: Tensor, targets_S: Tensor) -> Scores:
    """Returns the log-probabilities, and whether each target is the most likely token.

    Besides the running maximum, a second one covers all tokens but the target.
    """
    parts = _chunks(len(targets_S), head.blocks.positions)
    logprobs_S = torch.empty(len(targets_S), device=hidden_SD.device)
    is_argmax_S = torch.empty(len(targets_S), dtype=torch.bool, device=hidden_SD.device)
    for part in parts:
        chunk = _Logprobs(head, hidden_SD[part], targets_S[part], compares=True)
        logprobs_S[part] = chunk.logprobs_C
        is_argmax_S[part] = chunk.is_argmax_C
    return Scores(logprobs_S, is_argmax_S)


@torch.no_grad()
def score_and_backpropagate(
    head: Head, hidden_SD: Tensor, targets_S: Tensor, token_loss: TokenLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities in the shape of the targets, [S] or [S, J], the summed loss, and its gradient
    by the hidden states [S, D].

    The gradient has the dtype of the hidden states, or fp32 for float16, in which it could vanish.
    The gradients of the head's trained parameters are summed in fp32 and added to their `.grad`. The loss has
    to be a sum over positions, in which each term depends on one position's log-probability.
    """
    num_positions, vocab_size, kept = head.blocks.positions, len(head.weight_VD), None
    if head.trained_keys():
        num_positions = max(1, min(num_positions, len(targets_S), head.blocks.kept_elements // vocab_size))
        kept = hidden_SD.new_empty(num_positions * vocab_size)
    logprobs_S = torch.empty(targets_S.shape, device=hidden_SD.device)
    is_narrow = hidden_SD.dtype == torch.float16
    grad_SD = torch.empty_like(hidden_SD, dtype=torch.float32 if is_narrow else hidden_SD.dtype)
    loss = torch.zeros((), device=hidden_SD.device)
    gradients = _Gradients()
    for part in _chunks(len(targets_S), num_positions):
        chunk = _Logprobs(head.at(part), hidden_SD[part], targets_S[part], with_gradient=True, kept=kept)
        with torch.enable_grad():
            logprobs_C = chunk.logprobs_C.requires_grad_()
            chunk_loss = token_loss(logprobs_C, part)
            (grad_C,) = torch.autograd.grad(chunk_loss, logprobs_C)
        logprobs_S[part] = logprobs_C.detach()
        grad_SD[part] = chunk.backward(grad_C, gradients)
        loss += chunk_loss.detach()
    gradients.add_to_parameters()
    return logprobs_S, loss, grad_SD


class _RunningSoftmax:
    """The softmax of rows of logits of which one block after another is seen: [C, 1] each, fp32."""

    def __init__(self, softcap: float | None, targets_CJ: Tensor, compares: bool) -> None:
        device = targets_CJ.device
        self._softcap, self._targets_CJ, self._compares = softcap, targets_CJ, compares
        self._has_kernel = not compares and kernels.is_used("softmax_block", device)
        self.highest_C1 = torch.full((len(targets_CJ), 1), -torch.inf, device=device)
        self.highest_other_C1 = self.highest_C1
        """The highest logit besides each target's. Valid only with `compares`."""
        self.total_C1 = torch.zeros(len(targets_CJ), 1, device=device)
        """The sum of exp(logit - highest)."""
        self.target_CJ = torch.zeros(targets_CJ.shape, device=device)
        """The logits of the targets that were seen."""

    def add(
        self, logits_CK: Tensor, first: int, dtype: torch.dtype | None, room_CK: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Adds the logits of the vocabulary from `first` on, which are overwritten.

        Returns the terms exp(logit - highest), times the derivative of the softcap, in `dtype`, or None
        without one; and by what all earlier terms have to be multiplied. Terms are in `room_CK` if that is
        given.
        """
        if self._has_kernel:
            terms_CK = room_CK
            if dtype is not None and room_CK is None:  # each row of terms begins where its logits do
                terms_CK = logits_CK.view(dtype)[:, : logits_CK.shape[1]]
            running = self._targets_CJ, self.target_CJ, self.highest_C1, self.total_C1
            return terms_CK, kernels.softmax_block(logits_CK, terms_CK, *running, first, self._softcap)
        softcap = self._softcap
        if softcap is not None:
            logits_CK.div_(softcap).tanh_().mul_(softcap)
        here_CJ = self._targets_CJ - first
        is_here_CJ = (here_CJ >= 0) & (here_CJ < logits_CK.shape[1])
        place_CJ = here_CJ.clamp(0, logits_CK.shape[1] - 1)
        found_CJ = logits_CK.gather(1, place_CJ)
        self.target_CJ = torch.where(is_here_CJ, found_CJ, self.target_CJ)
        if self._compares:
            logits_CK.scatter_(1, place_CJ, found_CJ.masked_fill(is_here_CJ, -torch.inf))
            others_C1 = logits_CK.amax(1, keepdim=True)
            logits_CK.scatter_(1, place_CJ, found_CJ)
            self.highest_other_C1 = torch.maximum(self.highest_other_C1, others_C1)
            highest_here_C1 = torch.maximum(others_C1, found_CJ)
        else:
            highest_here_C1 = logits_CK.amax(1, keepdim=True)
        higher_C1 = torch.maximum(self.highest_C1, highest_here_C1)
        shrink_C1 = (self.highest_C1 - higher_C1).exp_()
        self.highest_C1 = higher_C1
        slope_CK = None if softcap is None else 1 - (logits_CK / softcap).square_()
        terms_CK = logits_CK.sub_(higher_C1).exp_()
        self.total_C1.mul_(shrink_C1).add_(terms_CK.sum(1, keepdim=True))
        if dtype is None:
            return None, shrink_C1
        if slope_CK is not None:
            terms_CK.mul_(slope_CK)
        terms_CK = terms_CK.to(dtype)
        return terms_CK if room_CK is None else room_CK.copy_(terms_CK), shrink_C1


class _Logprobs:
    """The log-probabilities of some positions, computed over the vocabulary block by block."""

    def __init__(
        self,
        head: Head,
        hidden_CD: Tensor,
        targets_C: Tensor,
        with_gradient: bool = False,
        kept: Tensor | None = None,
        compares: bool = False,
    ) -> None:
        """`kept` is memory for the softmax terms of the whole vocabulary, which trained keys need.

        With `compares` the highest logit besides each target's is computed too.
        """
        self.head = head
        self.hidden_CD = hidden_CD
        self.targets_CJ = targets_C if targets_C.ndim == 2 else targets_C[:, None]
        self._has_one_target = targets_C.ndim == 1
        self.queries_CQ = head.queries(hidden_CD)
        self.with_gradient = with_gradient
        self.compares = compares
        self.kept = kept
        self.kept_blocks: list[tuple[slice, Tensor, Tensor]] = []
        self._run_over_the_vocabulary()

    def _run_over_the_vocabulary(self) -> None:
        queries_CQ = self.queries_CQ
        running = _RunningSoftmax(self.head.softcap, self.targets_CJ, self.compares)
        mean_CQ = torch.zeros(queries_CQ.shape, device=queries_CQ.device)
        num_positions, vocab_size = len(queries_CQ), len(self.head.weight_VD)
        block_size = self.head.blocks.vocabulary
        for first in range(0, vocab_size, block_size):
            rows = slice(first, min(first + block_size, vocab_size))
            keys_KQ = self.head.keys(rows)
            room_CK = None
            if self.kept is not None:
                room = self.kept[rows.start * num_positions : rows.stop * num_positions]
                room_CK = room.view(num_positions, -1)
            logits_CK = product(queries_CQ, keys_KQ.T, out=room_CK)
            dtype = keys_KQ.dtype if self.with_gradient else None
            terms_CK, shrink_C1 = running.add(logits_CK, first, dtype, room_CK)
            if terms_CK is None:
                continue
            _add_product(mean_CQ.mul_(shrink_C1), terms_CK, keys_KQ)
            if room_CK is not None:
                self.kept_blocks.append((rows, terms_CK, running.highest_C1.clone()))
        self.log_total_C1 = running.total_C1.log().add_(running.highest_C1)
        self.target_CJ = running.target_CJ
        logprobs_CJ = self.target_CJ - self.log_total_C1
        self.logprobs_C = logprobs_CJ[:, 0] if self._has_one_target else logprobs_CJ
        self.is_argmax_C = (self.target_CJ > running.highest_other_C1)[:, 0]
        """Whether each target's logit exceeds all others. Valid only with `compares`, and one target."""
        self.mean_CQ = mean_CQ.div_(running.total_C1)

    def backward(self, grad_C: Tensor, gradients: _Gradients) -> Tensor:
        """Returns the gradient by the hidden states [C, D], given the gradient by the log-probabilities.

        The gradients of the head's trained parameters are added to `gradients`.
        """
        head = self.head
        grad_CJ = grad_C[:, None] if self._has_one_target else grad_C
        grad_C1 = grad_CJ.sum(1, keepdim=True)
        slope_CJ = 1.0 if head.softcap is None else 1 - (self.target_CJ / head.softcap).square()
        sloped_CJ = grad_CJ * slope_CJ
        for columns, parameter in head.trained_keys():
            gradient = gradients.of(parameter)
            gradient = gradient if gradient.ndim == 2 else gradient[:, None]
            queries_CQ = self.queries_CQ[:, columns].float()
            for targets_C, sloped_C in zip(self.targets_CJ.T, sloped_CJ.T, strict=True):
                gradient.index_add_(0, targets_C, (queries_CQ * sloped_C[:, None]).to(gradient.dtype))
            for rows, terms_CK, highest_C1 in self.kept_blocks:
                weighted_CQ = queries_CQ * (grad_C1 * (highest_C1 - self.log_total_C1).exp())
                if terms_CK.dtype == torch.float16:  # its range may not hold the gradient of the loss
                    largest = weighted_CQ.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
                    summed_KQ = product(terms_CK.T, (weighted_CQ / -largest).half())
                    gradient[rows] += summed_KQ.mul_(largest)
                    continue
                _add_product(gradient[rows], terms_CK.T, -weighted_CQ.to(terms_CK.dtype))
        if head.rows is not None and head.rows.values_MD.requires_grad:
            self._backward_rows(head.rows, grad_CJ, gradients)
        if self.targets_CJ.shape[1] == 1:
            keys_CQ = head.keys(self.targets_CJ[:, 0])
            grad_CQ = (slope_CJ * keys_CQ).float().sub_(self.mean_CQ).mul_(grad_C1) * head.scale
        else:  # the sum over the targets of their keys, each with its gradient, one after another
            grad_CQ = self.mean_CQ * -grad_C1
            for targets_C, sloped_C in zip(self.targets_CJ.T, sloped_CJ.T, strict=True):
                grad_CQ.addcmul_(head.keys(targets_C).float(), sloped_C[:, None])
            grad_CQ *= head.scale
        size = self.hidden_CD.shape[1]
        if head.lora is None:
            return grad_CQ[:, :size]
        a_RD = head.lora.a_RD
        grad_CR = grad_CQ[:, size : size + a_RD.shape[0]] * head.lora.scaling
        if a_RD.requires_grad:
            gradients.of(a_RD).add_(grad_CR.T @ head.lora.drop(self.hidden_CD).to(grad_CR.dtype))
        if head.lora.keys_S is None:
            return torch.addmm(grad_CQ[:, :size], grad_CR, a_RD.to(grad_CR.dtype))
        return grad_CQ[:, :size] + head.lora.drop(grad_CR @ a_RD.to(grad_CR.dtype))

    def _backward_rows(self, rows: TrainedRows, grad_CJ: Tensor, gradients: _Gradients) -> None:
        """Adds the gradient of the trained rows to `gradients`, by the formula for trained weights."""
        head, columns = self.head, slice(0, rows.values_MD.shape[1])
        index_M = torch.tensor(rows.indices, device=self.queries_CQ.device)
        logits_CM = product(self.queries_CQ, head.keys(index_M).T)
        slope_CM: Tensor | float = 1.0
        if head.softcap is not None:
            logits_CM = (logits_CM / head.softcap).tanh() * head.softcap
            slope_CM = 1 - (logits_CM / head.softcap).square()
        of_targets_CM = torch.zeros_like(logits_CM)
        for targets_C, grad_C in zip(self.targets_CJ.T, grad_CJ.T, strict=True):
            of_targets_CM += (targets_C[:, None] == index_M) * grad_C[:, None]
        probabilities_CM = (logits_CM - self.log_total_C1).exp()
        coefficients_CM = (of_targets_CM - probabilities_CM * grad_CJ.sum(1, keepdim=True)) * slope_CM
        gradient_MD = coefficients_CM.T @ self.queries_CQ[:, columns].float()
        gradients.of(rows.values_MD).add_(gradient_MD)


@torch.no_grad()
def score_top(head: Head, hidden_SD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` most likely tokens at each position and their log-probabilities, the highest first.

    The first are int64 [S, count], the second fp32. Of equal logits the lower token id comes first.
    """
    tokens, logprobs = [], []
    for part in _chunks(len(hidden_SD), head.blocks.positions):
        queries_CQ = head.at(part).queries(hidden_SD[part])
        best_CJ = torch.full((len(queries_CQ), 0), -torch.inf, device=hidden_SD.device)
        found_CJ = torch.zeros((len(queries_CQ), 0), dtype=torch.int64, device=hidden_SD.device)
        log_total_C = torch.full((len(queries_CQ),), -torch.inf, device=hidden_SD.device)
        for first in range(0, len(head.weight_VD), head.blocks.vocabulary):
            rows = slice(first, min(first + head.blocks.vocabulary, len(head.weight_VD)))
            logits_CK = product(queries_CQ, head.keys(rows).T)
            if head.softcap is not None:
                logits_CK.div_(head.softcap).tanh_().mul_(head.softcap)
            log_total_C = torch.logaddexp(log_total_C, logits_CK.logsumexp(1))
            here_CJ, place_CJ = top(logits_CK, count)
            best_CJ, found_CJ = torch.cat([best_CJ, here_CJ], 1), torch.cat([found_CJ, place_CJ + first], 1)
            best_CJ, place_CJ = top(best_CJ, count)
            found_CJ = found_CJ.gather(1, place_CJ)
        tokens.append(found_CJ)
        logprobs.append(best_CJ - log_total_C[:, None])
    return torch.cat(tokens), torch.cat(logprobs)


def top(values_CK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the highest values of each row and their places. Of equal ones the first comes first."""
    best_CJ, place_CJ = values_CK.topk(min(count, values_CK.shape[1]), dim=1)
    place_CJ, order_CJ = place_CJ.sort(dim=1)
    best_CJ, order_CJ = best_CJ.gather(1, order_CJ).sort(dim=1, descending=True, stable=True)
    return best_CJ, place_CJ.gather(1, order_CJ)


def _chunks(length: int, at_most: int) -> list[slice]:
    """Returns consecutive slices of at most `at_most` positions, whose sizes differ by at most one."""
    num_chunks = -(-length // at_most)
    return [slice(i * length // num_chunks, (i + 1) * length // num_chunks) for i in range(num_chunks)]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns a @ b in fp32. On CUDA half-precision products keep their fp32 accumulator.

    The result is written to `out` if `out` is fp32 and no conversion is needed.
    """
    if out is not None and out.dtype == a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a @ b in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))


class _Gradients:
    """Sums of the gradients of parameters in fp32, also for parameters in half precision.

    A sum of 1,000 terms in bfloat16 loses almost half of its value: each term is rounded away against it.
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """Returns the sum to add to. It is the parameter's `.grad` if that is in fp32 already."""
        if parameter.grad is not None and parameter.grad.dtype == torch.float32:
            return parameter.grad
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        return self._sums[parameter]

    def add_to_parameters(self) -> None:
        """Adds the sums to the `.grad` of their parameters, in the dtype that these accept there."""
        for parameter, total in self._sums.items():
            if parameter.grad is None:
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # torch 2.10 and newer
                parameter.grad = total.to(dtype)
            else:
                parameter.grad.add_(total)
        self._sums.clear()
