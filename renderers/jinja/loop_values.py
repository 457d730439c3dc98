"""Compares values as a template can, and defines namespaces whose attributes can be traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, Protocol

from jinja2.runtime import Undefined

from renderers.jinja.private import Namespace, attributes_of, set_attributes

_SCALARS = (str, int, float, bool, type(None))

ABSENT = object()
"""The value of an attribute that a namespace does not have."""


class AttributeTracer(Protocol):
    """Receives each attribute of a namespace that is read or set."""

    def read(self, attributes: Attributes, name: str, value: Any) -> None: ...

    def set(self, attributes: Attributes, name: str, value: Any) -> None: ...

    def read_all(self, attributes: Attributes) -> None: ...


class Attributes(dict[str, Any]):
    """The attributes of a namespace. A visit may trace reads and writes."""

    visit: AttributeTracer | None = None

    def __getitem__(self, name: str) -> Any:
        value = super().get(name, ABSENT)
        if self.visit is not None:
            self.visit.read(self, name, value)
        if value is ABSENT:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if self.visit is not None:
            self.visit.set(self, name, value)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        if self.visit is not None:
            self.visit.read_all(self)  # it prints all attributes
        return super().__repr__()

    def become(self, values: Mapping[str, Any]) -> None:
        self.clear()
        self.update(values)


def traced_namespace(kind: type[Namespace]) -> type[Namespace]:
    """Returns a subclass of this kind of namespace whose attributes can be traced."""

    class TracedNamespace(kind):  # type: ignore[misc, valid-type]
        def __init__(*given: Any, **attributes: Any) -> None:
            kind.__init__(*given, **attributes)
            set_attributes(given[0], Attributes(attributes_of(given[0])))

    return TracedNamespace


def same(one: Any, other: Any) -> bool:
    """Returns whether a template cannot distinguish the two values.

    A namespace, like any other object, is the same only as itself.
    """
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is float:
        return repr(one) == repr(other)  # 0.0 == -0.0
    if kind in _SCALARS:
        return bool(one == other)
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if kind is dict:
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return (kind is range and one == other) or isinstance(one, Undefined)


def is_frozen(value: Any) -> bool:
    """Returns whether nothing can change this value. The sandbox prevents changes of lists and dicts."""
    kind = type(value)
    if kind in (list, tuple):
        return all(map(is_frozen, value))
    if kind is dict:
        return all(map(is_frozen, value.values()))
    return kind in _SCALARS or kind is range or isinstance(value, Undefined)


def are_frozen(states: Sequence[Mapping[str, Any]]) -> bool:
    return all(is_frozen(value) for state in states for value in state.values())


def length_of_common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the number of first items that are the same objects in both."""
    if one is other:
        return len(one)
    least = min(len(one), len(other))
    if type(one) is type(other) is range:
        return least if not least or (one[0], one.step) == (other[0], other.step) else 0
    if all(map(is_, one, other)):
        return least
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a is not b)
