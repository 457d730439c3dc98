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
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

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
_SYSTEM: PlainMessage = {"role": "system", "content": "x"}
_OTHER_THINKING_KEY = re.compile(r"(?:\.|\[['\"]|get\(['\"])(\w*(?:thought|think|reason)\w*)")
"""A key of a message that may hold its thinking, where a template reads it."""

CALL: PlainMessage = {
    "role": "assistant",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
"""A reply that calls a tool."""

_TOOL: Tool = {
    "type": "function",
    "function": {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}},
}

_SPELLED_PART = re.compile("""['"](?:type|text|thinking)['"]: """)
"""A list of parts that a template prints as it is."""

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
        self.source = str(tokenizer.get_chat_template())
        self._source_with_tools = str(tokenizer.get_chat_template(tools=[{}]))
        self._plain = compiled(self.source)
        self._with_tools = compiled(self._source_with_tools)
        self._variables = {**tokenizer.special_tokens_map, "documents": None, **json_type(kwargs)}
        self._printed_roles: dict[str, bool] = {}
        self._read_keys: dict[tuple[str, str], bool] = {}
        self._part_roles: dict[str, bool] = {}

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
        sources = dict.fromkeys((self.source, self._source_with_tools))
        return [self._plain.environment.parse(source) for source in sources]

    @cached_property
    def _reads_reasoning(self) -> bool:
        """Whether the template reads thinking as `reasoning` and under no other name."""
        words = set(re.findall(r"\w+", self.source))
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
                with_key = self._tried([*before, {**message, key: value}, *after])
                self._read_keys[role, key] = with_key != self._tried([*before, message, *after])
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

    @cached_property
    def opening(self) -> list[PlainMessage]:
        """What trials begin with: a system message if the template refuses a conversation without one."""
        for opening, content in product(([], [_SYSTEM]), ("x", _text_parts("x"))):
            with suppress(RendererError):
                self.text([{**message, "content": content} for message in (*opening, _USER)], prompt=True)
                return [*opening]
        return []

    def trial(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None = None, prompt: bool = False
    ) -> str:
        """Returns what the template prints for messages of a trial, behind its `opening`."""
        is_opened = bool(messages) and messages[0]["role"] in ("system", "developer")
        opening = [] if is_opened else map(self.adapted, self.opening)
        return self.text([*opening, *messages], tools, prompt)

    def _tried(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None = None) -> str:
        """Returns what the template prints for messages of a trial that are not yet in its form."""
        return self.trial([self.adapted(message) for message in messages], tools)

    def all_text(self) -> str:
        """Returns the template's source and what it prints for each role, which contain all of its tokens."""
        printed = [self.source]
        for role in ROLES:
            for probe in ([{"role": role, "content": "x"}, _USER], [_USER, {"role": role, "content": "x"}]):
                with suppress(RendererError):
                    printed.append(self._tried(probe))
        with suppress(RendererError):
            printed.append(self._tried([_USER, CALL, {"role": "tool", "content": "x"}], [_TOOL]))
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
        return IncrementalTemplate.of(self.source)

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
                "tool": [[_USER, message], [_USER, CALL, result]],
            }
            texts: list[str] = []
            for probe in probes.get(role, [[_USER, message]]):
                with suppress(RendererError):
                    texts.append(self._tried(probe))
            self._printed_roles[role] = not texts or any(SENTINEL in text for text in texts)
        return self._printed_roles[role]

    def prints_tools(self) -> bool:
        """Returns whether the template prints descriptions of tools, if only behind a system message."""
        return self._prints_tools(_USER) or self.needs_system_for_tools

    @cached_property
    def needs_system_for_tools(self) -> bool:
        """Whether the template prints descriptions of tools only if there is a system message."""
        return not self._prints_tools(_USER) and self._prints_tools(_SYSTEM, _USER)

    def _prints_tools(self, *messages: PlainMessage) -> bool:
        some = {"k": {"type": "string", "description": "x"}}
        for properties in ({}, some):
            function = {
                "name": f"f{SENTINEL}",
                "description": SENTINEL,
                "parameters": {"type": "object", "properties": properties},
            }
            with suppress(RendererError):
                text = self._tried([*messages], [{"type": "function", "function": function}])
                return SENTINEL in text or repr(SENTINEL)[1:-1] in text
        return False

    @cached_property
    def _call_form(self) -> _CallForm | None:
        """The form of a call that the template prints in full; None if it prints none."""
        call, sentinels = stand_in_for(_in_form(CALL, _CallForm(by_id=True)))
        for by_id, as_json, with_content in product((False, True), repeat=3):
            form = _CallForm(as_json, with_content, by_id)
            message = (
                call if by_id else {**call, "tool_calls": [{**call["tool_calls"][0], "id": "call00001"}]}
            )
            with suppress(RendererError):
                text = self.trial([self.adapted(_USER), _in_form(message, form)])
                if all(sentinel in text for sentinel in sentinels.values()):
                    return form
        return None

    @cached_property
    def prints_json_arguments(self) -> bool:
        """Whether the template prints arguments of a call that are given as a JSON string."""
        form = self._call_form or _CallForm()
        call = _in_form(CALL, form)
        function = {"name": "f", "arguments": to_json({SENTINEL: 0})}
        call["tool_calls"] = [{**call["tool_calls"][0], "function": function}]
        with suppress(RendererError):
            return SENTINEL in self.trial([self.adapted(_USER), call])
        return False

    @property
    def prints_calls_by_id(self) -> bool:
        """Whether the template prints a function's name only as a part of the call's id, as Kimi K2.5's."""
        return self._call_form is not None and self._call_form.by_id

    @cached_property
    def refusal_of_calls(self) -> str:
        """What the template raises for a call, if it refuses each form of one; empty if it prints nothing."""
        try:
            self.trial([self.adapted(_USER), _in_form(CALL, _CallForm(as_json=True, with_content=True))])
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
            self.trial([self.adapted(_USER), thought])
        except RendererError:
            return True
        return False

    def _takes_parts(self, role: str) -> bool:
        """Returns whether the template prints the content of this role only if it is a list of parts."""
        if role not in self._part_roles:
            self._part_roles[role] = False
            before = [] if role in ("system", "developer", "user") else [self.adapted(_USER)]
            after = [self.adapted(_USER)] if role in ("system", "developer") else []
            found = [
                self._prints_sentinel([*before, {"role": role, "content": content}, *after])
                for content in (SENTINEL, _text_parts(SENTINEL))
            ]
            self._part_roles[role] = found == [False, True]
        return self._part_roles[role]

    @cached_property
    def _thinking_key(self) -> str | None:
        """The key under which the template reads thinking if it is none of the usual ones (MiniCPM3)."""
        message: PlainMessage = {"role": "assistant", "content": "x"}
        user = self.adapted(_USER)
        for key in dict.fromkeys(_OTHER_THINKING_KEY.findall(self.source)):
            if key not in THINKING_KEYS and self._prints_sentinel([user, {**message, key: SENTINEL}]):
                usual = {**message, **dict.fromkeys(THINKING_KEYS, SENTINEL)}
                return None if self._prints_sentinel([user, usual]) else str(key)
        return None

    @cached_property
    def _takes_thinking_parts(self) -> bool:
        """Whether the template prints thinking only as a part of the content (Ministral 3)."""
        named = {"reasoning_content": SENTINEL, "reasoning": SENTINEL, "thinking": SENTINEL}
        reply: PlainMessage = {"role": "assistant", "content": "x"}
        user = self.adapted(_USER)
        return not self._prints_sentinel([user, {**reply, **named}]) and self._prints_sentinel(
            [user, {**reply, "content": _text_parts("x", SENTINEL)}]
        )

    def _prints_sentinel(self, messages: Sequence[PlainMessage]) -> bool:
        """Returns whether the template prints the sentinel in the messages, and not as it spells a list."""
        with suppress(RendererError):
            text = self.trial(messages)
            return SENTINEL in text and not _SPELLED_PART.search(text)
        return False

    def adapted(self, message: PlainMessage) -> PlainMessage:
        """Returns a message in plain JSON types, with its thinking under each name that templates read.

        If the template would otherwise refuse the message or not print it, arguments of a tool call are given
        as a JSON string, missing content as an empty string, and content and thinking as a list of parts.
        """
        is_plain = len(message) == 2 and type(message["role"]) is type(message.get("content")) is str
        if is_plain and not self._takes_parts(message["role"]):
            return message  # most messages
        adapted: PlainMessage = {key: json_type(value) for key, value in message.items()}
        thought = next((adapted[key] for key in THINKING_KEYS if key in adapted), None)
        if thought is not None:
            adapted = {"thinking": thought, **adapted, "reasoning_content": thought}
            if self._reads_reasoning:
                adapted["reasoning"] = thought
            if self._thinking_key is not None:
                adapted = {self._thinking_key: thought, **adapted}
        if adapted.get("tool_calls"):
            adapted = _in_form(adapted, self._call_form or _CallForm())
        elif "content" not in adapted and self._needs_content:
            adapted["content"] = ""
        content = adapted.get("content", "")
        if isinstance(content, str) and thought and self._takes_thinking_parts:
            adapted["content"] = _text_parts(content, thought)
        elif isinstance(content, str) and content and self._takes_parts(adapted["role"]):
            adapted["content"] = _text_parts(content)
        return adapted


