"""The base of every renderer: choosing, encoding and weighting, over a rendering with known spans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from cookbook.errors import RendererError
from cookbook.types import ModelInput
from renderers.encoder import Encoder
from renderers.messages import Message, PlainMessage, normalize
from renderers.train_on_what import TrainOnWhat, chosen_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Span(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    `cuts` are the ends of the prompts in it, ascending: where the model took over. `spans` give
    what training a message trains. A message in `rewritten` stands there otherwise than it did
    as the last one: the format changes its history.
    """

    text: str
    cuts: Sequence[int] = ()
    spans: Mapping[int, Span] = field(default_factory=dict)
    rewritten: Collection[int] = ()


class Renderer(ABC):
    """Turns conversations into tokens with weights, and sampled tokens back into messages."""

    name: ClassVar[str]
    roles: tuple[str, ...] = ("system", "user", "assistant", "tool")

    frame: ClassVar[str] = ""
    """The tokens around a message: none of its text reads as one, special to the tokenizer or not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, self.frame)

    def check_messages(self, messages: Sequence[Message]) -> None:
        """Raises RendererError for messages of a shape or role that cannot be rendered; tokenizes nothing."""
        normalize(messages, self.name, self.roles)

    # -- for training -------------------------------------------------------------------------

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[ModelInput, np.ndarray]:
        """The whole conversation as the format renders it, with one float32 weight for each token.

        Weights stand on the tokens they train and are not shifted. Where the format rewrites
        history, an earlier turn is trained as it stands there; `build_supervised_examples` trains
        each turn as the model meets it.
        """
        plain, chosen = self._prepare(messages, train_on_what)
        rendering = self._render(plain, chosen)
        if train_on_what == TrainOnWhat.ALL_TOKENS:
            return self._example(rendering, [Span(0, len(rendering.text))])
        spans = [
            self._span_in_history(plain, rendering, index)
            if index in rendering.rewritten
            else rendering.spans[index]
            for index in chosen
        ]
        return self._example(rendering, spans)

    def build_supervised_examples(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> list[tuple[ModelInput, np.ndarray]]:
        """One example, or one for each trained turn where the format rewrites a trained turn of the history.

        Each message is trained once: in the first of the examples that holds it.
        """
        plain, chosen = self._prepare(messages, train_on_what)
        rendering = self._render(plain, chosen)
        if not rendering.rewritten:
            if train_on_what == TrainOnWhat.ALL_TOKENS:
                return [self._example(rendering, [Span(0, len(rendering.text))])]
            return [self._example(rendering, [rendering.spans[index] for index in chosen])]
        turns = [index for index in chosen if plain[index]["role"] == "assistant"]
        if chosen[-1] > turns[-1]:
            turns.append(len(plain) - 1)
        examples: list[tuple[ModelInput, np.ndarray]] = []
        for previous, turn in zip([-1, *turns], turns, strict=False):
            new = [index for index in chosen if previous < index <= turn]
            part = self._render(plain[: turn + 1], new)
            examples.append(self._example(part, [part.spans[index] for index in new]))
        return examples

    def _prepare(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat
    ) -> tuple[list[PlainMessage], list[int]]:
        plain = self._encoder.guard(normalize(messages, self.name, self.roles))
        return plain, chosen_messages(messages, TrainOnWhat(train_on_what))

    def _example(self, rendering: Rendering, spans: Iterable[Span]) -> tuple[ModelInput, np.ndarray]:
        tokens = self._encoder.encode(rendering.text, rendering.cuts)
        weights = np.zeros(len(tokens.ids), dtype=np.float32)
        for start, end in spans:
            weights[tokens.index(start) : tokens.index(end)] = 1.0
        return ModelInput.from_ints(tokens.ids), weights

    # -- for sampling -------------------------------------------------------------------------

    def build_generation_prompt(self, messages: Sequence[Message], role: str = "assistant") -> ModelInput:
        """The prompt for a message of `role`: a prefix of what that message is trained on."""
        rendering = self._render_prompt(self._encoder.guard(normalize(messages, self.name, self.roles)), role)
        return ModelInput.from_ints(self._encoder.encode(rendering.text, rendering.cuts).ids)

    @abstractmethod
    def get_stop_sequences(self) -> list[str] | list[int]:
        """What ends a reply: token ids, or text for a format without an end-of-turn token."""

    @abstractmethod
    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The message in sampled tokens, and whether it is well-formed and properly ended.

        Never raises: of a malformed reply all the text is the content.
        """

    # -- what a format knows ------------------------------------------------------------------

    @abstractmethod
    def _render(self, messages: Sequence[PlainMessage], chosen: Collection[int]) -> Rendering:
        """Render guarded messages, with spans for those chosen unless they are rewritten."""

    @abstractmethod
    def _render_prompt(self, messages: Sequence[PlainMessage], role: str) -> Rendering:
        """Render guarded messages and the header of the next one."""

    def _span_in_history(self, messages: Sequence[PlainMessage], rendering: Rendering, index: int) -> Span:
        """Where a rewritten message lies in the rendering."""
        return rendering.spans[index]

    def _token_id(self, text: str) -> int:
        if text not in self._encoder.ids:
            raise RendererError(
                f"Renderer `{self.name}` needs the token {text!r}, which this tokenizer does not have. "
                "Use the renderer of its own format, such as `chat_template`."
            )
        return self._encoder.ids[text]

    def _decode(self, tokens: Sequence[int], ends: Collection[int]) -> tuple[str, bool]:
        """The text before the first end token, and whether that is the last token and every id is known."""
        tokens = list(tokens)
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        known = [token for token in tokens[:end] if 0 <= token < len(self.tokenizer)]
        text = self.tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), end == len(tokens) - 1 and len(known) == end

    def _refuse_role(self, role: str, supported: Sequence[str]) -> RendererError:
        return RendererError(
            f"Renderer `{self.name}` cannot prompt for role `{role}`. Supported: {', '.join(supported)}."
        )
