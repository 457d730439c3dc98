"""The decoder that runs all sequences in one packed row, and reuses what prompts share with earlier ones.

Shape suffixes: G groups, R sequences, N tokens of a packed row, T tokens of one sequence, S scored positions,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model import unembedding
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import copy_to
from cookbook.engine.model.tree_attention import TreeLayout
from cookbook.engine.sampling import decode_graphs
from cookbook.engine.sampling.beginnings import min_continued, plan_beginnings
from cookbook.engine.sampling.decoders import Decoder, needs_prompt_logprobs
from cookbook.engine.sampling.kv_cache import KVCache
from cookbook.engine.sampling.prefill_row import PrefillRow, plan_row
from cookbook.engine.sampling.prompt_tree import KnownPart, TextEnd
from cookbook.engine.sampling.sequence import CachedText, Sequence


class PackedDecoder(Decoder):
    """Runs all sequences in one packed row, over this project's KV cache."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base)
        self._cache = KVCache()
        self._using_weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._row_multiple = base.row_multiple
        if base.packed_weights is not None and base.packed_weights.are_current():
            self._using_weights = base.packed_weights.in_use
            self._row_multiple = base.packed_weights.row_multiple
        self._graphs = decode_graphs.graphs_of(base)
        self.min_shared = base.min_shared_tokens if base.reuses_prompts else None
        """The shortest beginning that is reused, or None if none is."""
        self._has_states = bool(base.recurrent.mixers)

    @property
    def _min_shared_in_row(self) -> int | None:
        """The shortest beginning that texts share in a row. States are handed on between passes instead."""
        return None if self._has_states else self.min_shared

    def prefill(self, groups: list[list[Sequence]]) -> Tensor:
        with self._using_weights():
            return self._prefill(groups)

    def _prefill(self, groups: list[list[Sequence]]) -> Tensor:
        same: dict[bytes, _PromptText] = {}
        prompts: list[_PromptText] = []
        for group in groups:
            text_T = group[0].text_T
            prompts.append(same.setdefault(text_T.tobytes(), _PromptText(text_T)))
            prompts[-1].groups.append(group)
        distinct = list(same.values())
        if self._has_states:
            self._compute_beginnings(distinct)
        for prompt in distinct:
            prompt.known = self._known_of(prompt.text_T, prompt.needs_logprobs, len(distinct))
            if prompt.known and self.prompts is not None:
                self.prompts.use(prompt.known)
        logits: dict[_PromptText, Tensor] = {}
        for prompt in distinct:
            if prompt.is_known and (end := prompt.known[-1][0].end) and end.logits_V is not None:
                self._cache.place(prompt.sequences, prompt.known)
                logits[prompt], prompt.num_reused = end.logits_V, len(prompt.text_T)
        if computed := [prompt for prompt in distinct if prompt not in logits]:
            computed_RV = self._compute(computed)
            logits |= dict(zip(computed, computed_RV, strict=True))
        for prompt in distinct:
            prompt.note_hits()
        return computed_RV if computed == prompts else torch.stack([logits[prompt] for prompt in prompts])

    def _compute(self, prompts: list[_PromptText]) -> Tensor:
        """Runs the model over what is not known of prompts. Returns the logits after them: [R, V] fp32."""
        device = self._base.device
        sequences, texts = [each.sequences for each in prompts], [each.text_T for each in prompts]
        known = [each.known for each in prompts]
        row, hidden_ND, is_finite_N = self._run_row(sequences, texts, known, self._min_shared_in_row)
        if self._min_shared_in_row is not None and not is_finite_N.all():
            # A token that leads to nan also spoils the tokens before it: attention multiplies it by 0.
            for sequence in (sequence for group in sequences for sequence in group):
                self._cache.remove(sequence)
            row, hidden_ND, is_finite_N = self._run_row(sequences, texts, known, None)
        head = self._base.head()  # after the pass, which gathers the head's weights if they are sharded
        last_R = [path[-1][1] - row.num_known - 1 for path in row.paths]
        last_R += [0] * (-len(prompts) % self._row_multiple)
        logits_RV = head.logits(hidden_ND[copy_to(device, np.array(last_R))])[: len(prompts)]
        for number, prompt in enumerate(prompts):
            places_T = row.places(number)
            if prompt.needs_logprobs:
                targets_S = torch.from_numpy(prompt.text_T[1:]).to(device)
                hidden_SD = hidden_ND[torch.from_numpy(places_T[:-1]).to(device)]
                prompt.note_logprobs(unembedding.score(head, hidden_SD, targets_S))
            prompt.num_reused = row.num_reused[number]
            if is_finite_N[places_T].all():
                self._keep(prompt.sequences[0], prompt.text_T, logits_RV[number])
        return logits_RV

    def _compute_beginnings(self, prompts: list[_PromptText]) -> None:
        """Computes the beginnings of prompts whose states are to be kept."""
        prompts = [prompt for prompt in prompts if not prompt.needs_logprobs]
        if self.prompts is None or self.min_shared is None or not prompts:
            return
        texts = [prompt.text_T for prompt in prompts]
        known = [_num_tokens(self.prompts.find_end(text_T)) for text_T in texts]
        seen = [_num_tokens(self.prompts.find(text_T)) for text_T in texts]
        passes = plan_beginnings(texts, known, seen, self.min_shared)
        if not self.prompts.has_room([each.tokens_T for beginnings in passes for each in beginnings]):
            return
        for beginnings in passes:
            parts = [each.tokens_T for each in beginnings]
            cached = [CachedText(length=len(part_T)) for part_T in parts]
            known_parts = [self._known_of(part_T, False, len(parts)) for part_T in parts]
            row, _, is_finite_N = self._run_row([[each] for each in cached], parts, known_parts, None)
            for number, (beginning, part_T) in enumerate(zip(beginnings, parts, strict=True)):
                if is_finite_N[row.places(number)].all():
                    self._keep(cached[number], part_T)
                self._cache.remove(cached[number])
                for index in beginning.texts:
                    reusable = known[index] if index == beginning.texts[0] else len(part_T)
                    prompts[index].reusable = max(prompts[index].reusable or 0, reusable)

    def _run_row(
        self,
        groups: SequenceOf[SequenceOf[CachedText]],
        texts: list[np.ndarray],
        known: list[list[KnownPart]],
        min_shared: int | None,
    ) -> tuple[PrefillRow, Tensor, np.ndarray]:
        """Runs a prefill. Returns its row, the hidden states [N, D], and which of them are finite [N]."""
        row = plan_row(texts, known, min_shared)
        tokens_2N, layout = self._as_tensors(row)
        ends = [path[-1][0].end if path else None for path in known]
        states = [None if end is None else end.states for end in ends]
        self._cache.begin_prefill(groups, row.paths, row.known, states)
        hidden_ND = self._base.hidden_of(tokens_2N[:1], tokens_2N[1:], layout)[: len(row.tokens_N)]
        return row, hidden_ND, hidden_ND.isfinite().all(-1).cpu().numpy()

    def _as_tensors(self, row: PrefillRow) -> tuple[Tensor, AttentionLayout]:
        """Returns the tokens and positions of a row with its padding, [2, N], and the layout of its pass."""
        device, padding = self._base.device, -len(row.tokens_N) % self._row_multiple
        inputs_2N = np.zeros((2, len(row.tokens_N) + padding), np.int64)
        inputs_2N[:, : len(row.tokens_N)] = row.tokens_N, row.positions_N
        segments, ancestors, lengths = row.segments, row.ancestors, row.lengths
        if padding:
            inputs_2N[1, -padding:] = np.arange(padding)
            segments = [*segments, (len(row.tokens_N), inputs_2N.shape[1])]
            ancestors, lengths = [*ancestors, []], [*lengths, padding]
        tree = None
        if row.has_shared:
            own = [(start + row.num_known, stop + row.num_known) for start, stop in segments]
            ranges = [each for path, segment in zip(ancestors, own, strict=True) for each in (*path, segment)]
            rows_P = np.concatenate([np.arange(start, stop) for start, stop in ranges])
            path_starts = np.array([0, *np.cumsum(lengths)], np.int32)
            tensors = copy_to(device, rows_P), copy_to(device, path_starts)
            tree = TreeLayout(segments, ancestors, lengths, *tensors, num_cached=row.num_known)
        starts = np.array([0, *(stop for _, stop in segments)], np.int32)
        longest = max(stop - start for start, stop in segments)
        layout = AttentionLayout(segments, copy_to(device, starts), longest, cache=self._cache, tree=tree)
        return copy_to(device, inputs_2N), layout

    def num_known(self, sequence: Sequence) -> int:
        return _num_tokens(self._known_of(sequence.text_T, needs_prompt_logprobs([sequence])))

    def _known_of(self, text_T: np.ndarray, needs_logprobs: bool, num_texts: int = 1) -> list[KnownPart]:
        """Returns the beginning of a text that is not to be computed with so many texts.

        It is all of the text only for models with states, with which the logits after it are kept.
        """
        if self.prompts is None or self.min_shared is None or needs_logprobs:
            return []  # the log-probabilities of a prompt need its hidden states
        if not self._has_states:
            path = self.prompts.find(text_T[:-1])
            return path if _num_tokens(path) >= self.min_shared else []
        path = self.prompts.find_end(text_T)
        num_known = _num_tokens(path)
        is_worth_it = num_known == len(text_T) or num_known >= min_continued(self.min_shared, num_texts)
        return path if is_worth_it else []

    def _keep(self, sequence: CachedText, text_T: np.ndarray, logits_V: Tensor | None = None) -> None:
        """Keeps a text that was computed, for later ones that begin with it."""
        if self.prompts is not None and self.min_shared is not None and len(text_T) >= self.min_shared:
            end = None
            if self._has_states:
                end = TextEnd(self._cache.states_of(sequence), None if logits_V is None else logits_V.clone())
            self.prompts.add(text_T, *self._cache.of(sequence), end)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        order = self._cache.begin_decode(sequences)
        num_rows, num_tokens = len(order), len(order) + -len(order) % self._row_multiple
        if self._graphs is not None:
            num_tokens = decode_graphs.num_rows(len(order), self._row_multiple)
        token_N, position_N, place_N = inputs_3N = np.zeros((3, num_tokens), np.int64)
        token_N[:num_rows] = [sequences[index].tokens[-1] for index in order]
        position_N[:num_rows] = [sequences[index].length - 1 for index in order]
        place_N[order] = np.arange(num_rows)
        inputs = copy_to(self._base.device, inputs_3N)
        segments = [(place, place + 1) for place in range(num_tokens)]
        starts = torch.empty(0, dtype=torch.int32)  # only the cache reads this layout
        layout = AttentionLayout(segments, starts, longest=1, cache=self._cache)
        with self._using_weights():
            if self._graphs is not None:
                hidden_ND = self._graphs.hidden_of(inputs[:2], layout)
            else:
                hidden_ND = self._base.hidden_of(inputs[:1], inputs[1:2], layout)
            return self._base.head().logits(hidden_ND[inputs[2]])[:num_rows]

    def remove(self, sequence: Sequence) -> None:
        if sequence.stop_reason is not None:  # the next prompt of a conversation begins with it
            self._keep(sequence, sequence.text_T[:-1])
        self._cache.remove(sequence)

    def cache_bytes(self) -> tuple[int, int]:
        return self._cache.bytes_held()


