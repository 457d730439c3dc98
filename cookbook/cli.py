"""The command line of every recipe: key=value over a config file over the recipe's defaults."""

from __future__ import annotations

import asyncio
import difflib
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import chz
from chz.blueprint import Blueprint, Castable
from chz.blueprint._entrypoint import EntrypointException, EntrypointHelpException

from cookbook.errors import ConfigError, CookbookError, describe

T = TypeVar("T")
R = TypeVar("R")


def make_config(
    target: type[T], defaults: Mapping[str, Any], argv: Sequence[str], prog: str = "recipe"
) -> T:
    """The config that `argv` asks for. Later wins: `defaults`, then `config=<file>`, then the other keys.

    A key that is no field of the config itself names a nested field by its last part, so
    `batch_size=8` reaches `dataset_builder.common_config.batch_size`. Raises ConfigError for an
    unknown key or an impossible value, and EntrypointHelpException where help is asked for.
    """
    blueprint = Blueprint(target).apply(dict(defaults), layer_name=f"{prog}'s defaults")
    values: dict[str, str] = {}
    for argument in argv:
        if argument in ("--help", "-h", "help"):
            raise EntrypointHelpException(_help(blueprint, prog))
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"{argument!r} is no setting. Write key=value, or --help for the keys.")
        values[key.removeprefix("--")] = value
    if (path := values.pop("config", None)) is not None:
        from cookbook import config_files

        blueprint.apply(_full_keys(blueprint, config_files.load(path)), layer_name=path)
    arguments = {key: Castable(value) for key, value in values.items()}
    blueprint.apply(_full_keys(blueprint, arguments), layer_name="command line")
    try:
        return blueprint.make()
    except EntrypointException as error:
        raise ConfigError(_explain(blueprint, str(error))) from error


def run(
    target: type[T],
    main: Callable[[T], Coroutine[Any, Any, R]],
    defaults: Mapping[str, Any],
    prog: str,
    argv: Sequence[str] | None = None,
) -> R:
    """A recipe's whole command line. Errors raised on purpose end it in a few lines and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return asyncio.run(main(make_config(target, defaults, argv, prog)))
    except EntrypointHelpException as help_text:
        print(help_text)
        sys.exit(0)
    except CookbookError as error:
        print(describe(error), file=sys.stderr)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _nested_fields(blueprint: Blueprint[Any]) -> list[str]:
    """The dotted path of every field there is to set, as this blueprint stands."""
    return list(blueprint._make_lazy().all_params)


def _full_keys(blueprint: Blueprint[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Completes short keys. A class chosen by one key decides which fields the others may name."""
    if not values:
        return {}
    probe = blueprint.clone().apply({key: value for key, value in values.items() if "." in key or _is_type(value)})
    fields = _nested_fields(probe)
    full: dict[str, Any] = {}
    for key, value in values.items():
        if key in fields or "..." in key:
            full[key] = value
            continue
        matches = [path for path in fields if path.endswith(f".{key}")]
        if not matches and key.split(".")[0] not in {path.split(".")[0] for path in fields}:
            raise ConfigError(_unknown_key(key, fields))
        for path in matches or [key]:
            full[path] = value
    return full


def _is_type(value: Any) -> bool:
    return isinstance(value, Castable) and ":" in value.value


def _unknown_key(key: str, fields: Sequence[str]) -> str:
    by_name = {path.rsplit(".", 1)[-1]: path for path in fields}
    near = difflib.get_close_matches(key, [*by_name, *fields], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no key {key!r}.{hint} Run with --help to see the keys."


def _explain(blueprint: Blueprint[Any], message: str) -> str:
    return message.strip()


def _help(blueprint: Blueprint[Any], prog: str) -> str:
    intro = (
        f"python -m {prog} [config=<file.yaml>] [key=value ...]\n\n"
        "Later wins: the defaults below, then the config file, then the other keys. A nested key may be\n"
        "given by its last part: batch_size=8.\n"
    )
    lines = blueprint.get_help(color=sys.stdout.isatty()).splitlines()
    return "\n".join([intro, *lines])
