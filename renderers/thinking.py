"""The `<think>` block of a reply."""

from __future__ import annotations

from dataclasses import replace

from renderers.messages import Message
from renderers.streaming import START, Section, Sections

THINK = "<think>"
END_THINK = "</think>"

THINKING: Sections = {
    START: Section("content", begins={THINK: "thinking"}),
    "thinking": Section("reasoning_content", ends={END_THINK: "said"}, lstrip="\n", rstrip="\n"),
    "said": Section("content", lstrip="\n"),
}
"""A reply that may begin with a think block."""

THINKING_BEGUN: Sections = {**THINKING, START: replace(THINKING["thinking"], begins={THINK: "thinking"})}
"""The same where the prompt ends with the opening tag."""


def parse_thinking(text: str, begun: bool = False) -> tuple[Message, bool]:
    """An assistant message of a reply's text, and whether a block that it begins with is closed.

    What it thought goes to `reasoning_content`, as in `message_with_thinking`. With `begun` the prompt
    supplies the opening tag, though the reply may repeat it.
    """
    if not (begun or text.startswith(THINK)):
        return {"role": "assistant", "content": text}, True
    if END_THINK not in text:
        return {"role": "assistant", "content": text}, False
    return message_with_thinking(text), True


def message_with_thinking(text: str) -> Message:
    """An assistant message of a reply's text; what it thought goes to `reasoning_content`.

    The opening tag may be missing: some prompts supply it. An empty block is no thinking, and said to be
    empty only where the content names the closing tag, or that would read as the end of a thought.
    """
    if END_THINK not in text:
        return {"role": "assistant", "content": text}
    reasoning, _, content = text.partition(END_THINK)
    reasoning = reasoning.removeprefix(THINK).strip("\n")
    message = said_without_thinking(content.lstrip("\n"))
    return {**message, "reasoning_content": reasoning} if reasoning else message


def said_without_thinking(content: str) -> Message:
    """A reply that did not think."""
    message: Message = {"role": "assistant", "content": content}
    return {**message, "reasoning_content": ""} if END_THINK in content else message
