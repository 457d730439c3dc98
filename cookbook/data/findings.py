"""Counts what the report of a source mentions: peculiarities of conversations that can be rendered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cookbook.data.columns import EMPTY
from cookbook.data.conversation import UNREAD_MESSAGE_KEYS, Conversation
from cookbook.data.media import count_placeholders
from cookbook.utils import notes
from renderers.messages import THINKING_KEYS
from renderers.training_flags import TRAINING_KEYS

if TYPE_CHECKING:
    from renderers import Renderer

_KEYS = {"role", "content", "tool_calls", "tool_call_id", *THINKING_KEYS, *TRAINING_KEYS}
"""Keys of a message that every renderer reads."""


def count_findings(conversation: Conversation, renderer: Renderer) -> None:
    """Counts message keys that nothing reads, calls without tool schemas, and placeholders for media."""
    num_calls = 0
    speakers = {m.get("name") for m in conversation.messages if m["role"] == "assistant" and m.get("name")}
    if len(speakers) > 1:
        notes.count("conversation", "had replies under several names, all of which are trained")
    for message in conversation.messages:
        # The name of a tool is used to find the call that a result answers.
        known = {*_KEYS, "name"} if message["role"] == "tool" else _KEYS
        for key, value in message.items():
            if (
                key not in known
                and value not in EMPTY
                and not renderer.reads_key(message["role"], key, value)
            ):
                notes.count("message", UNREAD_MESSAGE_KEYS, str(key))
        num_calls += len(message.get("tool_calls") or ())
    if num_calls and not conversation.tools:
        notes.count("call", "stood in a row without tool schemas", number=num_calls)
    if renderer.tools_in_system and (conversation.tools or num_calls):
        notes.count("conversation", "had tools and calls written as text (tools_in_system=True)")
    for name in renderer.unread_template_kwargs():
        notes.count("conversation", "template_kwargs that the chat template does not read", name)
    if conversation.template_kwargs:
        given = json.dumps(conversation.template_kwargs, ensure_ascii=False, sort_keys=True, default=str)
        notes.count("row", "Given to the chat template", given)
    heard = [message.get("content") for message in conversation.messages if message["role"] != "assistant"]
    count_placeholders(text for text in (*heard, conversation.text) if isinstance(text, str))
