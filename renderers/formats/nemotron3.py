"""Nemotron 3 and 3.5, as their published chat templates print them.

The prompt opens a think block, and the prompt not to think has an empty one, `<think></think>`. A reply
without thinking is printed as a continuation of the latter, in the history too. So `nemotron3` trains it
behind the prompt of `nemotron3_disable_thinking`, and counts it. Replies before the last user message have an
empty block instead of their thinking. Every conversation begins with a system message, which may be empty.
White space around a reply is not printed.

There are two formats. Nano and Super print newlines around the closing tag, Ultra and 3.5 do not. Super can
be asked for a low effort, Ultra for a medium one, by a text behind the last user message. That text moves
with each user message, so conversations of several turns rewrite their history. A mode that asks for an
effort or keeps all thinking has no prompt not to think: there a trained reply without thinking is refused.

Sources: the templates of NVIDIA-Nemotron-3 Nano, Super and Ultra and of 3.5 Lightning, as trl 1.16 carries
them (`trl/chat_templates/nemotron_3_*.jinja`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cookbook.errors import RendererError
from renderers.formats.chatml import END, START
from renderers.formats.function_tags import FUNCTION_TAGS, INSTRUCTIONS, INTRODUCTION
from renderers.formats.qwen3_5 import Qwen3_5Renderer
from renderers.messages import THINKING_KEYS, Message, PlainMessage, Tool, to_json
from renderers.rendering import Draft, Prepared
from renderers.streaming import PLAIN, Section, Sections
from renderers.streaming import START as FIRST
from renderers.thinking import END_THINK, THINK, said_without_thinking
from renderers.train_on_what import TrainOnWhat
from renderers.unsupported import no_place

_NO_THOUGHT = f"{THINK}{END_THINK}"
_OPEN = f"{THINK}\n"


def _sections(before_close: str, behind_close: str) -> Sections:
    """Returns the sections of a reply whose prompt opens a block, which is closed between newlines."""
    closes = [
        f"{before}{END_THINK}{behind}" for before in {before_close, ""} for behind in {behind_close, ""}
    ]
    thought = Section("reasoning_content", ends=dict.fromkeys(closes, "said"))
    return FUNCTION_TAGS.with_sections(
        {
            FIRST: Section("reasoning_content", thought.ends, begins={_OPEN: "thinking", THINK: "thinking"}),
            "thinking": thought,
            "said": Section("content"),
        }
    )


class Nemotron3Renderer(Qwen3_5Renderer):
    """Renders as the templates of Nemotron 3 Nano and Super do, prompted to think.

    A reply's content may contain its thinking in tags exactly as the template prints it.
    """

    name = "nemotron3"
    needs_query = False
    other_openings: ClassVar[Mapping[str, str]] = {_NO_THOUGHT: "nemotron3_disable_thinking"}

    all_openings: ClassVar[Sequence[str]] = (_OPEN, _NO_THOUGHT)

    around_close: ClassVar[tuple[str, str]] = ("\n", "\n")
    """What is printed before and behind the closing tag of thinking."""
    reply_sections = _sections(*around_close)
    user_effort: ClassVar[str] = ""
    """A text about the effort of thinking, behind the last user message."""

    _user_before_results = f"{START}user\n"
    _result_frame = ("<tool_response>\n", "\n</tool_response>\n")

    # -- rendering ----------------------------------------------------------------------------

    def _prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        train_on_what: TrainOnWhat | None = None,
    ) -> Prepared:
        if isinstance(messages, (list, tuple)):
            messages = [self._with_thinking_apart(message) for message in messages]
        return super()._prepare(messages, tools, train_on_what)

    def _with_thinking_apart(self, message: Message) -> Message:
        """Returns a reply with the think block in its content apart, if it is printed as the same text."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or any(message.get(key) is not None for key in THINKING_KEYS):
            return message
        if message.get("role") != "assistant":
            return message
        before, behind = map(re.escape, self.around_close)
        said = content.lstrip().removeprefix(_NO_THOUGHT)
        if content.lstrip() != said and THINK not in said and END_THINK not in said:
            return {**message, "content": said}
        block = rf"\s*{THINK}\n(?P<thought>.*?){before}{END_THINK}(?:{behind}(?P<said>.*)|\s*)"
        found = re.fullmatch(block, content, re.DOTALL)
        if found is None or not found["thought"].strip():
            return message
        return {**message, "content": found["said"] or "", "reasoning_content": found["thought"]}

    def _thought_and_said(self, message: PlainMessage) -> tuple[str, str]:
        thought = message.get("reasoning_content", "")
        return thought if thought.strip() else "", self._said(message)

    def _said(self, message: PlainMessage) -> str:
        return str(message.get("content", ""))

    def _is_query(self, message: PlainMessage) -> bool:
        return bool(message["role"] == "user")

    def _is_rewritten(self, messages: Sequence[PlainMessage], index: int) -> bool:
        follows_effort = self.user_effort and any(map(self._is_query, messages[index:]))
        return bool(follows_effort) or super()._is_rewritten(messages, index)

    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        thought, text = self._thought_and_said(message)
        before, behind = self.around_close
        if thought:
            text = f"{_OPEN}{thought}{before}{END_THINK}{behind}{text}"
        elif not self._has_tag(message):
            text = f"{_NO_THOUGHT}{text}"
        calls = "".join(f"{call}\n" for call in self._calls(message, number))
        if in_history and THINK in text and END_THINK in text:
            said = text.split(END_THINK)[-1]
            text = _NO_THOUGHT + (said.strip() if calls and behind else said)
        elif in_history and calls:
            said = text.split(END_THINK)[-1].split(THINK)[0]
            text = _NO_THOUGHT + (said.strip() if behind else said)
        if not calls:
            return text.strip()
        return f"{text if in_history else text.strip()}\n{calls}"

    def _has_tag(self, message: PlainMessage) -> bool:
        spelled = str(self._encoder.unguard(self._said(message)))
        return THINK in spelled or END_THINK in spelled

    def _check_thinking(self, message: PlainMessage, number: int) -> None:
        thought, _ = self._thought_and_said(message)
        spelled = str(self._encoder.unguard(thought))
        if spelled.startswith(THINK) or END_THINK in spelled:
            raise RendererError(f"The thinking of message {number} has a think tag of its own. Remove it.")
        if not thought and self._has_tag(message):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {number}: the model's template prints the "
                "think tags of its content as they are. Give the thinking as `reasoning_content`, or remove "
                "the tags."
            )
        if self._opening_of(self._reply_text(message, number, in_history=False)) is None:
            if thought:
                raise no_place(self.name, "thinking", number)
            raise RendererError(
                f"Renderer `{self.name}` prompts the model to think, but message {number} has no thinking. "
                "Use renderer `nemotron3_disable_thinking`, or do not train the message."
            )

    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft:
        if self.user_effort:
            last = max((i for i, message in enumerate(messages) if self._is_query(message)), default=None)
            messages = [
                {**message, "content": self._said(message) + self.user_effort} if index == last else message
                for index, message in enumerate(messages)
            ]
        return super()._draft(messages, tools)

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        alike = super()._num_alike(few, more)
        return min(alike, max(self._queries.of(more)[len(few)], 0)) if self.user_effort else alike

    def _put_system(
        self, draft: Draft, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        said = self._said(messages[0]) if messages[0]["role"] == "system" else ""
        draft.put(f"{START}system\n")
        if messages[0]["role"] == "system":
            draft.put_text(0, said)
        draft.put("\n\n" if said and tools else "")
        draft.put(_describe_tools(tools) if tools else "")
        draft.put(f"{END}\n")

    def _has_message_before(self, messages: Sequence[PlainMessage], index: int) -> bool:
        return index > (messages[0]["role"] == "system")

    # -- parsing ------------------------------------------------------------------------------

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        if not self.thinks:
            return said_without_thinking(text), True
        text = text.removeprefix(_OPEN).removeprefix(THINK)
        thought, closed, said = text.partition(END_THINK)
        if not closed:
            return {"role": "assistant", "content": text}, False
        before, behind = self.around_close
        message = said_without_thinking(said.removeprefix(behind))
        thought = thought.removesuffix(before)
        return ({**message, "reasoning_content": thought} if thought.strip() else message), True


class Nemotron3DisableThinkingRenderer(Nemotron3Renderer):
    """Nemotron 3 prompted not to think, as its templates do with `enable_thinking=False`.

    Thinking in a trained message is refused.
    """

    name = "nemotron3_disable_thinking"
    reply_opening = _NO_THOUGHT
    other_openings: ClassVar[Mapping[str, str]] = {}
    thinks = False
    reply_sections = FUNCTION_TAGS.with_sections(PLAIN)


class Nemotron3PreserveThinkingRenderer(Nemotron3Renderer):
    """Nemotron 3 with the thinking of all replies (`truncate_history_thinking=False`)."""

    name = "nemotron3_preserve_thinking"
    other_openings: ClassVar[Mapping[str, str]] = {}
    keeps_thinking = True


class Nemotron3LowThinkingRenderer(Nemotron3Renderer):
    """Nemotron 3 Super asked for a low effort (`low_effort=True`)."""

    name = "nemotron3_low_thinking"
    other_openings: ClassVar[Mapping[str, str]] = {}
    user_effort = "\n\n{reasoning effort: low}"


class Nemotron3UltraRenderer(Nemotron3Renderer):
    """Renders as the templates of Nemotron 3 Ultra and of Nemotron 3.5 do, prompted to think."""

    name = "nemotron3_ultra"
    other_openings: ClassVar[Mapping[str, str]] = {_NO_THOUGHT: "nemotron3_ultra_disable_thinking"}
    around_close = ("", "")
    reply_sections = _sections(*around_close)


class Nemotron3UltraDisableThinkingRenderer(Nemotron3DisableThinkingRenderer):
    """Nemotron 3 Ultra and Nemotron 3.5 prompted not to think."""

    name = "nemotron3_ultra_disable_thinking"
    around_close = ("", "")


class Nemotron3UltraMediumThinkingRenderer(Nemotron3UltraRenderer):
    """Nemotron 3 Ultra asked for a medium effort (`medium_effort=True`)."""

    name = "nemotron3_ultra_medium_thinking"
    other_openings: ClassVar[Mapping[str, str]] = {}
    user_effort = "\n\n{reasoning effort: efficient}"


class Nemotron3UltraPreserveThinkingRenderer(Nemotron3UltraRenderer):
    """Nemotron 3 Ultra and Nemotron 3.5 with the thinking of all replies."""

    name = "nemotron3_ultra_preserve_thinking"
    other_openings: ClassVar[Mapping[str, str]] = {}
    keeps_thinking = True


def _describe_tools(tools: Sequence[Tool]) -> str:
    return INTRODUCTION + "".join(map(_describe_tool, tools)) + INSTRUCTIONS


def _describe_tool(tool: Tool) -> str:
    function = tool.get("function", tool)
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    properties = parameters.get("properties")
    text = f"\n<function>\n<name>{function.get('name', '')}</name>{_described(function)}\n<parameters>"
    for name, fields in (properties if isinstance(properties, Mapping) else {}).items():
        fields = fields if isinstance(fields, Mapping) else {}
        kind = f"\n<type>{fields['type']}</type>" if "type" in fields else ""
        choices = f"\n<enum>{to_json(fields['enum'])}</enum>" if "enum" in fields else ""
        others = _other_keys(fields, ("name", "type", "description", "enum"))
        text += f"\n<parameter>\n<name>{name}</name>{kind}{_described(fields)}{choices}{others}\n</parameter>"
    text += _other_keys(parameters, ("type", "properties", "required"))
    if "required" in parameters:
        text += f"\n<required>{to_json(parameters['required'])}</required>"
    others = _other_keys(function, ("type", "name", "description", "parameters"))
    return f"{text}\n</parameters>{others}\n</function>"


def _described(fields: Mapping[str, Any]) -> str:
    if "description" not in fields:
        return ""
    return f"\n<description>{str(fields['description']).strip()}</description>"


def _other_keys(fields: Mapping[str, Any], known: Sequence[str]) -> str:
    """Returns the fields that have no place of their own, each in tags named for its key."""
    return "".join(
        f"\n<{key}>{to_json(value) if isinstance(value, (Mapping, list, tuple)) else value}</{key}>"
        for key, value in fields.items()
        if key not in known
    )
