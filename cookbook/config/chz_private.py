"""Collects every undocumented part of chz that is used here, to be checked when chz changes.

`tests/cookbook/config/test_chz_private.py` checks what each of them does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from chz import chz_fields
from chz.blueprint import Blueprint
from chz.blueprint._entrypoint import EntrypointException, EntrypointHelpException
from chz.factories import MetaFromString, standard
from chz.tiepin import CastError, is_subtype_instance

__all__ = [
    "CHECKED_WITH", "NOTE_OF_AN_ARGUMENT", "CastError", "EntrypointException", "EntrypointHelpException",
    "Param", "Params", "can_be_cast", "class_defaults", "class_named", "default_of", "given_value",
    "is_subtype_instance", "missing_params", "param_of_an_item", "params_of", "plain_default", "value_at",
]  # fmt: skip

CHECKED_WITH = "0.4.0"
"""The version of chz with which this file was checked."""

NOTE_OF_AN_ARGUMENT = " (when "
"""The prefix of the notes with which chz says which argument it was evaluating when an error was raised."""

Param = Any
"""A parameter of a blueprint: `type`, `doc`, `default`, `meta_factory`, `cast`."""

Params = Mapping[str, Param]
"""Parameters by their dotted keys."""


def params_of(blueprint: Blueprint[Any]) -> dict[str, Param]:
    """Returns every parameter that can be set, given the classes that the blueprint has now."""
    return {key: param for key, param in blueprint._make_lazy().all_params.items() if key}


def missing_params(blueprint: Blueprint[Any]) -> dict[str, Param]:
    """Returns the parameters that must be set and are not."""
    found = blueprint._make_lazy()
    return {key: found.all_params[key] for key in found.missing_params}


def value_at(blueprint: Blueprint[Any], key: str) -> tuple[Any] | None:
    """Returns the value that a blueprint sets at a dotted key, in a tuple; None if it sets none.

    Call `params_of` first, because chz merges the layers of a blueprint there.
    """
    found = blueprint._arg_map.get_kv(key)
    return None if found is None else (found.value,)


def given_value(config: Any, name: str) -> Any:
    """Returns the value of a chz object's field before its munger changed it."""
    return getattr(config, f"X_{name}")


def default_of(param: Param) -> tuple[Any] | None:
    """Returns the default of a parameter, in a tuple; None if the parameter must be set."""
    return None if param.default is None else (param.default.instantiate(),)


def class_defaults(kind: type[Any]) -> dict[str, Any]:
    """Returns the defaults of a chz class by field name. A field without a default has chz's own marker."""
    defaults = {}
    for field in chz_fields(kind).values():
        factory = field._default_factory
        defaults[field.logical_name] = factory() if callable(factory) else field._default
    return defaults


def plain_default(kind: type[Any], name: str) -> tuple[Any] | None:
    """Returns the default of a chz class's field, in a tuple; None for no such field.

    Of default factories only `list` has a known value, an empty list.
    """
    field = chz_fields(kind).get(name)
    if field is not None and field._default_factory is list:
        return ([],)
    return None if field is None or callable(field._default_factory) else (field._default,)


def param_of_an_item(above: Param, key: str, kind: Any) -> Param:
    """Returns the parameter for an item of type `kind`, given that of the list or the mapping above it."""
    return dataclasses.replace(
        above, name=key, type=kind, meta_factory=standard(annotation=kind), default=None
    )


def can_be_cast(param: Param, text: str) -> bool:
    """Returns whether a text can be turned into a value of the parameter's type."""
    try:
        param.cast(text)
    except CastError:
        return False
    return True


def class_named(param: Param, name: str) -> Any:
    """Returns the object for the name `module:Class`, or for that of a subclass known to the parameter.

    Returns None if the parameter takes no objects, or none of this name.
    """
    if param.meta_factory is None:
        return None
    try:
        return param.meta_factory.from_string(name)
    except MetaFromString:
        return None