def _text_parts(text: str, thought: str = "") -> list[dict[str, str]]:
    parts = [{"type": "thinking", "thinking": thought}] if thought else []
    return [*parts, {"type": "text", "text": text}] if text else parts


def _refusal(messages: Sequence[PlainMessage], error: Exception) -> RendererError:
    roles = ", ".join(message["role"] for message in messages[:_MOST_ROLES])
    if len(messages) > _MOST_ROLES:
        roles += f", ... ({len(messages):,} messages)"
    return RendererError(f"The chat template refuses messages of roles {roles}: {error}")


# -- messages -----------------------------------------------------------------------------------


class _CallForm(NamedTuple):
    """The form in which a template takes a tool call."""

    as_json: bool = False
    """Whether the arguments are a JSON string."""
    with_content: bool = False
    """Whether the message needs content."""
    by_id: bool = False
    """Whether the name of the function is printed only as a part of the call's id."""


def _in_form(message: PlainMessage, form: _CallForm) -> PlainMessage:
    formed = {"content": "", **message} if form.with_content else dict(message)
    if form.as_json:
        formed["tool_calls"] = [_with_json_arguments(call) for call in formed["tool_calls"]]
    if form.by_id:
        formed["tool_calls"] = [call_with_id(call, n) for n, call in enumerate(formed["tool_calls"])]
    return formed


def call_with_id(call: Any, number: int) -> Any:
    """Returns a call whose id has the name of its function; a new one is `functions.NAME:NUMBER`."""
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or _name_in_id(name).search(str(call.get("id", ""))):
        return call
    return {**call, "id": f"functions.{name}:{number}"}


def _name_in_id(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


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
            call = {**function, "function": replaced(function["function"], name)}
            if isinstance(call.get("id"), str) and isinstance(function["function"].get("name"), str):
                own = _name_in_id(function["function"]["name"])
                call["id"] = own.sub(sentinel(f"{name}.name"), call["id"])
            return call
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
