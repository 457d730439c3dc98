"""Any tokenizer's own chat template, with the trained spans found by rendering.

A template says nowhere which of its text the model wrote, so that is read off what it prints.
With R(m) the rendering of messages m and P(m) the same with the generation prompt:

- The text of message i begins where P(m[:i]) ends, which must be how R(m) begins.
- It ends with the end-of-turn token of R(m[:i+1]): the first of the control tokens that, with
  white space, make up its tail. What follows that token is the template's.
- If R(m) does not continue P(m[:i]) with that same text, the template rewrites its history.

The content of any other message lies between what stays the same when a sentinel replaces it.
Where these disagree the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from renderers.base import Renderer, Rendering, Span
from renderers.encoder import ESCAPE, SENTINEL, Encoder, any_of
from renderers.messages import ROLES, Message, PlainMessage, Tool
from renderers.template import CALL, Chat, Template
from renderers.thinking import END_THINK, message_with_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: PlainMessage = {"role": "user", "content": "x"}
_REPLY: PlainMessage = {"role": "assistant", "content": SENTINEL}


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's chat template, token for token as `apply_chat_template` does.

    There are two exceptions. A control token that a message spells is encoded as the text it is.
    And where a token would span the end of a generation prompt and the start of the reply (a
    reply that begins with a newline, say), the two are encoded apart, as they are when sampling.
    """

    name = "chat_template"
    roles = ROLES

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise RendererError("This tokenizer has no chat template. Use a renderer such as `role_colon`.")
        self.tokenizer = tokenizer
        self._template = Template(tokenizer)
        text = self._template.text
        after_last = text([_USER, _REPLY]).partition(SENTINEL)[2]
        after_earlier = text([_USER, _REPLY, _USER]).partition(SENTINEL)[2]
        self._encoder = Encoder(tokenizer, frame=text([_USER], prompt=True) + after_last)
        stops = [self._end_after(after_last), *self._end_of_a_tool_call()]
        self._stops = {end: self._encoder.ids[end] for end in stops}
        self._ends = {*stops, self._end_after(after_earlier)}
        self._end = re.compile(rf"\s*({any_of(self._ends).pattern})")
        self.takes_tools = self._template.prints_tools()

    def _end_after(self, text: str) -> str:
        """The end-of-turn token at the start of what the template prints after a reply."""
        match = re.match(rf"\s*({self._encoder.control.pattern})", text)
        if match is None:
            raise RendererError(
                f"The chat template ends a reply with {text[:40]!r}, not with a special token of this "
                "tokenizer, so the model could not learn to stop. Use another template or renderer."
            )
        return match[1]

    def _end_of_a_tool_call(self) -> list[str]:
        try:
            start = len(self._template.text([_USER], prompt=True))
            tail = self._tail(self._template.text([_USER, CALL]), start)
        except RendererError:  # a template without tools
            return []
        return [tail[0][0]] if len(tail) == 1 else []

    # -- rendering ----------------------------------------------------------------------------

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        chat = Chat(self._template, messages, tools)
        text = self._checked_text(chat)
        cuts: list[int] = []
        spans: dict[int, Span] = {}
        rewritten: list[int] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = chat.prompt_before(index)
                if prompt and text.startswith(prompt):
                    cuts.append(len(prompt))
                if index in chosen:
                    reply = self._reply(chat, index)
                    if text.startswith(f"{prompt}{reply}"):
                        spans[index] = Span(cuts[-1], cuts[-1] + len(reply))
                    else:
                        rewritten.append(index)
            elif index in chosen:
                spans[index] = self._content_span(chat, index)
        return Rendering(text, cuts, spans, rewritten)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        if role != "assistant":
            raise self._refuse_role(role, ["assistant"])
        chat = Chat(self._template, messages, tools)
        text = self._checked_text(chat, prompt=True)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [chat.prompt_before(index) for index in turns]
        return Rendering(text, cuts=[len(prompt) for prompt in prompts if prompt and text.startswith(prompt)])

    def _checked_text(self, chat: Chat, prompt: bool = False) -> str:
        """The text of all messages, none of them lost and escapes printed as what they stand for."""
        for number, message in enumerate(chat.messages, 1):
            if not self._template.prints(message["role"]):
                supported = ", ".join(role for role in ROLES if self._template.prints(role))
                raise RendererError(
                    f"The chat template leaves out messages of role `{message['role']}` (message {number}). "
                    f"Supported: {supported}."
                )
        text = chat.text(len(chat.messages), prompt)
        unguard = self._encoder.unguard
        if ESCAPE in text and unguard(text) != self._template.text(
            unguard(chat.messages), unguard(chat.tools), prompt
        ):
            raise RendererError(
                "A message spells control tokens that the chat template itself looks for. Remove them."
            )
        return text

    # -- spans --------------------------------------------------------------------------------

    def _reply(self, chat: Chat, index: int) -> str:
        """What the model had to write as message `index`, its end-of-turn token included."""
        prompt = chat.prompt_before(index)
        if prompt is None:
            raise RendererError(
                f"The chat template renders no prompt before the assistant's message {index + 1}, so it "
                "cannot be trained. Begin with a user's message, or leave this one out of the training."
            )
        whole = chat.text(index + 1)
        if not whole.startswith(prompt):
            raise RendererError(
                f"The chat template's generation prompt ends with {prompt[-40:]!r}, but that is not how the "
                f"template then renders message {index + 1}. A model trained on it would be sampled from "
                "other prompts. Use another template."
            )
        self._check_nothing_is_lost(chat.messages[index], index + 1, whole[len(prompt) :])
        tail = self._tail(whole, len(prompt))
        known = [match for match in tail if match[0] in self._ends] if len(tail) > 1 else tail
        if not known:
            raise RendererError(
                f"The chat template ends message {index + 1} with {whole[-40:]!r}, which holds no "
                "end-of-turn token, so the model could not learn to stop."
            )
        return whole[len(prompt) : known[0].end()]

    def _check_nothing_is_lost(self, message: PlainMessage, number: int, printed: str) -> None:
        said = message.get("content", "").split(END_THINK)[-1]
        for key, text in (("reasoning_content", message.get("reasoning_content", "")), ("content", said)):
            if text.strip() not in printed:
                raise RendererError(
                    f"The chat template does not print the `{key}` of message {number} as it is. "
                    "Remove it, or leave the message out of the training."
                )

    def _tail(self, text: str, start: int) -> list[re.Match[str]]:
        """The control tokens that, with white space, end the text; none begins before `start`."""
        tail: list[re.Match[str]] = []
        end = len(text)
        for match in reversed(list(self._encoder.control.finditer(text, start))):
            if text[match.end() : end].strip():
                break
            tail.insert(0, match)
            end = match.start()
        return tail

    def _span_in_history(
        self,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        index: int,
        tools: Sequence[Tool] | None,
    ) -> Span:
        chat = Chat(self._template, messages, tools)
        prompt = chat.prompt_before(index) or ""
        span = self._around(chat, index, _REPLY)
        end = self._end.match(rendering.text, span.end)
        if end is None or len(prompt) > span.start or not rendering.text.startswith(prompt):
            raise RendererError(
                f"The chat template rewrites message {index + 1} once other messages follow it. "
                "Use build_supervised_examples, which trains every turn as the model meets it."
            )
        return Span(len(prompt), end.end())

    def _content_span(self, chat: Chat, index: int) -> Span:
        span = self._around(chat, index, {**chat.messages[index], "content": SENTINEL})
        end = self._end.match(chat.text(len(chat.messages)), span.end)
        return Span(span.start, end.end() if end else span.end)

    def _around(self, chat: Chat, index: int, stand_in: PlainMessage) -> Span:
        """The part of the text that gives way when a message with the sentinel replaces message `index`."""
        text = chat.text(len(chat.messages))
        changed = self._template.text(
            [*chat.messages[:index], stand_in, *chat.messages[index + 1 :]], chat.tools
        )
        before, _, after = changed.partition(SENTINEL)
        start, end = len(before), len(text) - len(after)
        if changed.count(SENTINEL) == 1 and text.startswith(before) and text.endswith(after) and start <= end:
            return Span(start, end)
        raise RendererError(
            f"The chat template does not print the text of message {index + 1} in one piece, so it cannot be "
            "told from the rest. Train on assistant messages, with build_supervised_examples."
        )

    # -- sampling -----------------------------------------------------------------------------

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops.values())

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """As the base class says; tool calls stay in the content, as text."""
        text, ended = self._decode(tokens, self._stops.values())
        thinks = END_THINK in str(self.tokenizer.chat_template)
        return message_with_thinking(text) if thinks else {"role": "assistant", "content": text}, ended
