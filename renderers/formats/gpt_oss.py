"""gpt-oss, in OpenAI's harmony format as its published chat template prints it.

Surprising properties of that template:

- Its system message contains today's date. This renderer always prints the same date (`today.py`), or the
  `current_date` it is created with, so a conversation has the same tokens on any day.
- A conversation's own system or developer message becomes the developer message, together with the tools.
  Only one is supported, as the first message.
- A reply ends with `<|return|>` when it is sampled, but with `<|end|>` and without its thinking in the
  history: every earlier reply of a conversation is rewritten.
- The thinking before a tool call is kept until a reply without calls follows. The template then drops it from
  the entire conversation, although the prompt for that reply contains it. If the last message of a
  conversation is a trained reply, what its prompt contains is kept.
- A message has at most one call. Its text is printed as thinking, so a trained message with a call must have
  its thinking as `reasoning_content` and no text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.formats.gpt_oss_reply import REPLY, parse_reply
from renderers.formats.gpt_oss_tools import print_namespace
from renderers.formats.queries import Beginnings, last_of_each
from renderers.jinja.today import TODAY
from renderers.messages import ROLES, Message, PlainMessage, Tool, function_of, to_json
from renderers.rendering import Draft, Rendering
from renderers.reply_text import marked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CURRENT_DATE = f"{TODAY:%Y-%m-%d}"

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_TEXT_TOKENS = "<|startoftext|><|endoftext|>"


class GptOssRenderer(Renderer):
    """Renders as the template does; arguments given as a JSON string are printed as the object they encode.

    For another date register `partial(GptOssRenderer, current_date="2026-01-31")` under another name.
    """

    name = "gpt_oss"
    roles = ROLES
    frame = _START + _CHANNEL + _MESSAGE + "<|constrain|>" + _END + _CALL + _RETURN + _TEXT_TOKENS
    takes_tools = True
    reply_sections = REPLY

    reasoning_effort: Literal["low", "medium", "high"] = "medium"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, current_date: str = CURRENT_DATE) -> None:
        super().__init__(tokenizer)
        for token in (_START, _CHANNEL, _MESSAGE, _END):
            self._token_id(token)
        self._stops = [self._token_id(_RETURN), self._token_id(_CALL)]
        self._current_date = current_date

    # -- rendering ----------------------------------------------------------------------------

    @cached_property
    def _finals(self) -> Beginnings[int]:
        return Beginnings(partial(last_of_each, _is_final))

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        # Whether the last message of each is printed as a final of the history is unknown here.
        found = self._finals.of(more)
        last_final = found[len(few) - 1]
        return len(few) - 1 if last_final == found[len(more)] else last_final + 1

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        for index in chosen:
            message = messages[index]
            if message["role"] == "assistant" and _calls(message) and message.get("content"):
                raise RendererError(
                    f"Renderer `{self.name}` has no place for the text beside the tool call of message "
                    f"{index + 1}. Give it as `reasoning_content` if it is thinking, or remove it."
                )
        last = len(messages) - 1
        last_final = self._finals.of(messages)[last if last in chosen else last + 1]
        draft = self._draft(messages, tools, last_final, ends_at=last)
        return self._finish(draft, messages, tools, _rewritten(messages, chosen, last_final))

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools, self._finals.of(messages)[len(messages)])
        draft.put(_START + role + ("" if role == "assistant" else _MESSAGE))
        return draft.finish()

    def _draft(
        self,
        messages: Sequence[PlainMessage],
        tools: Sequence[Tool] | None,
        last_final: int,
        ends_at: int | None = None,
    ) -> Draft:
        """Returns a draft of all messages, with the thinking of the calls behind the last final reply.

        If message `ends_at` is a reply without calls, it ends the conversation with `<|return|>`.
        """
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            self._put_system_and_developer(draft, messages[0], tools)
        for index, message in draft.rest_of(messages):
            match message["role"]:
                case "user":
                    draft.put(f"{_START}user{_MESSAGE}")
                    draft.put_text(index, message["content"] + _END)
                case "tool":
                    function = self._answered(messages, index)
                    draft.put(f'{_START}functions.{function} to=assistant{_CHANNEL}commentary{_MESSAGE}"')
                    draft.put_text(index, to_json(message["content"])[1:-1])
                    draft.put(f'"{_END}')
                case "assistant":
                    draft.put(f"{_START}assistant")
                    if _calls(message):
                        function, arguments = self._call(message, index + 1)
                        thought = _thought_before_a_call(message) if index > last_final else ""
                        thinking = _analysis(thought) if thought else ""
                        header = f" to=functions.{function}{_CHANNEL}commentary json{_MESSAGE}"
                        draft.put_reply(index, thinking + header + arguments + _CALL)
                    else:
                        thinks = index == ends_at and "reasoning_content" in message
                        thinking = _analysis(message["reasoning_content"]) if thinks else ""
                        end = _RETURN if index == ends_at else _END
                        said = f"{_CHANNEL}final{_MESSAGE}{message.get('content', '')}{end}"
                        draft.put_reply(index, thinking + said)
                case role if index > 0:
                    raise RendererError(
                        f"Renderer `{self.name}` cannot render message {index + 1}: one of role `{role}` can "
                        "only be the first. Join it to that one, or make it a user's message."
                    )
        return draft

    def _put_system_and_developer(
        self, draft: Draft, first: PlainMessage, tools: Sequence[Tool] | None
    ) -> None:
        draft.put(
            f"{_START}system{_MESSAGE}You are ChatGPT, a large language model trained by OpenAI.\n"
            f"Knowledge cutoff: 2024-06\nCurrent date: {self._current_date}\n\n"
            f"Reasoning: {self.reasoning_effort}\n\n"
            "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        )
        draft.put("\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "")
        draft.put(_END)
        instructions = first["content"] if first["role"] in ("system", "developer") else ""
        if instructions or tools:
            draft.put(f"{_START}developer{_MESSAGE}")
        draft.put("# Instructions\n\n" if instructions else "")
        if first["role"] in ("system", "developer"):
            draft.put_text(0, instructions)
        draft.put("\n\n" if instructions else "")
        if tools:
            # Printed unescaped, since the layout depends on the length of the types, and then escaped.
            printed = print_namespace(self._encoder.unguard(list(tools)))
            draft.put("# Tools\n\n" + self._guard_text(printed))
        if instructions or tools:
            draft.put(_END)

    def _call(self, message: PlainMessage, number: int) -> tuple[str, str]:
        """Returns the name of the called function, and its arguments as JSON."""
        calls = _calls(message)
        if len(calls) > 1:
            raise RendererError(
                f"Renderer `{self.name}` cannot render the {len(calls)} tool calls of message {number}. "
                "Supported: one in a message. Give each a message of its own, with its result after it."
            )
        if message.get("content") and message.get("reasoning_content"):
            raise RendererError(
                f"Renderer `{self.name}` cannot render both the text and the thinking of message {number} "
                "beside its tool call. Remove one."
            )
        function = function_of(calls[0], number)
        return function["name"], to_json(self._arguments(function, number))

    def _answered(self, messages: Sequence[PlainMessage], index: int) -> str:
        """Returns the name of the function whose result message `index` is."""
        before = next((i for i in range(index - 1, -1, -1) if messages[i]["role"] == "assistant"), index)
        calls = _calls(messages[before])
        if not calls:
            raise RendererError(
                f"Renderer `{self.name}` cannot render message {index + 1}, a tool's result: no tool call "
                "comes before it. Insert an assistant message with `tool_calls` before it."
            )
        return str(function_of(calls[0], before + 1)["name"])

    def _guard_text(self, text: str) -> str:
        (guarded,) = self._encoder.guard([{"role": "user", "content": text}])
        return str(guarded["content"])

    # -- parsing ------------------------------------------------------------------------------

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops)

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, self._stops)
        tokens = list(tokens)
        end = next((i for i, token in enumerate(tokens, 1) if token in self._stops), len(tokens))
        marked = marked_text(self.tokenizer, self._encoder, tokens[:end])
        message = parse_reply(marked, self._encoder) if marked is not None else None
        if message is None:
            return {"role": "assistant", "content": text}, False
        return message, ended


class GptOssLowRenderer(GptOssRenderer):
    """gpt-oss with low reasoning effort."""

    name = "gpt_oss_low"
    reasoning_effort = "low"


class GptOssHighRenderer(GptOssRenderer):
    """gpt-oss with high reasoning effort."""

    name = "gpt_oss_high"
    reasoning_effort = "high"


def _calls(message: PlainMessage) -> list[dict[str, object]]:
    return list(message.get("tool_calls", []))


def _is_final(message: PlainMessage) -> bool:
    return message["role"] == "assistant" and not _calls(message)


def _thought_before_a_call(message: PlainMessage) -> str:
    return str(message.get("content") or message.get("reasoning_content") or "")


def _rewritten(messages: Sequence[PlainMessage], chosen: Collection[int], last_final: int) -> list[int]:
    """Returns the chosen replies that are printed differently in the history than as the last message."""
    earlier = {index for index in chosen if index < len(messages) - 1}
    found: list[int] = []
    has_thought = False
    for index, message in enumerate(messages[: max(earlier, default=-1) + 1]):
        if message["role"] != "assistant":
            continue
        is_final = not _calls(message)
        has_thought = not is_final and (has_thought or bool(_thought_before_a_call(message)))
        if index in earlier and (is_final or (has_thought and index < last_final)):
            found.append(index)
    return found


def _analysis(thought: str) -> str:
    return f"{_CHANNEL}analysis{_MESSAGE}{thought}{_END}{_START}assistant"