@dataclass(eq=False)
class _PromptText:
    """A text, and the groups of sequences that have it."""

    text_T: np.ndarray
    groups: list[list[Sequence]] = field(default_factory=list)
    known: list[KnownPart] = field(default_factory=list)
    """The part of the tree with its beginning."""
    num_reused: int = 0
    """How many of its tokens the last pass did not compute."""
    reusable: int | None = None
    """How many of its tokens at most were computed before or for others, if passes before the last one
    computed some for it."""

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.groups for sequence in group]

    @property
    def needs_logprobs(self) -> bool:
        return any(map(needs_prompt_logprobs, self.groups))

    @property
    def is_known(self) -> bool:
        return _num_tokens(self.known) == len(self.text_T)

    def note_logprobs(self, logprobs_S: Tensor) -> None:
        """Sets the log-probabilities of all tokens but the first, [T - 1], where they are requested."""
        for group in filter(needs_prompt_logprobs, self.groups):
            group[0].request.prompt_logprobs = [None, *logprobs_S.tolist()]

    def note_hits(self) -> None:
        """Sets how many tokens of each request's prompt were not computed for it."""
        num_hits = self.num_reused if self.reusable is None else min(self.num_reused, self.reusable)
        for group in self.groups:
            request = group[0].request
            if request.prompt_cache_hit_tokens is None:
                request.prompt_cache_hit_tokens = min(num_hits, len(request.prompt_T))
            num_hits = len(self.text_T)


def _num_tokens(path: list[KnownPart]) -> int:
    return sum(length for _, length in path)
