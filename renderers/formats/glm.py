"""GLM-4.5, GLM-4.6, GLM-4.7 and GLM-5, as their published chat templates print them.

Replies have no end token: the model ends its turn with the token that begins the next message, `<|user|>`, or
after tool calls `<|observation|>`. That token is trained with the reply. Behind the last reply of a
conversation, where the templates print nothing, it is added. A reply that another message follows (a second
reply, a system message) is trained as the last one, in an example of its own.

Replies before the last user message lose their thinking. White space around contents of replies is not
printed.

GLM-4.5 and GLM-4.6 (one format): a reply always has a think block, which may be empty; the model opens it
itself. The prompt not to think has an empty block, and `/nothink` at the end of every user message.

GLM-4.7 and GLM-5 (one format): the prompt opens a think block, and the prompt not to think has only the
closing tag. A reply without thinking is printed as a continuation of the latter, in the history too. So
`glm5` trains it behind the prompt of `glm5_disable_thinking`, and counts it.

Sources: the template of GLM-4.5; for GLM-4.7 and GLM-5 the template of GLM-4.7, and `renderers` 0.1.12, which
has one renderer for both (`renderers/glm5.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from renderers.encoder import ESCAPE
from renderers.formats.glm_tools import GLM_TAGS, describe_tools, print_call
from renderers.formats.qwen3 import thought_and_said
from renderers.formats.tagged_replies import TaggedRepliesRenderer
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Draft, Rendering
from renderers.streaming import PLAIN, START, Section
from renderers.thinking import END_THINK, THINK, THINKING, THINKING_BEGUN, parse_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGIN = "[gMASK]<sop>"
_SYSTEM, _USER, _ASSISTANT, _OBSERVATION = "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"
_HEADERS = {"system": _SYSTEM, "user": _USER, "assistant": _ASSISTANT, "tool": _OBSERVATION}
_END_OF_TEXT = "<|endoftext|>"
_NO_THINK = "/nothink"


class Glm5Renderer(TaggedRepliesRenderer):
    """Renders as the template of GLM-4.7 and GLM-5 does, prompted to think."""

    name = "glm5"
    frame = _BEGIN + _SYSTEM + _USER + _ASSISTANT + _OBSERVATION
    guards_replies = True
    call_tags = GLM_TAGS
    reply_opening = THINK
    other_openings: ClassVar[Mapping[str, str]] = {END_THINK: "glm5_disable_thinking"}
    all_openings: ClassVar[Sequence[str]] = (THINK, END_THINK)
    reply_sections = GLM_TAGS.with_sections(THINKING_BEGUN)

    between: ClassVar[str] = ""
    """What is printed between tags, and between a header and its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._stops = [self._token_id(token) for token in (_USER, _OBSERVATION)]
        self._token_id(_ASSISTANT)
        if _END_OF_TEXT in self._encoder.ids:
            self._stops.append(self._encoder.ids[_END_OF_TEXT])

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops)

    # -- rendering ----------------------------------------------------------------------------

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools, role)
        if role == "assistant":
            draft.put(_ASSISTANT + self.reply_opening)
        elif self._end_behind(messages, len(messages) - 1, role) != _USER:
            draft.put(_USER)
        draft.put(self.between if role == "user" else "")
        return draft.finish()

    def _draft(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, next_role: str | None = None
    ) -> Draft:
        """Returns a draft of the conversation, which a message of `next_role` follows if it is given."""
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            draft.put(_BEGIN)
            draft.put(f"{_SYSTEM}{describe_tools(tools, self.between)}" if tools else "")
        for index, message in draft.rest_of(messages):
            role, before = message["role"], messages[index - 1 : index]
            header = self._end_behind(messages, index - 1, next_role) if before else ""
            is_next_result = role == "tool" and before and before[0]["role"] == "tool"
            has_header = header == _HEADERS[role]  # the end token of the reply before
            draft.put("" if has_header or is_next_result else _HEADERS[role])
            if role == "assistant":
                text = self._reply_text(message, index + 1, self._in_history(messages, index))
                self._put_reply_text(draft, index, text + self._end_behind(messages, index, next_role))
            elif role == "tool":
                draft.put(f"{self.between}<tool_response>{self.between}")
                draft.put_text(index, self._said(message))
                draft.put(f"{self.between}</tool_response>")
            else:
                draft.put(self.between)
                self._put_said(draft, index, message)
        return draft

    def _end_behind(self, messages: Sequence[PlainMessage], index: int, next_role: str | None) -> str:
        """Returns the end token behind message `index`, a reply; "" if the next message begins otherwise."""
        message = messages[index]
        if message["role"] != "assistant":
            return ""
        end = _OBSERVATION if message.get("tool_calls") else _USER
        follows = messages[index + 1]["role"] if index + 1 < len(messages) else next_role
        return end if follows is None or _HEADERS[follows] == end else ""

    def _is_rewritten(self, messages: Sequence[PlainMessage], index: int) -> bool:
        return not self._end_behind(messages, index, None) or super()._is_rewritten(messages, index)

    def _put_said(self, draft: Draft, index: int, message: PlainMessage) -> None:
        draft.put_text(index, self._said(message))

    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        thought, said = self._thought_and_said(message)
        # Thinking of white space alone is printed as an empty block.
        has_block = not in_history and thought_and_said(message)[0]
        block = f"{THINK}{thought}{END_THINK}" if has_block else END_THINK
        return block + said.strip() + "".join(self._calls(message, number))

    def _print_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return print_call(name, arguments, self.between)


