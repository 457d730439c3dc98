"""A tokenizer's chat template: renders messages, and finds out what it supports.

The template runs in the same sandbox and with the same variables as in `apply_chat_template`, so it prints
the same text. It is called directly, because rendering a conversation takes many short calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jinja2 import nodes

from cookbook.errors import RendererError
from renderers.encoder import SENTINEL
from renderers.jinja.incremental import IncrementalTemplate
from renderers.jinja.loop_counts import NotTraceable
from renderers.jinja.loop_records import Memory
from renderers.jinja.sandbox import compiled
from renderers.messages import ROLES, THINKING_KEYS, PlainMessage, Tool, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: PlainMessage = {"role": "user", "content": "x"}

CALL: PlainMessage = {
    "role": "assistant",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
"""A reply that calls a tool."""

_TOOL: Tool = {
    "type": "function",
    "function": {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}},
}

_MOST_ROLES = 12
"""The number of roles that an error lists."""

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class Template:
    """The chat template of a tokenizer at the time this object is created."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """`kwargs` are values for variables of the template."""
        if taken := _RESERVED.intersection(kwargs):
            raise RendererError(
                f"chat_template_kwargs cannot set {', '.join(sorted(taken))}: a conversation has its own."
            )
        self.kwargs = kwargs
        self.chosen: Mapping[str, Any] = {}
        """The variables that `with_kwargs` added."""
        self._source = str(tokenizer.get_chat_template())
        self._source_with_tools = str(tokenizer.get_chat_template(tools=[{}]))
        self._plain = compiled(self._source)
        self._with_tools = compiled(self._source_with_tools)
        self._variables = {**tokenizer.special_tokens_map, "documents": None, **json_type(kwargs)}
        self._printed_roles: dict[str, bool] = {}
        self._read_keys: dict[tuple[str, str], bool] = {}

    def with_kwargs(self, more: Mapping[str, Any]) -> Template:
        """Returns this template with more values for its variables; what it supports stays the same."""
        other = copy(self)
        other.kwargs = {**self.kwargs, **more}
        other.chosen = {**self.chosen, **more}
        other._variables = {**self._variables, **json_type(more)}
        return other

    @property
    def setting(self) -> str:
        """The variables that `with_kwargs` added, as they are printed: `enable_thinking=false`."""
        return ", ".join(f"{name}={to_json(value)}" for name, value in self.chosen.items())

    @property
    def source(self) -> str:
        return self._source

    @cached_property
    def variables_read(self) -> frozenset[str]:
        """The names of all variables in the template, also of those that it sets itself."""
        loaded = {
            node.name
            for tree in self.syntax_trees()
            for node in tree.find_all(nodes.Name)
            if node.ctx == "load"
        }
        return frozenset(loaded - self._plain.environment.globals.keys())

    @property
    def variable_names(self) -> frozenset[str]:
        """The variables that the template gets from the tokenizer and from the user."""
        return frozenset(self._variables)

    def syntax_trees(self) -> list[nodes.Template]:
        sources = dict.fromkeys((self._source, self._source_with_tools))
        return [self._plain.environment.parse(source) for source in sources]

    @cached_property
    def _reads_reasoning(self) -> bool:
        """Whether the template reads thinking as `reasoning` and under no other name."""
        words = set(re.findall(r"\w+", self._source))
        return "reasoning" in words and not words & {"thinking", "reasoning_content"}

    def reads(self, role: str, key: str, value: Any) -> bool:
        """Returns whether this key changes what the template prints for a message of this role.

        It is tested on one short conversation.
        """
        if key not in self._words:
            return False
        if (role, key) not in self._read_keys:
            message: PlainMessage = {"role": role, "content": "x"}
            before: list[PlainMessage] = [] if role in ("system", "developer", "user") else [_USER]
            if role == "tool":
                before.append(self.adapted(CALL))
                message["tool_call_id"] = "call00001"
            after = [_USER] if role in ("system", "developer") else []
            try:
                with_key = self.text([*before, {**message, key: value}, *after])
                self._read_keys[role, key] = with_key != self.text([*before, message, *after])
            except RendererError:  # a template that refuses the key has read it
                self._read_keys[role, key] = True
        return self._read_keys[role, key]

    @cached_property
    def _words(self) -> frozenset[str]:
        """The attributes and strings in the template's code, which include all keys that it can read."""
        found: set[str] = set()
        for tree in self.syntax_trees():
            found.update(node.attr for node in tree.find_all(nodes.Getattr))
            found.update(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        return frozenset(found)

    def text(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None = None, prompt: bool = False
    ) -> str:
        """Returns what the template prints for the messages, with the generation prompt if requested.

        Raises RendererError if the template refuses them.
        """
        template = self._with_tools if tools else self._plain
        try:
            return template.render(
                self._variables,
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template is foreign code, and whatever it raises is its refusal
            raise _refusal(messages, error) from error

    def all_text(self) -> str:
        """Returns the template's source and what it prints for each role, which contain all of its tokens."""
        printed = [self._source]
        for role in ROLES:
            for probe in ([{"role": role, "content": "x"}, _USER], [_USER, {"role": role, "content": "x"}]):
                with suppress(RendererError):
                    printed.append(self.text(probe))
        with suppress(RendererError):
            printed.append(self.text([_USER, self.adapted(CALL), {"role": "tool", "content": "x"}], [_TOOL]))
        return "\n".join(printed)

    def traced_text(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, prompt: bool, memory: Memory
    ) -> str | None:
        """Returns the text of the messages, reusing earlier runs; None if the template cannot be traced."""
        template = self._incremental_with_tools if tools else self._incremental
        if template is None or not template.is_traceable or not memory.is_of_use:
            return None
        variables = {**self._variables, "tools": tools or None, "add_generation_prompt": prompt}
        try:
            return template.text(messages, variables, memory)
        except NotTraceable:
            return None
        except Exception as error:  # a template is foreign code, and whatever it raises is its refusal
            raise _refusal(messages, error) from error

    @cached_property
    def _incremental(self) -> IncrementalTemplate | None:
        return IncrementalTemplate.of(self._source)

    @cached_property
    def _incremental_with_tools(self) -> IncrementalTemplate | None:
        return IncrementalTemplate.of(self._source_with_tools)

    # -- what the template supports -----------------------------------------------------------

    def prints(self, role: str) -> bool:
        """Returns whether the template prints messages of this role, or refuses every trial conversation."""
        if role not in self._printed_roles:
            message: PlainMessage = {"role": role, "content": SENTINEL}
            result = {"role": "tool", "content": SENTINEL, "name": "f", "tool_call_id": "call00001"}
            probes = {
                "system": [[message, _USER]],
                "developer": [[message, _USER]],
                "tool": [[_USER, message], [_USER, self.adapted(CALL), result]],
            }
            texts: list[str] = []
            for probe in probes.get(role, [[_USER, message]]):
                with suppress(RendererError):
                    texts.append(self.text(probe))
            self._printed_roles[role] = not texts or any(SENTINEL in text for text in texts)
        return self._printed_roles[role]

    def prints_tools(self) -> bool:
        """Returns whether the template prints descriptions of tools."""
        function = {
            "name": "f",
            "description": SENTINEL,
            "parameters": {"type": "object", "properties": {}},
        }
        with suppress(RendererError):
            return SENTINEL in self.text([_USER], [{"type": "function", "function": function}])
        return False

    @cached_property
    def _call_form(self) -> tuple[bool, bool] | None:
        """Whether a call needs JSON arguments, and whether it needs content; None without tool calls."""
        call, sentinels = stand_in_for(CALL)
        for as_json, with_content in [(False, False), (False, True), (True, False), (True, True)]:
            with suppress(RendererError):
                text = self.text([_USER, _in_form(call, as_json, with_content)])
                if all(sentinel in text for sentinel in sentinels.values()):
                    return as_json, with_content
        return None

    @cached_property
    def prints_json_arguments(self) -> bool:
        """Whether the template prints arguments of a call that are given as a JSON string."""
        as_json, with_content = self._call_form or (False, False)
        call = _in_form(CALL, as_json, with_content)
        function = {"name": "f", "arguments": to_json({SENTINEL: 0})}
        call["tool_calls"] = [{**call["tool_calls"][0], "function": function}]
        with suppress(RendererError):
            return SENTINEL in self.text([_USER, call])
        return False

    @cached_property
    def refusal_of_calls(self) -> str:
        """What the template raises for a call, if it refuses each form of one; empty if it prints nothing."""
        try:
            self.text([_USER, _in_form(CALL, as_json=True, with_content=True)])
        except RendererError as error:
            return str(error.__cause__)
        return ""

    @property
    def prints_calls(self) -> bool:
        return self._call_form is not None

    @cached_property
    def _needs_content(self) -> bool:
        thought = {"role": "assistant", "reasoning_content": "x", "thinking": "x"}
        try:
            self.text([_USER, thought])
        except RendererError:
            return True
        return False

    def adapted(self, message: PlainMessage) -> PlainMessage:
        """Returns a message in plain JSON types, with its thinking under each name that templates read.

        If the template would otherwise refuse the message, arguments of a tool call are given as a JSON
        string, and missing content as an empty string.
        """
        if len(message) == 2 and type(message["role"]) is type(message.get("content")) is str:
            return message  # most messages
        adapted: PlainMessage = {key: json_type(value) for key, value in message.items()}
        thought = next((adapted[key] for key in THINKING_KEYS if key in adapted), None)
        if thought is not None:
            adapted = {"thinking": thought, **adapted, "reasoning_content": thought}
            if self._reads_reasoning:
                adapted["reasoning"] = thought
        if adapted.get("tool_calls"):
            return _in_form(adapted, *(self._call_form or (False, False)))
        if "content" not in adapted and self._needs_content:
            adapted["content"] = ""
        return adapted


def _refusal(messages: Sequence[PlainMessage], error: Exception) -> RendererError:
    roles = ", ".join(message["role"] for message in messages[:_MOST_ROLES])
    if len(messages) > _MOST_ROLES:
        roles += f", ... ({len(messages):,} messages)"
    return RendererError(f"The chat template refuses messages of roles {roles}: {error}")


# -- messages -----------------------------------------------------------------------------------


def _in_form(message: PlainMessage, as_json: bool, with_content: bool) -> PlainMessage:
    formed = {"content": "", **message} if with_content else dict(message)
    if as_json:
        formed["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
    return formed


def _with_json_arguments(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_json_arguments(call["function"])}
    if isinstance(call.get("arguments"), dict):
        return {**call, "arguments": to_json(call["arguments"])}
    return call


def stand_in_for(message: PlainMessage) -> tuple[PlainMessage, dict[str, str]]:
    """Returns a reply with sentinels for everything that the model must write, and the sentinels by name."""
    sentinels: dict[str, str] = {}

    def sentinel(name: str) -> str:
        return sentinels.setdefault(name, f"{SENTINEL}{len(sentinels)};")

    def replaced(function: Any, name: str) -> Any:
        if not isinstance(function, dict):
            return function
        if isinstance(function.get("function"), dict):
            return {**function, "function": replaced(function["function"], name)}
        arguments: Any = sentinel(f"{name}.arguments")
        if isinstance(function.get("arguments"), dict):
            arguments = {arguments: 0}
        return {**function, "name": sentinel(f"{name}.name"), "arguments": arguments}

    changed = dict(message)
    for key in ("content", "reasoning_content"):
        if message.get(key):
            changed[key] = sentinel(key)
    if "reasoning_content" in changed:
        for key in {"thinking", *(name for name in THINKING_KEYS if name in message)}:
            changed[key] = changed["reasoning_content"]
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            replaced(call, f"tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
    return changed, sentinels


def json_type(value: Any) -> Any:
    """Returns the value in exact JSON types: a template is foreign code, and gets no other objects.

    A value that JSON cannot represent becomes one that raises an error when the template reads it.
    """
    kind = type(value)
    if kind is str or value is None or kind in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {json_type(key): json_type(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_type(item) for item in value]
    if isinstance(value, np.generic):
        return json_type(value.item())
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    return jinja2.StrictUndefined(f"a {kind.__name__} is not JSON")
