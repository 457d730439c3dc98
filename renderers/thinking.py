"""The `<think>` block of a reply."""

from __future__ import annotations

from renderers.messages import Message

THINK = "<think>"
END_THINK = "</think>"


def message_with_thinking(text: str) -> Message:
    """An assistant message of a reply's text; what it thought goes to `reasoning_content`.

    The opening tag may be missing: some prompts supply it. An empty block is no thinking.
    """
    if END_THINK not in text:
        return {"role": "assistant", "content": text}
    reasoning, _, content = text.partition(END_THINK)
    reasoning = reasoning.removeprefix(THINK).strip("\n")
    message: Message = {"role": "assistant", "content": content.lstrip("\n")}
    return {**message, "reasoning_content": reasoning} if reasoning else message
