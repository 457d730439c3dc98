"""Tools for a format that has no place for them: described in the system message, called in tags.

What the Qwen family's templates print of tools, written into the messages themselves, for a model whose
chat template knows neither tools nor their calls nor their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from renderers.formats.hermes_tools import describe_tools, print_calls
from renderers.messages import ROLES, Message, PlainMessage, Tool, check_tools, normalize
from renderers.training_flags import TRAINING_KEYS


def with_tools_in_system(
    messages: Sequence[Message], tools: Sequence[Tool] | None, renderer: str
) -> list[Message]:
    """The messages with the tools in the system message, calls as text, and results as users' messages.

    A conversation without tools, calls or results is the same as before. Raises RendererError, in the name of
    the renderer, for messages that have not the shape of messages.
    """
    check_tools(tools)
    plain = normalize(messages, renderer, ROLES)
    written: list[dict[str, Any]] = []
    for index, message in enumerate(plain):
        says_of_training = {key: value for key, value in messages[index].items() if key in TRAINING_KEYS}
        text = {**_as_text(message, index + 1), **says_of_training}
        follows_result = index > 0 and message["role"] == plain[index - 1]["role"] == "tool"
        if follows_result and written[-1] == {**text, "content": written[-1]["content"]}:
            written[-1]["content"] += f"\n{text['content']}"  # results in a row are one message of the user
        else:
            written.append(text)
    if tools:
        described = describe_tools(tools)
        if written[0]["role"] in ("system", "developer"):
            written[0]["content"] = "\n\n".join(filter(None, [written[0].get("content"), described]))
        else:
            written.insert(0, {"role": "system", "content": described})
    return cast("list[Message]", written)


def _as_text(message: PlainMessage, number: int) -> dict[str, Any]:
    if message["role"] == "tool":
        result = f"<tool_response>\n{message.get('content', '')}\n</tool_response>"
        return {"role": "user", "content": result}
    if not message.get("tool_calls"):
        return dict(message)
    said = message.get("content", "")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": said + print_calls(message, number, said)}
