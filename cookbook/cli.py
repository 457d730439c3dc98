"""The command line of every recipe: key=value over a config file over the recipe's defaults."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import enum
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from chz.blueprint import Blueprint, Castable, Reference
from chz.blueprint._entrypoint import EntrypointException, EntrypointHelpException

from cookbook import consoles
from cookbook.errors import ConfigError, CookbookError, describe

T = TypeVar("T")
R = TypeVar("R")

HELP = ("--help", "-h", "help")
TEXT_KEYS = ("system_prompt", "prompt", "title")
"""Keys whose values are text for people and models. Any other value may name a file, and stays as it is."""


def make_config(target: type[T], defaults: Mapping[str, Any], argv: Sequence[str], prog: str = "recipe") -> T:
    """The config that `argv` asks for. Later wins: `defaults`, then `config=<file>`, then the other keys.

    A key that is no field of the config itself names a nested field by its last part, so
    `batch_size=8` reaches `dataset_builder.common_config.batch_size`. Raises ConfigError for an
    unknown key or an impossible value, and EntrypointHelpException where help is asked for: it has
    the keys that there are with the other arguments, such as those of a class that one of them names.
    """
    blueprint, arguments = _layers(target, defaults, argv, prog)
    before = blueprint.clone()
    blueprint.apply(_full_keys(blueprint, arguments), layer_name="command line")
    if any(argument in HELP for argument in argv):
        raise EntrypointHelpException(_help(blueprint, prog))
    try:
        return blueprint.make()
    except EntrypointException as error:
        raise ConfigError(_explain(before, error)) from error


def type_of_key(target: type[Any], defaults: Mapping[str, Any], argv: Sequence[str], key: str) -> Any:
    """The type of the field that `key` names, beside the settings in `argv`.

    Raises ConfigError, which names the nearest key, where there is no such field.
    """
    blueprint, arguments = _layers(target, defaults, argv, "recipe")
    blueprint.apply(_full_keys(blueprint, arguments))
    full = next(iter(_full_keys(blueprint, {key: None})))
    return _params(blueprint)[full].type


def settings(argv: Sequence[str]) -> dict[str, str]:
    """The `key=value` arguments as a mapping. Raises ConfigError for an argument that is none."""
    values: dict[str, str] = {}
    for argument in argv:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"{argument!r} is no setting. Write key=value, or --help for the keys.")
        key = key.removeprefix("--")
        is_text = key.rsplit(".", 1)[-1] in TEXT_KEYS
        values[key] = consoles.decoded_argument(value) if is_text else value
    return values


def run(
    target: type[T],
    main: Callable[[T], Coroutine[Any, Any, R]],
    defaults: Mapping[str, Any],
    prog: str,
    argv: Sequence[str] | None = None,
) -> R:
    """A recipe's whole command line. Errors raised on purpose end it in a few lines and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    with ending_in_a_line():
        return asyncio.run(main(make_config(target, defaults, argv, prog)))


