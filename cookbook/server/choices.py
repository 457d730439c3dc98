"""The choices of a reply in OpenAI's form, whole or as pieces while they are sampled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cookbook.server.text_streams import StopCutter, TextStream
from cookbook.types import SampledSequence
from renderers import Message, Renderer

Piece = dict[str, Any]
"""An entry of `choices` in a chunk of a stream."""
Scored = tuple[int, float, Sequence[tuple[int, float]]]
"""A token, its log-probability, and the most likely tokens in its place with theirs."""


class ReplyChoice(Protocol):
    """One of the replies to a request."""

    def feed(self, token: int, logprob: float) -> list[Piece]:
        """Returns the pieces that a token adds."""

    def end(self, sequence: SampledSequence) -> list[Piece]:
        """Returns the last pieces, after all tokens were fed."""

    def whole(self, sequence: SampledSequence) -> Piece:
        """Returns the complete choice."""


class ChatChoice:
    """A message of the assistant."""

    def __init__(
        self, index: int, renderer: Renderer, stop: Sequence[str], with_logprobs: bool, num_top: int
    ) -> None:
        self._index = index
        self._renderer = renderer
        self._parser = renderer.parse_stream()
        self._shown = {"content": "", "reasoning_content": ""}
        self._cutters = {name: StopCutter(stop) for name in self._shown}
        self._stop = stop
        self._with_logprobs = with_logprobs
        self._is_scored_at_end = num_top > 0  # the most likely tokens are known with the result
        self._scores: list[Piece] = []
        self._ends = {one for one in renderer.get_stop_sequences() if isinstance(one, int)}

    def feed(self, token: int, logprob: float) -> list[Piece]:
        if self._with_logprobs and not self._is_scored_at_end and token not in self._ends:
            self._scores.append(_score(self._renderer.tokenizer, token, logprob))
        pieces = []
        for field, text in self._parser.feed([token]):
            self._shown[field] += text
            pieces += self._piece(field, self._cutters[field].feed(text))
        return pieces

    def end(self, sequence: SampledSequence) -> list[Piece]:
        message, _ = self._parser.finish()
        pieces = []
        for field, cutter in self._cutters.items():
            text = str(message.get(field) or "")
            rest = text[len(self._shown[field]) :] if text.startswith(self._shown[field]) else ""
            pieces += self._piece(field, cutter.feed(rest) + cutter.finish())
        calls = _calls(message)
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            pieces.append(self._delta({"tool_calls": numbered}))
        if self._with_logprobs and self._is_scored_at_end:
            self._scores = self._all_scores(sequence)
        last = self._delta({})
        last["finish_reason"] = _finish_reason(sequence, bool(calls))
        return [*pieces, last]

    def whole(self, sequence: SampledSequence) -> Piece:
        message, _ = self._renderer.parse_response(sequence.tokens)
        reply: dict[str, Any] = {"role": "assistant", "content": _cut(message.get("content"), self._stop)}
        if thinking := message.get("reasoning_content"):
            reply["reasoning_content"] = _cut(thinking, self._stop)
        calls = _calls(message)
        if calls:
            reply["tool_calls"] = calls
            reply["content"] = reply["content"] or None
        choice: Piece = {"index": self._index, "message": reply, "logprobs": None}
        choice["finish_reason"] = _finish_reason(sequence, bool(calls))
        if self._with_logprobs:
            choice["logprobs"] = {"content": self._all_scores(sequence), "refusal": None}
        return choice

    def _all_scores(self, sequence: SampledSequence) -> list[Piece]:
        return [
            _score(self._renderer.tokenizer, *scored)
            for scored in _scored(sequence)
            if scored[0] not in self._ends
        ]

    def _piece(self, field: str, text: str) -> list[Piece]:
        return [self._delta({field: text})] if text else []

    def _delta(self, delta: Mapping[str, Any]) -> Piece:
        piece: Piece = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self._scores:
            piece["logprobs"] = {"content": self._scores, "refusal": None}
            self._scores = []
        return piece


class TextChoice:
    """A text that continues a prompt."""

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        ends: Sequence[int],
        stop: Sequence[str],
        with_logprobs: bool,
        num_top: int,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._ends = set(ends)
        self._stop = stop
        self._cutter = StopCutter(stop)
        self._text = TextStream(self._decode)
        self._with_logprobs = with_logprobs
        self._is_scored_at_end = num_top > 0
        self._scores: list[Scored] = []
        self._offset = 0

    def feed(self, token: int, logprob: float) -> list[Piece]:
        if token in self._ends:
            return []
        if not self._is_scored_at_end:
            self._scores.append((token, logprob, ()))
        text = self._cutter.feed(self._text.feed(token))
        return [self._piece(text)] if text else []

    def end(self, sequence: SampledSequence) -> list[Piece]:
        if self._is_scored_at_end:
            self._scores = self._all_scores(sequence)
        piece = self._piece(self._cutter.feed(self._text.finish()) + self._cutter.finish())
        piece["finish_reason"] = _finish_reason(sequence)
        return [piece]

    def whole(self, sequence: SampledSequence) -> Piece:
        self._scores = self._all_scores(sequence)
        piece = self._piece(_cut(self._decode([token for token, *_ in self._scores]), self._stop) or "")
        piece["finish_reason"] = _finish_reason(sequence)
        return piece

    def _all_scores(self, sequence: SampledSequence) -> list[Scored]:
        return [scored for scored in _scored(sequence) if scored[0] not in self._ends]

    def _piece(self, text: str) -> Piece:
        piece: Piece = {"index": self._index, "text": text, "logprobs": None, "finish_reason": None}
        if self._with_logprobs and self._scores:
            tokens = [self._decode([token]) for token, *_ in self._scores]
            offsets = [self._offset + sum(map(len, tokens[:number])) for number in range(len(tokens))]
            self._offset += sum(map(len, tokens))
            piece["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [logprob for _, logprob, _ in self._scores],
                "top_logprobs": [
                    {self._decode([one]): logprob for one, logprob in top} for _, _, top in self._scores
                ]
                if self._is_scored_at_end
                else None,
                "text_offset": offsets,
            }
        self._scores = []
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        known = [token for token in tokens if 0 <= token < len(self._tokenizer)]
        text = self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _cut(text: Any, stop: Sequence[str]) -> str | None:
    """Returns the text before the first stop string."""
    if not isinstance(text, str):
        return None
    cutter = StopCutter(stop)
    return cutter.feed(text) + cutter.finish()


def _scored(sequence: SampledSequence) -> list[Scored]:
    tops = sequence.topk_logprobs or [None] * len(sequence.tokens)
    triples = zip(sequence.tokens, sequence.logprobs or (), tops, strict=True)
    return [(token, logprob, top or ()) for token, logprob, top in triples]


def _score(tokenizer: Any, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> Piece:
    text = str(tokenizer.decode([token], skip_special_tokens=False)) if token < len(tokenizer) else ""
    whole = "\ufffd" not in text  # a token may be a part of a character
    scored: Piece = {"token": text, "logprob": logprob, "bytes": [*text.encode()] if whole else None}
    return {**scored, "top_logprobs": [_without_top(tokenizer, *one) for one in top]}


def _without_top(tokenizer: Any, token: int, logprob: float) -> Piece:
    scored = _score(tokenizer, token, logprob)
    del scored["top_logprobs"]
    return scored


def _calls(message: Message) -> list[dict[str, Any]]:
    """Returns the tool calls of a reply, with an id each, and arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {
                "id": call.get("id") or f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": function.get("name"), "arguments": text},
            }
        )
    return calls


def _finish_reason(sequence: SampledSequence, calls: bool = False) -> str:
    return "tool_calls" if calls else sequence.stop_reason
