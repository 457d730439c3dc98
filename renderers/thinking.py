"""Parses the `<think>` block of a reply."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TypeAlias

from renderers.messages import Message
from renderers.streaming import START, Section, Sections

THINK = "<think>"
END_THINK = "</think>"

THINKING: Sections = {
    START: Section("content", begins={THINK: "thinking"}),
    "thinking": Section("reasoning_content", ends={END_THINK: "said"}, lstrip="\n", rstrip="\n"),
    "said": Section("content", lstrip="\n"),
}
"""The sections of a reply that may begin with a think block."""

THINKING_BEGUN: Sections = {**THINKING, START: replace(THINKING["thinking"], begins={THINK: "thinking"})}
"""The sections of a reply whose prompt ends with the opening tag."""

Tags: TypeAlias = tuple[str, str]
"""What opens and what closes a thought."""
USUAL: Tags = (THINK, END_THINK)


def thinking_sections(tags: Tags, begun: bool) -> Sections:
    """Returns THINKING, or with `begun` THINKING_BEGUN, for a thought between these tags."""
    new = dict(zip(USUAL, tags, strict=True))
    return {
        name: replace(
            section,
            begins={new[mark]: after for mark, after in section.begins.items()},
            ends={new[mark]: after for mark, after in section.ends.items()},
        )
        for name, section in (THINKING_BEGUN if begun else THINKING).items()
    }


def parse_thinking(text: str, begun: bool = False, tags: Tags = USUAL) -> tuple[Message, bool]:
    """Returns the message in a reply's text, and False if a think block that it begins with is not closed.

    The thinking becomes `reasoning_content`, as in `message_with_thinking`. With `begun` the prompt supplies
    the opening tag, though the reply may repeat it.
    """
    if not (begun or text.startswith(tags[0])):
        return {"role": "assistant", "content": text}, True
    if tags[1] not in text:
        return {"role": "assistant", "content": text}, False
    return message_with_thinking(text, tags), True


def message_with_thinking(text: str, tags: Tags = USUAL) -> Message:
    """Returns the message in a reply's text, with its thinking as `reasoning_content`.

    The opening tag may be missing, since some prompts supply it. An empty block gives no `reasoning_content`,
    or an empty one if the content contains the closing tag, which would otherwise be read as a block's end.
    """
    opening, closing = tags
    if closing not in text:
        return {"role": "assistant", "content": text}
    reasoning, _, content = text.partition(closing)
    reasoning = reasoning.removeprefix(opening).strip("\n")
    message = said_without_thinking(content.lstrip("\n"), closing)
    return {**message, "reasoning_content": reasoning} if reasoning else message


def said_without_thinking(content: str, closing: str = END_THINK) -> Message:
    """Returns the message of a reply without thinking."""
    message: Message = {"role": "assistant", "content": content}
    return {**message, "reasoning_content": ""} if closing in content else message


_ABOUT_THINKING = r"(?:think|thought|reason)"
_REST = r"[^\s<>\[\]/\u25c1\u25b7]*"
_CLOSING = re.compile(rf"[<\[\u25c1]/{_REST}{_ABOUT_THINKING}{_REST}[>\]\u25b7]", re.I)
_ENDING = re.compile(
    rf"[<\[]{_REST}(?:(?<![a-z])end_{_REST}{_ABOUT_THINKING}|{_ABOUT_THINKING}{_REST}_end(?![a-z]))"
    rf"{_REST}[>\]]",
    re.I,
)


def tags_in(text: str) -> Tags | None:
    """Returns the tags of a thought of which the text has the one that closes it; `<think>` before others.

    A tag that closes has a slash (`[/THINK]`, `</seed:think>`, `</thought>`, and Kimi-VL's in triangles), or
    is named after the end of what another one starts (`<|END_THINKING|>`, `<|end_of_thought|>`).
    """
    found = _CLOSING.findall(text)
    if END_THINK in found:
        return USUAL
    if found:
        return found[0].replace("/", "", 1), found[0]
    for closing in _ENDING.findall(text):
        for start in ("start", "begin"):
            opening = closing.replace("end", start).replace("END", start.upper())
            if opening in text:
                return opening, closing
    return None


def inline(thought: str, content: str, tags: Tags) -> str:
    """Returns a reply's text with its thinking between the tags in front."""
    return f"{tags[0]}\n{thought.strip()}\n{tags[1]}\n\n{content}"
