"""Configs as text: what a run records, and what `config=` reads.

A chz object is an object whose `_type` names its class; everything else is a JSON value.
"""

from __future__ import annotations

import enum
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chz
from chz.blueprint import Castable

from cookbook.errors import ConfigError

TYPE_KEY = "_type"


def to_json(value: Any) -> Any:
    """A config as JSON values, with every default and derived value resolved."""
    if chz.is_chz(value):
        fields = {name: to_json(getattr(value, name)) for name in chz.chz_fields(value)}
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


def load(path: str) -> dict[str, Any]:
    """The keys of a YAML or JSON config file, dotted, as a blueprint takes them."""
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"config={path!r}: there is no such file.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={path!r} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config={path!r} holds no keys. Write one `key: value` a line.")
    values.pop(TYPE_KEY, None)
    return flatten(values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted keys. Scalars are cast by the field they are for, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            value = dict(value)
            if TYPE_KEY in value:
                flat[path] = Castable(importable(value.pop(TYPE_KEY)))
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list):
            if not value:
                flat[path] = []
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{path}.")
        else:
            flat[path] = value if value is None or isinstance(value, bool) else Castable(str(value))
    return flat


def importable(name: str) -> str:
    """`module:Class`, checked, so that a config from elsewhere fails with the name that is missing."""
    module, _, attribute = name.partition(":")
    try:
        value = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{TYPE_KEY}: {name} cannot be imported ({error}).") from error
    return name


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two JSON configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in old.keys() | new.keys():
            found |= differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return differences(dict(enumerate(old)), dict(enumerate(new)), prefix)
    return {} if old == new else {prefix.rstrip("."): (old, new)}