@contextlib.contextmanager
def ending_in_a_line() -> Iterator[None]:
    """Ends the program where help is asked for (exit code 0), where an error is raised on purpose
    (a few lines, exit code 1) and where Ctrl-C is pressed (130)."""
    consoles.replace_unprintable()
    try:
        yield
    except EntrypointHelpException as help_text:
        _print_help(str(help_text))
        sys.exit(0)
    except CookbookError as error:
        _tell(_describe(error), error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except OSError as error:  # a disk that is full or a file that may not be read: the message has the path
        _tell(f"{type(error).__name__}: {error}", error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _layers(
    target: type[Any], defaults: Mapping[str, Any], argv: Sequence[str], prog: str
) -> tuple[Blueprint[Any], dict[str, Castable]]:
    """The blueprint under the command line, and what the command line lays over it."""
    blueprint = Blueprint(target).apply(dict(defaults), layer_name=f"{prog}'s defaults")
    values = settings([argument for argument in argv if argument not in HELP])
    if (path := values.pop("config", None)) is not None:
        from cookbook import config_files

        blueprint.apply(_full_keys(blueprint, config_files.load(path)), layer_name=path)
    return blueprint, {key: Castable(value) for key, value in values.items()}


def _tell(failure: str, error: Exception) -> None:
    """Prints what ended a run; one of several processes does, so that it is told once."""
    from cookbook.engine import mesh

    if mesh.speaks_for_all(error):
        where = f"[process {os.environ['RANK']}] " if mesh.is_one_of_many() else ""
        print(where + failure, file=sys.stderr, flush=True)


def _print_help(text: str) -> None:
    """Prints; a reader that closes the pipe early, as `head` does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: CookbookError) -> str:
    """Without the notes in which chz retraces its steps: the key names the place already."""
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not note.startswith(" (when ")]
    return describe(error)


def _params(blueprint: Blueprint[Any]) -> dict[str, Any]:
    """Every parameter there is to set, by its dotted path, as this blueprint stands."""
    return {path: param for path, param in blueprint._make_lazy().all_params.items() if path}


def _full_keys(blueprint: Blueprint[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Completes short keys. A class chosen by one key decides which fields the others may name."""
    if not values:
        return {}
    dotted = {key: value for key, value in values.items() if "." in key or _names_a_class(value)}
    try:
        paths = list(_params(blueprint.clone().apply(dotted)))
    except EntrypointException as error:
        raise ConfigError(_explain(blueprint, error)) from error
    full: dict[str, Any] = {}
    for key, value in values.items():
        matches = [key] if key in paths else [path for path in paths if path.endswith(f".{key}")]
        if not matches:
            raise ConfigError(_unknown_key(key, paths))
        full |= dict.fromkeys(matches, value)
    return full


def _names_a_class(value: Any) -> bool:
    return isinstance(value, Castable) and ":" in value.value


def _unknown_key(key: str, paths: Sequence[str]) -> str:
    names = [*(path.rsplit(".", 1)[-1] for path in paths), *paths]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no key {key!r}.{hint} Run with --help to see the keys."


def _explain(blueprint: Blueprint[Any], error: EntrypointException) -> str:
    message = str(error).strip()
    found = re.match(r"Could not interpret argument '(.*)' provided for param '([^']+)'", message)
    param = None if found is None else _params(blueprint).get(found[2])
    if found is None or param is None:
        return message
    return f"{found[2]}={found[1]} is impossible. It takes {_describe_type(param.type)}."


def _describe_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        values = [str(value) for value in get_args(kind)]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if get_origin(kind) is list:
        return f"{_describe_type(get_args(kind)[0]).removeprefix('a ')}s with commas between them"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe_type(part) for part in get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return names.get(kind) or f"module:Class, a {getattr(kind, '__name__', kind)}"


def _help(blueprint: Blueprint[Any], prog: str) -> str:
    """Every key with its value and, below it, what it is for: readable in 80 columns."""
    intro = (
        f"python -m {prog} [config=<file.yaml>] [key=value ...]\n\n"
        "Later wins: the values below, then the config file, then the other keys.\n"
        "A nested key may be given by its last part: batch_size=8.\n"
    )
    lines = [intro]
    params = _params(blueprint)
    for path, param in params.items():
        given = blueprint._arg_map.get_kv(path)
        value = _value_text(given.value) if given is not None else _default_text(param.default)
        if value is None and any(other.startswith(f"{path}.") for other in params):
            continue  # made of the keys below it
        line = f"{path}={value or '(required)'}"
        lines.append(line if len(line) <= 79 else f"{line[:76]}...")
        lines += textwrap.wrap(param.doc, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    if isinstance(value, Reference):
        return f"<{value.ref}>"
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value.value if isinstance(value, (enum.Enum, Castable)) else value)


def _default_text(default: Any) -> str | None:
    return None if default is None else _value_text(default.instantiate())
