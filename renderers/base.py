"""The base class of renderers: converts the text that a format prints to tokens and weights."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cookbook.errors import RendererError
from cookbook.types import ModelInput
from cookbook.utils import notes
from cookbook.utils.token_ids import known_tokens
from renderers.encoder import SENTINEL, Encoder
from renderers.messages import (
    ROLES,
    Message,
    PlainMessage,
    Tool,
    check_characters,
    check_json,
    check_roles,
    check_tools,
    normalize,
)
from renderers.other_formats import ENDS, note_tokens_of_other_formats
from renderers.rendering import (
    CharSpan,
    Draft,
    Example,
    ExampleLines,
    Prepared,
    Rendering,
    Run,
    joined_runs,
)
from renderers.streaming import PLAIN, ResponseStream, Sections
from renderers.tools_in_system import with_tools_in_system
from renderers.train_on_what import TrainOnWhat, chosen_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARKUP = re.compile(r"[<\[|#]")

_SYSTEM_ROLES = ("system", "developer")

_MANY_MESSAGES = 8
"""The number of messages above which the draft of a conversation is kept."""


class Renderer(ABC):
    """Turns conversations into tokens with weights, and sampled tokens back into messages."""

    name: ClassVar[str]
    roles: tuple[str, ...] = ("system", "user", "assistant", "tool")

    prompted_roles: ClassVar[tuple[str, ...]] = ("assistant", "user")
    """The roles that `build_generation_prompt` takes."""

    frame: ClassVar[str] = ""
    """The tokens around a message. Text in a message is never encoded as one of them, special or not."""

    guards_replies: bool = False
    """Whether the frame's tokens are escaped in text of the assistant too, as they are in all other text."""
    takes_tools: bool = False
    """Whether the format has a place for the tools that the model may call."""

    reply_sections: Sections = PLAIN
    """Where content and thinking are in a reply, for `parse_stream`. It agrees with `parse_response`."""

    system_prompt: str | None = None
    """Added to every conversation, as its system message or at the start of its own system message."""

    tools_in_system: bool = False
    """Whether tools are described in the system message and called in text tags (`tools_in_system.py`)."""

    template_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Values for variables of the chat template in every conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, self.frame, template=str(tokenizer.chat_template or ""))
        self._drafts: list[tuple[Sequence[PlainMessage], Sequence[Tool] | None, Draft]] = []

    def check_messages(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> None:
        """Raises RendererError for messages whose type or role cannot be rendered. Nothing is tokenized."""
        self._prepare(messages, tools)

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> Renderer:
        """Returns this renderer with values for variables of its chat template, such as `enable_thinking`.

        Raises RendererError for a format that is written in code: it has no such variables.
        """
        if not template_kwargs:
            return self
        raise RendererError(
            f"Renderer `{self.name}` has no chat template to give chat_template_kwargs to (given: "
            f"{', '.join(map(str, template_kwargs))}). Use renderer_name=chat_template, or remove them."
        )

    def unread_template_kwargs(self) -> list[str]:
        """Returns the names in `template_kwargs` that the chat template does not read."""
        return []

    def template_kwargs_of(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> Mapping[str, Any]:
        """Returns the template's variables that the prompt for the last message, a reply, is trained with.

        A template may print its usual prompt for another mode than the reply shows, such as thinking. Then
        the reply is trained behind the prompt of the right mode, and sampling needs the same:
        `with_template_kwargs` of these gives the renderer whose prompts agree. Empty for the usual prompt.
        """
        return {}

    def reads_key(self, role: str, key: str, value: Any) -> bool:
        """Returns whether the format uses this key of a message.

        The keys of `Message` that every format uses (content, thinking, calls and their ids) are not asked
        about.
        """
        return False

    # -- for training -------------------------------------------------------------------------

    def build_supervised_example(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        tools: Sequence[Tool] | None = None,
    ) -> tuple[ModelInput, np.ndarray]:
        """Returns the full conversation as the format renders it, with one float32 weight per token.

        The weights are not shifted: each belongs to the token that it trains. Where the format rewrites
        history, an earlier turn is trained as it is printed in the history; `build_supervised_examples`
        trains each turn as the model sees it.
        """
        try:
            prepared = self._prepare(messages, tools, train_on_what)
            rendering = self._render(prepared.messages, prepared.weights, prepared.tools)
            spans = {
                index: self._span_in_history(prepared.messages, rendering, index, prepared.tools)
                if index in rendering.rewritten
                else rendering.spans[index]
                for index in prepared.weights
            }
            if train_on_what == TrainOnWhat.ALL_TOKENS:
                example = self._example(rendering, *self._all_spans(rendering, prepared))
            else:
                example = self._example(rendering, spans, prepared.weights)
            return example.with_model_input()
        except RendererError as error:
            self._note_system_prompt(error, messages)
            raise

    def build_supervised_examples(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        tools: Sequence[Tool] | None = None,
    ) -> list[tuple[ModelInput, np.ndarray]]:
        """Returns one example, or one per trained turn if the format rewrites a trained turn of the history.

        Each message is trained once, in the first example that contains it.
        """
        examples = self.render_conversation(messages, train_on_what, tools)
        return [example.with_model_input() for example in examples]

    def render_conversation(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        tools: Sequence[Tool] | None = None,
    ) -> list[Example]:
        """Returns the examples of `build_supervised_examples` as arrays."""
        try:
            prepared = self._prepare(messages, tools, train_on_what)
            plain, weights = prepared.messages, prepared.weights
            rendering = self._render(plain, weights, prepared.tools)
            if not rendering.rewritten:
                if train_on_what == TrainOnWhat.ALL_TOKENS:
                    return [self._example(rendering, *self._all_spans(rendering, prepared))]
                return [self._example(rendering, rendering.spans, weights)]
            assistants = [index for index in weights if plain[index]["role"] == "assistant"]
            turns = [*assistants]
            if max(weights) > turns[-1]:
                turns.append(len(plain) - 1)
            examples: list[Example] = []
            lines = ExampleLines()
            for previous, turn in zip([-1, *turns], turns, strict=False):
                new = {index: weight for index, weight in weights.items() if previous < index <= turn}
                is_all = turn == len(plain) - 1 == assistants[-1] and rendering.spans.keys() >= new.keys()
                part = rendering if is_all else self._render(plain[: turn + 1], new, prepared.tools)
                examples.append(self._example(part, part.spans, new, lines))
            return examples
        except RendererError as error:
            self._note_system_prompt(error, messages)
            raise

    def render_text(self, text: str) -> Example:
        """Returns an example of plain text in which every token and the end-of-text token are trained.

        Control tokens that the text spells are encoded as those tokens, since the text may be a conversation
        that was already rendered. A BOS or end token is added only if the text does not have one. A BOS token
        that is added is not trained.
        """
        if not isinstance(text, str):
            raise RendererError(f"The text is a {type(text).__name__}. Use a string.")
        self._check_verbatim(text)
        before = self._bos_before(text)
        whole = f"{before}{text}{self._end_of_text_behind(text)}"
        return self._example(Rendering(whole), {0: CharSpan(len(before), len(whole))}, {0: 1.0})

    def is_rendered(self, prompt: str) -> bool:
        """Returns whether a prompt is text that was already rendered: it begins as this format begins one."""
        begun = prompt.lstrip()
        return self._encoder.control.match(begun) is not None or bool(
            self._opening and begun.startswith(self._opening)
        )

    def render_completion(self, prompt: str, completion: str) -> Example:
        """Returns an example of a prompt that was already rendered (`is_rendered`), and its completion.

        Control tokens that the two spell are encoded as those tokens. The completion is trained up to its
        end-of-turn token, which is added if it is missing. The header of the reply is not trained, even if
        it is in the completion.
        """
        prompt, completion = self._parted_behind_header(prompt, completion)
        self._check_verbatim(prompt + completion)
        before = self._bos_before(prompt) + prompt
        completion = self._completed(completion)
        text = before + completion
        span = CharSpan(len(before), len(text.rstrip()))
        return self._example(Rendering(text, cuts=[len(before)]), {0: span}, {0: 1.0})

    def _completed(self, completion: str) -> str:
        """Returns a completion with the end of its turn, which is added if it is missing."""
        return (
            completion if completion.rstrip().endswith(self._end_tokens) else completion + self._end_of_turn
        )

    def _parted_behind_header(self, prompt: str, completion: str) -> tuple[str, str]:
        """Returns prompt and completion; a reply's header in the completion is moved to the prompt."""
        for header in self._reply_headers:
            for num_there in range(len(header)):
                missing = header[num_there:]
                if completion.startswith(missing) and prompt.endswith(header[:num_there]):
                    return prompt + missing, completion.removeprefix(missing)
        return prompt, completion

    def _check_verbatim(self, text: str) -> None:
        """Checks text whose control tokens are encoded as such, and counts it."""
        check_characters(text, "The text")
        self._encoder.check_verbatim(text)
        if self._encoder.control.search(text):
            notes.count("text", "held control tokens, encoded as those tokens")
        if self.system_prompt:
            notes.count("text", "had no system_prompt before them: plain text is given none")
        note_tokens_of_other_formats("text", text, self._encoder.ids)

    def _bos_before(self, text: str) -> str:
        return "" if text.lstrip().startswith(self._bos) else self._bos

    @cached_property
    def _bos(self) -> str:
        """The BOS token if the tokenizer adds it to texts, else an empty string."""
        bos = self.tokenizer.bos_token_id
        begins_with_it = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return str(self.tokenizer.bos_token) if begins_with_it else ""

    def _end_of_text_behind(self, text: str) -> str:
        if text.rstrip().endswith(self._end_tokens):
            return ""
        if self.tokenizer.eos_token is None:
            raise RendererError(
                "This tokenizer has no end-of-text token, so the model could not learn to stop."
            )
        return str(self.tokenizer.eos_token)

    @cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        """The spellings of the tokens that end a reply or a text.

        They include end tokens of the tokenizer that the format does not use, such as its base model's.
        """
        stops = [stop for stop in self.get_stop_sequences() if isinstance(stop, int)]
        spelled = [str(self.tokenizer.convert_ids_to_tokens(stop)) for stop in stops]
        added = self.tokenizer.added_tokens_decoder.values()
        others = [token.content for token in added if token.special and token.content in ENDS]
        return tuple(dict.fromkeys(filter(None, [*spelled, str(self.tokenizer.eos_token or ""), *others])))

    @cached_property
    def _end_of_turn(self) -> str:
        """The end-of-turn token, or the text that ends a reply in a format without one."""
        stop = self.get_stop_sequences()[0]
        return stop if isinstance(stop, str) else str(self.tokenizer.convert_ids_to_tokens(stop))

    @cached_property
    def _opening(self) -> str:
        """The markup that opens a conversation, without control tokens; empty if there are only words."""
        with suppress(RendererError):
            before = self._render([{"role": "user", "content": SENTINEL}], (), None).text.partition(SENTINEL)[
                0
            ]
            opening = self._encoder.control.sub("", before).strip()
            return opening if _MARKUP.search(opening) else ""
        return ""

    @cached_property
    def _reply_headers(self) -> list[str]:
        """The headers of a reply: the generation prompt, and the one in the history, which may be shorter."""
        user: PlainMessage = {"role": "user", "content": "x"}
        reply: PlainMessage = {"role": "assistant", "content": SENTINEL}
        with suppress(RendererError):
            said = self._render([user], (), None).text
            prompt = self._render_prompt([user], None, "assistant").text
            in_history = self._render([user, reply, user], (), None).text.partition(SENTINEL)[0]
            begun = [text.removeprefix(said) for text in (prompt, in_history) if text.startswith(said)]
            return list(dict.fromkeys(filter(None, begun)))
        return []

    def _prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        train_on_what: TrainOnWhat | None = None,
    ) -> Prepared:
        """Returns the conversation for the format: checked and escaped messages, with the system prompt.

        Raises RendererError, with the number of the message, for what the format cannot render or train.
        """
        plain, trainings = normalize(messages, self.name, ROLES if self.tools_in_system else self.roles)
        check_tools(tools)
        if self.tools_in_system:
            plain, trainings = with_tools_in_system(plain, trainings, tools)
            check_roles(plain, self.name, self.roles)
            tools = None
        elif tools and not self.takes_tools:
            raise RendererError(
                f"Renderer `{self.name}` has no place for tools ({len(tools)} given). Describe them in a "
                "system message, as tools_in_system=True does, or remove them."
            )
        weights: dict[int, float] = {}
        untrained = [index for index, training in enumerate(trainings) if training.factor == 0]
        if train_on_what is not None:
            mode = TrainOnWhat(train_on_what)
            weights = chosen_messages([message["role"] for message in plain], trainings, mode)
            whole = {*range(len(plain))} - {*untrained} if mode == TrainOnWhat.ALL_TOKENS else weights
            for index in sorted(whole):
                for key, instead in (("function_call", "tool_calls"), ("refusal", "content")):
                    if plain[index]["role"] == "assistant" and plain[index].get(key):
                        raise RendererError(
                            f"Renderer `{self.name}` cannot train message {index + 1}: it has `{key}`. "
                            f"Write that as `{instead}`, or do not train the message."
                        )
        if self.system_prompt:
            if "system" not in self.roles:
                raise RendererError(
                    f"Renderer `{self.name}` has no system role, so no place for a system prompt."
                )
            if plain[0]["role"] in _SYSTEM_ROLES:
                plain[0] = {**plain[0], "content": f"{self.system_prompt}\n\n{plain[0]['content']}"}
            else:
                plain.insert(0, {"role": "system", "content": self.system_prompt})
                weights = {index + 1: weight for index, weight in weights.items()}
                untrained = [index + 1 for index in untrained]
        for index, message in enumerate(plain):
            text = message.get("content", "")
            if "<" in text or "[" in text:
                note_tokens_of_other_formats("message", text, self._encoder.ids)
            if message["role"] == "assistant" and text.rstrip()[-1:] in self._last_of_ends:
                plain[index] = self._without_end_tokens(message)
        guarded_tools = self._encoder.guard_tools(tools) if tools else None
        guarded = self._encoder.guard(plain, self.guards_replies)
        if any(message.get("tool_calls") or message.get("reasoning_content") for message in guarded):
            guarded = self._adapted_to_format(guarded)
        return Prepared(guarded, guarded_tools, weights, untrained)

    def _adapted_to_format(self, messages: list[PlainMessage]) -> list[PlainMessage]:
        """Returns the escaped messages with tool calls and thinking in the form that the format takes."""
        return messages

    def _without_end_tokens(self, reply: PlainMessage) -> PlainMessage:
        """Returns a reply without an end token that its text spells at the end, because the format prints it.

        An end token that the format does not use is kept and counted.
        """
        text = reply["content"]
        while (kept := text.rstrip()).endswith(self._ends_of_the_format):
            text = kept.removesuffix(next(end for end in self._ends_of_the_format if kept.endswith(end)))
        for end in self._end_tokens:
            if text.endswith(end):
                notes.count("message", "End tokens that the format does not use, kept before its own", end)
        if text == reply["content"]:
            return reply
        notes.count("message", "ended with the format's own end token, which was dropped")
        return {**reply, "content": text}

    @cached_property
    def _ends_of_the_format(self) -> tuple[str, ...]:
        return tuple(filter(self._encoder.control.fullmatch, self._end_tokens))

    @cached_property
    def _last_of_ends(self) -> frozenset[str]:
        """The last characters of the end tokens, for a quick test whether a text ends with one."""
        return frozenset(end[-1] for end in self._end_tokens)

    def _note_system_prompt(self, error: RendererError, messages: Sequence[Message]) -> None:
        first = messages[0] if isinstance(messages, (list, tuple)) and messages else None
        has_no_system = isinstance(first, Mapping) and first.get("role") not in _SYSTEM_ROLES
        if self.system_prompt and has_no_system:
            error.add_note("(The system prompt may be counted as message 1.)")

    def _example(
        self,
        rendering: Rendering,
        spans: Mapping[int, CharSpan],
        weights: Mapping[int, float],
        lines: ExampleLines | None = None,
    ) -> Example:
        """Returns the example of a rendering; with `lines`, it shares tokens with earlier ones in them."""
        text = rendering.text
        positions = [position for index in weights for position in spans[index]]
        line = None if lines is None else lines.nearest(text)
        tokens = self._encoder.encode(text, rendering.cuts, positions, line.trail if line else None)
        runs: list[Run] = []
        for index, weight in weights.items():
            start, end = spans[index]
            first = tokens.index(start)
            if tokens.starts and (at := first - tokens.num_before) > 0 and start < end:
                # A token with the first word may begin with the space that the format prints before it.
                after = tokens.starts[at] if at < len(tokens.starts) else len(text)
                begun = text[tokens.starts[at - 1] : start]
                first -= after > start and begun.isspace() and not text[start].isspace()
            runs.append((first, tokens.index(end), weight))
        runs = joined_runs(runs, tokens.num_shared + len(tokens.ids))
        example = Example(tokens.ids, runs, line.example if line else None, tokens.num_shared)
        if line is not None:
            line.example = example
        return example

    def _all_spans(
        self, rendering: Rendering, prepared: Prepared
    ) -> tuple[dict[int, CharSpan], dict[int, float]]:
        """Returns the spans of all text outside the messages that are not trained, and their weights."""
        spans, start = [], 0
        for index in prepared.untrained:
            spans.append(CharSpan(start, self._start_of(index, prepared.messages, rendering, prepared.tools)))
            start = self._start_of(index + 1, prepared.messages, rendering, prepared.tools)
        spans.append(CharSpan(start, len(rendering.text)))
        return dict(enumerate(spans)), dict.fromkeys(range(len(spans)), 1.0)

    def _start_of(
        self,
        index: int,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        tools: Sequence[Tool] | None,
    ) -> int:
        """Returns the position where the header of a message begins.

        The first message begins at 0: what the format prints before it is part of it.
        """
        if index in (0, len(messages)):
            return len(rendering.text) if index else 0
        before, error = messages[:index], None
        try:
            text = self._render(before, (), tools).text
            if rendering.text.startswith(text):
                return len(text)
            if before[-1]["role"] == "assistant":
                # The format prints this message differently when it is the last one.
                whole = self._render(messages, [index - 1], tools)
                is_rewritten = index - 1 in whole.rewritten
                history = self._span_in_history(messages, whole, index - 1, tools) if is_rewritten else None
                end = (history or whole.spans[index - 1]).end
                rest = rendering.text[end:]
                return end + len(rest) - len(rest.lstrip())
        except RendererError as refused:
            error = refused
        raise RendererError(
            f"Renderer `{self.name}` cannot determine where message "
            f"{index + 1} begins, and it or the one before "
            "is not to be trained. Choose train_on_what=all_messages."
        ) from error

    # -- for sampling -------------------------------------------------------------------------

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", tools: Sequence[Tool] | None = None
    ) -> ModelInput:
        """Returns the prompt for a message of `role`: a prefix of the sequence that trains that message."""
        try:
            prepared = self._prepare(messages, tools)
            if role not in self.prompted_roles:
                raise RendererError(
                    f"Renderer `{self.name}` cannot prompt for role `{role}`. Supported: "
                    f"{', '.join(self.prompted_roles)}."
                )
            rendering = self._render_prompt(prepared.messages, prepared.tools, role)
        except RendererError as error:
            self._note_system_prompt(error, messages)
            raise
        return ModelInput.from_ints(self._encoder.encode(rendering.text, rendering.cuts).ids)

    @abstractmethod
    def get_stop_sequences(self) -> list[str] | list[int]:
        """Returns what ends a reply: token ids, or text for a format without an end-of-turn token."""

    @abstractmethod
    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """Returns the message in sampled tokens, and whether it is well-formed and has ended.

        Never raises: the content of a malformed reply is all of its text.
        """

    def parse_stream(self) -> ResponseStream:
        """Returns a parser for one reply that is fed its tokens while they are sampled."""
        return ResponseStream(
            self.reply_sections,
            self._encoder,
            end_tokens={stop for stop in self.get_stop_sequences() if isinstance(stop, int)},
            decode=lambda tokens: self._decode(tokens, ())[0],
            parse=self.parse_response,
        )

    # -- what a format defines ----------------------------------------------------------------

    @abstractmethod
    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        """Renders escaped messages, with the spans of those chosen that are not rewritten."""

    @abstractmethod
    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        """Renders escaped messages and the header of the next message."""

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        """Returns how many first messages are printed alike in a conversation and one that continues it.

        Less than those of `few`. With more than 0, long conversations are printed in linear time.
        """
        return 0

    def _latest_draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft | None:
        """Returns the latest finished draft without its messages that are to be printed otherwise now.

        None if it does not begin like these messages.
        """
        with suppress(IndexError):
            drafted, drafted_tools, draft = self._drafts.pop()
            if tools is drafted_tools and all(map(is_, messages, drafted)):
                few, more = sorted((messages, drafted), key=len)
                if num := self._num_alike(few, more):
                    draft.go_back(num)
                    return draft
        return None

    def _finish(
        self,
        draft: Draft,
        messages: Sequence[PlainMessage],
        tools: Sequence[Tool] | None,
        rewritten: list[int] | None = None,
    ) -> Rendering:
        """Returns the rendering of a draft, which is kept for the next one."""
        if len(messages) > _MANY_MESSAGES:
            self._drafts[:] = [(messages, tools, draft)]
        return draft.finish(rewritten)

    def _span_in_history(
        self,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        index: int,
        tools: Sequence[Tool] | None,
    ) -> CharSpan:
        """Returns the span of a rewritten message in the rendering."""
        return rendering.spans[index]

    def _token_id(self, text: str) -> int:
        if text not in self._encoder.ids:
            raise RendererError(
                f"Renderer `{self.name}` needs the token {text!r}, which this tokenizer does not have. "
                "Use the renderer of its own format, such as `chat_template`."
            )
        return self._encoder.ids[text]

    def _decode(self, tokens: Sequence[int], ends: Collection[int]) -> tuple[str, bool]:
        """Returns the text before the first end token, and whether it is the last token and all are known."""
        tokens = list(tokens)
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        known = known_tokens(self.tokenizer, tokens[:end])
        text = self.tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text), end == len(tokens) - 1 and len(known) == end

    def _arguments(self, function: Mapping[str, Any], number: int) -> Any:
        """Returns the arguments of a call of message `number`; a string is parsed as JSON.

        JSON can spell a control token with its own escapes, so the parsed value is escaped again.
        """
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            return arguments
        try:
            spelled = json.loads(self._encoder.unguard(arguments))
        except (ValueError, RecursionError) as error:
            raise RendererError(
                f"The arguments of the tool call of message {number} are not JSON: {error}."
            ) from error
        check_json(spelled, f"Message {number}")
        (guarded,) = self._encoder.guard([{"role": "user", "arguments": spelled}])
        return guarded["arguments"]

    def _named_arguments(self, function: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """Returns the arguments of a call of message `number` as a mapping by name; "" stands for none."""
        arguments = {} if function["arguments"] == "" else self._arguments(function, number)
        if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
            raise RendererError(
                f"Renderer `{self.name}` cannot render a tool call of message {number}: its arguments "
                f"are {arguments!r}. Give a mapping with strings as keys."
            )
        return arguments