class Glm5DisableThinkingRenderer(Glm5Renderer):
    """GLM-4.7 and GLM-5 prompted not to think, as their template does with `enable_thinking=False`.

    Thinking in a trained message is refused.
    """

    name = "glm5_disable_thinking"
    reply_opening = END_THINK
    other_openings: ClassVar[Mapping[str, str]] = {}
    thinks = False
    reply_sections = GLM_TAGS.with_sections(PLAIN)


class Glm4_5Renderer(Glm5Renderer):
    """Renders as the template of GLM-4.5 and GLM-4.6 does."""

    name = "glm4_5"
    between = "\n"
    reply_opening = ""
    other_openings: ClassVar[Mapping[str, str]] = {}
    all_openings: ClassVar[Sequence[str]] = ()
    reply_sections = GLM_TAGS.with_sections(
        {
            **THINKING,
            START: Section("content", begins={f"\n{THINK}": "thinking", THINK: "thinking"}, lstrip="\n"),
        }
    )

    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        thought, said = self._thought_and_said(message)
        block = f"\n{THINK}{'' if in_history else thought}{END_THINK}"
        said = f"\n{said.strip()}" if said.strip() else ""
        return block + said + "".join(f"\n{call}" for call in self._calls(message, number))

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        message, closed = parse_thinking(text.removeprefix("\n"))
        return {**message, "content": str(message["content"]).lstrip("\n")}, closed


class Glm4_5DisableThinkingRenderer(Glm4_5Renderer):
    """GLM-4.5 and GLM-4.6 prompted not to think, as their template does with `enable_thinking=False`.

    Thinking in a trained message is refused.
    """

    name = "glm4_5_disable_thinking"
    reply_opening = f"\n{THINK}{END_THINK}"
    thinks = False
    reply_sections = GLM_TAGS.with_sections({START: replace(PLAIN[START], lstrip="\n")})

    def _put_said(self, draft: Draft, index: int, message: PlainMessage) -> None:
        said = self._said(message)
        if message["role"] != "user":
            draft.put_text(index, said)
            return
        if self._encoder.unguard(said).endswith(_NO_THINK):
            # Where it is a control token, the user's text spells it and is escaped.
            said = said.removesuffix(_NO_THINK) if said.endswith(_NO_THINK) else said[: said.rindex(ESCAPE)]
        draft.put_text(index, said)
        draft.put(_NO_THINK)

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        message, _ = super(Glm5Renderer, self)._parse_thinking(text)
        return {**message, "content": str(message["content"]).lstrip("\n")}, True
