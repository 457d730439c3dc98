"""Configs as text: the records of runs, and the files that `config=` reads.

A chz object is a JSON object whose `_type` names its class. Everything else is a JSON value.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
from chz.blueprint import Castable

from cookbook.config.chz_private import plain_default
from cookbook.errors import ConfigError

if TYPE_CHECKING:
    from cookbook.config.documents import KeyPath

TYPE_KEY = "_type"

OWN_PACKAGES = ("cookbook", "recipes", "renderers")
"""The packages of this project. Other modules are imported only if the user names them."""


def to_json(value: Any) -> Any:
    """Returns a config as JSON values, with every default and derived value resolved."""
    if chz.is_chz(value):
        names = [name for name in chz.chz_fields(value) if name not in UNRECORDED_KEYS]
        fields = {name: to_json(getattr(value, name)) for name in names}
        return {TYPE_KEY: _qualified_name(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type) or callable(value):
        return {TYPE_KEY: _qualified_name(value)}
    return value


def _qualified_name(value: Any) -> str:
    return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"


COMMAND_LINE = "command line"
UNRECORDED_KEYS = ("notify",)
"""Keys that a run does not record, and that no record sets: a command of somebody else, or a secret URL."""


@dataclass(frozen=True)
class Setting:
    """One key as it was written, in full or by its last part."""

    key: str
    value: Any
    """Text to be cast to the field's type (Castable), None, True or False; [] before a list's items."""
    place: str
    """Where it was written: COMMAND_LINE, or a file and its line."""


def read_settings(path: str) -> tuple[list[Setting], list[str]]:
    """Returns the settings of a YAML or JSON config file, and one sentence for each repeated key."""
    from cookbook.config.documents import read_document

    document = read_document(path)
    if not isinstance(document.values, dict):
        raise ConfigError(f"config={path} holds no keys. Write one `key: value` per line.")
    leaves = _leaves(document.values)
    if TYPE_KEY in document.values:  # the file is the record of a run, and may be untrusted
        if found := [key for key in UNRECORDED_KEYS if key in document.values]:
            raise ConfigError(
                f"config={path} is the record of a run, and sets {found[0]}, which no run records. Remove "
                f"it, and give {found[0]}= on the command line."
            )
        leaves = (
            (at, RecordedClassName(one.value) if isinstance(one, ClassName) else one) for at, one in leaves
        )
    return [Setting(".".join(at), value, document.place(at)) for at, value in leaves], document.repeated


def load(path: str) -> dict[str, Any]:
    """Returns the dotted keys of a YAML or JSON config file, in the form that a blueprint takes."""
    settings, repeated = read_settings(path)
    if repeated:
        raise ConfigError("\n".join(repeated))
    return _without_marks({setting.key: setting.value for setting in settings})


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values by dotted keys. Scalars are cast to their field's type."""
    flat = {".".join(path): value for path, value in _leaves(values)}
    for value in flat.values():
        if isinstance(value, ClassName):
            importable(value.value)
    return _without_marks(flat)


def _without_marks(flat: dict[str, Any]) -> dict[str, Any]:
    """Removes the [] and {} that precede the items of a list or a mapping that is not empty."""

    def has_items(key: str) -> bool:
        return any(other.startswith(f"{key}.") for other in flat)

    return {
        key: value for key, value in flat.items() if not isinstance(value, list | dict) or not has_items(key)
    }


class NoValue(Castable):
    """The placeholder for the missing value of a `--key`."""


class WrittenValue(Castable):
    """A number or text of a config file, as text to cast and as it was written."""

    def __init__(self, written: Any) -> None:
        super().__init__(str(written))
        self.written = written


@dataclass(frozen=True)
class MappingValue:
    """The value of a mapping of plain values: all of it, or the items that its keys set."""

    items: Mapping[str, Any]
    is_whole: bool


class ClassName(Castable):
    """`module:Class`, the value of a `_type`."""


class RecordedClassName(ClassName):
    """The value of a `_type` in the record of a run. It names code, but is treated as data."""


def is_own(module: str) -> bool:
    return module.partition(".")[0] in OWN_PACKAGES


def is_foreign(name: str) -> bool:
    """Returns whether this class is in a module outside of this project that would have to be imported."""
    module = name.partition(":")[0] if ":" in name else name.rpartition(".")[0]
    return bool(module) and not is_own(module) and module not in sys.modules


def foreign_classes(config: Any, key: str = "") -> dict[str, str]:
    """Returns the classes outside of this project in a JSON config, by their dotted keys."""
    found: dict[str, str] = {}
    if isinstance(config, Mapping):
        name = config.get(TYPE_KEY)
        if key and isinstance(name, str) and not is_own(name.partition(":")[0]):
            found[key] = name
        for below, value in config.items():
            found |= foreign_classes(value, f"{key}.{below}" if key else str(below))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            found |= foreign_classes(value, f"{key}.{index}")
    return found


def _leaves(values: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the value at each path: text to cast, None, True or False; [] before the items of a list."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == TYPE_KEY:
                if path:
                    yield path, ClassName(current_name(str(value)))
            else:
                yield from _leaves(value, (*path, str(key)))
        if path and not values:
            yield path, {}
    elif isinstance(values, list):
        yield path, []
        for index, value in enumerate(values):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield path, values if values is None or isinstance(values, bool) else WrittenValue(values)


def importable(name: str) -> str:
    """Returns `module:Class` after checking that it exists. Raises ConfigError with the missing name."""
    _imported(name)
    return name


_MOVED = {
    "cookbook.supervised.nll_evaluator": "cookbook.eval.nll",
    "cookbook.supervised.preview": "cookbook.data.preview",
    "cookbook.eval.inspect_tasks": "cookbook.eval.integrations.inspect",
    "cookbook.eval.harness_tasks": "cookbook.eval.integrations.lm_eval",
    "cookbook.supervised.types": "cookbook.data.types",
    "cookbook.supervised.data": "cookbook.data",
}
"""Modules that recorded configs name and that have moved, including the modules below them."""


def current_name(name: str) -> str:
    """Returns `module:Class` under the module's current name, which may differ in recorded configs."""
    module, colon, attribute = name.partition(":")
    for old, new in _MOVED.items():
        if module == old or module.startswith(f"{old}."):
            return f"{new}{module.removeprefix(old)}{colon}{attribute}"
    return name


def _imported(name: str) -> Any:
    module, _, attribute = current_name(name).partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{TYPE_KEY}: {name} cannot be imported ({error}).") from error
    return value


def with_defaults(old: Any, new: Any) -> Any:
    """Returns a recorded config with the defaults of fields that its classes have gained since.

    `new` is the config it is compared with. A field that only `new` has, with its default value, is not a
    difference.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [with_defaults(one, other) for one, other in zip(old, new, strict=True)]
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old
    filled = {key: with_defaults(value, new.get(key)) for key, value in old.items()}
    if not isinstance(old.get(TYPE_KEY), str):
        return filled
    filled[TYPE_KEY] = current_name(old[TYPE_KEY])
    if filled[TYPE_KEY] == new.get(TYPE_KEY):
        for key in new.keys() - old.keys():
            if plain_default(_imported(filled[TYPE_KEY]), key) == (new[key],):
                filled[key] = new[key]
    return filled


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys whose values differ between two JSON configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in old.keys() | new.keys():
            found |= differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return differences(dict(enumerate(old)), dict(enumerate(new)), prefix)
    return {} if old == new else {prefix.rstrip("."): (old, new)}
