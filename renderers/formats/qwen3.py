"""Qwen3 (the hybrid-thinking models), as its published chat template prints it.

Replies before the last user message lose their thinking. If the last message is a reply, it gets a think
block, which is empty if it has no thinking. The replies between the two, in a chain of tool calls, keep a
block that is not empty. Most conversations of several turns therefore rewrite their history.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

from cookbook.errors import RendererError
from renderers.formats.chatml import END, ChatMLRenderer
from renderers.formats.hermes_tools import check_calls, print_calls, with_call_sections, with_calls
from renderers.formats.queries import LastQueries
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Draft, Rendering
from renderers.streaming import PLAIN
from renderers.thinking import END_THINK, THINK, THINKING, parse_thinking, said_without_thinking
from renderers.unsupported import no_place

_EMPTY_BLOCK = f"{THINK}\n\n{END_THINK}\n\n"


class Qwen3Renderer(ChatMLRenderer):
    """Renders as Qwen3's own template does. A reply's content may contain its thinking in `<think>` tags."""

    name = "qwen3"
    reply_sections = with_call_sections(THINKING)

    @cached_property
    def _queries(self) -> LastQueries:
        return LastQueries(_last_queries)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        rewritten: list[int] = []
        for index in chosen:
            if messages[index]["role"] != "assistant":
                continue
            self._check_reply(messages, index)
            if self._prints_thinking(messages, index) != self._prints_thinking(messages, index, index + 1):
                rewritten.append(index)
        return self._finish(self._draft(messages, tools), messages, tools, rewritten)

    def _prints_thinking(self, messages: Sequence[PlainMessage], index: int, num: int | None = None) -> bool:
        """Returns whether message `index` is a reply that is printed with a think block.

        Only the first `num` messages are considered.
        """
        queries = self._queries.of(messages)
        num = len(messages) if num is None else num
        if messages[index]["role"] != "assistant" or index <= queries[num]:
            return False
        return index == num - 1 or bool(thought_and_said(messages[index])[0])

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        return self._queries.num_alike(few, more)

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        """Raises RendererError if message `index` cannot be trained."""
        message = messages[index]
        in_prompt, behind = (
            index > 0 and self._prints_thinking(messages, index - 1, num) for num in (index, index + 1)
        )
        if in_prompt != behind:
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {index + 1}, a reply right after a reply: "
                "Qwen3 shows the first differently in the prompt and afterwards. Join the two."
            )
        if thought_and_said(message)[0] and not self._prints_thinking(messages, index, index + 1):
            raise RendererError(
                f"Renderer `{self.name}` has no place for the thinking of message {index + 1}, which no "
                "user's message precedes. Remove it (drop_thinking=True does so), or do not train the "
                "message."
            )
        if loses_text(message):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {index + 1}: Qwen3 would lose text "
                f"around the {THINK} and {END_THINK} of its content. Give the thinking as "
                '`reasoning_content`, "" if there is none.'
            )
        check_calls(self.name, message, index + 1)

    def _put_reply(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        thought, said = thought_and_said(messages[index])
        calls = print_calls(messages[index], index + 1, said)
        if not self._prints_thinking(messages, index):
            # The end of the prompt (`reply_opening`) is not printed in the history, so there is no cut.
            put = draft.put_text if self.reply_opening else draft.put_reply
            put(index, said + calls + END)
            return
        block = "{}\n{}\n{}\n\n".format(THINK, thought.strip("\n"), END_THINK)
        if block == self.reply_opening:
            draft.put(block)
            block = ""
        draft.put_reply(index, block + said.lstrip("\n") + calls + END)

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        message, closed = parse_thinking(text)
        message, well_formed = with_calls(message)
        if not (closed and well_formed):
            return {"role": "assistant", "content": text}, False
        return message, ended


class Qwen3DisableThinkingRenderer(Qwen3Renderer):
    """Qwen3 prompted not to think: its template with `enable_thinking=False`.

    The prompt ends with an empty think block, so the block is not trained. A reply in the history has no
    block, as in `qwen3`. Thinking in a trained message is refused.
    """

    name = "qwen3_disable_thinking"
    reply_opening = _EMPTY_BLOCK
    reply_sections = with_call_sections(PLAIN)

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        if thought_and_said(messages[index])[0].strip("\n"):
            raise no_place(self.name, "thinking", index + 1)
        super()._check_reply(messages, index)
        if not self._prints_thinking(messages, index, index + 1):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {index + 1}, which no user's message precedes: "
                "Qwen3 prints no think block there, but its prompt ends with one. Put a user's message first."
            )

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        message, well_formed = with_calls(said_without_thinking(text))
        return message, ended and well_formed


def _last_queries(messages: Sequence[PlainMessage]) -> list[int]:
    """Returns for each n the last query among the first n messages, or the last of them if there is none.

    A query is a user message that is not a tool result in `<tool_response>` tags.
    """
    last: int | None = None
    found = [-1]
    for index, message in enumerate(messages):
        content = message.get("content", "")
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if message["role"] == "user" and not wrapped:
            last = index
        found.append(index if last is None else last)
    return found


def thought_and_said(message: PlainMessage) -> tuple[str, str]:
    """Returns the thinking of a reply, which may be in its content, and the rest of the content."""
    content = message.get("content", "")
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    if END_THINK not in content:
        return "", content
    thought = content.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return thought, content.split(END_THINK)[-1].lstrip("\n")


def loses_text(message: PlainMessage) -> bool:
    """Returns whether `thought_and_said` drops more than tags and the newlines around them."""
    if "reasoning_content" in message or END_THINK not in message.get("content", ""):
        return False
    thought, *said = message["content"].split(END_THINK)
    before, *after = thought.split(THINK)
    return len(said) > 1 or len(after) > 1 or bool(after and before.strip("\n"))
