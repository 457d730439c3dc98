"""The command line of every recipe: `key=value` overrides a config file, which overrides the defaults."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import enum
import gc
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from chz.blueprint import Blueprint, Castable, Reference

from cookbook.config import config_files
from cookbook.config.chz_private import (
    NOTE_OF_AN_ARGUMENT,
    EntrypointException,
    EntrypointHelpException,
    default_of,
    params_of,
    value_at,
)
from cookbook.config.config_files import COMMAND_LINE, NoValue, Setting
from cookbook.config.keys import Resolver, missing_keys
from cookbook.errors import ConfigError, CookbookError, describe
from cookbook.utils import consoles
from cookbook.utils.control_characters import visible, visible_line

T = TypeVar("T")
R = TypeVar("R")

HELP = ("--help", "-h", "help")
TEXT_KEYS = ("system_prompt", "prompt", "title")
"""Keys whose values are text for people and models, as are those of `template_kwargs` and below it.

Other values may name files and are not decoded."""


def make_config(
    target: type[T],
    defaults: Mapping[str, Any],
    argv: Sequence[str],
    prog: str = "recipe",
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Returns the config for `argv`. Later layers win: `defaults`, `config=<file>`, other keys, `overrides`.

    A key that is not a field of the config itself names a nested field by its last part, so `batch_size=8`
    sets `dataset_builder.common_config.batch_size`. A key may occur only once in a file. If it occurs twice
    on the command line, the last value is used, with a warning.

    Raises ConfigError with every setting that cannot be used and its place: unknown, ambiguous and repeated
    keys, and invalid values. If help is requested, raises EntrypointHelpException, which lists the available
    keys, including those of a class of this project that another argument names. Modules outside of this
    project are not imported for help, nor before everything else has been checked.
    """
    arguments = read_arguments(argv)
    resolver = make_resolver(target, defaults, arguments, overrides=overrides)
    blueprint = resolver.blueprint(f"{prog}'s defaults")
    if arguments.wants_help:
        raise EntrypointHelpException(_help(blueprint, prog, resolver.deferred))
    if missing := list(missing_keys(blueprint)):
        raise ConfigError("\n".join(missing))
    try:
        return blueprint.make()
    except EntrypointException as error:
        raise ConfigError(str(error).strip()) from error


def make_resolver(
    target: type[Any],
    defaults: Mapping[str, Any],
    arguments: Arguments,
    more: Sequence[Sequence[Setting]] = (),
    overrides: Mapping[str, str] = MappingProxyType({}),
    other_names: Sequence[str] = (),
) -> Resolver:
    """Returns a resolver for a command line, with the further settings `more` and `overrides` above it.

    `other_names` are keys of another config, which an unknown key may have meant.
    """
    in_file: list[Setting] = []
    repeated: list[str] = []
    if arguments.config is not None:
        try:
            in_file, repeated = config_files.read_settings(arguments.config)
        except ConfigError as error:
            raise ConfigError("\n".join([*arguments.problems, str(error)])) from error
    above = [_setting(key, value) for key, value in overrides.items()]
    layers = [in_file, arguments.settings, *more, above]

    def resolver(imports: bool) -> Resolver:
        created = Resolver(target, defaults, layers, other_names, imports)
        created.problems[:0] = [*arguments.problems, *repeated]
        return created

    before_importing = resolver(imports=False)
    if before_importing.deferred and not arguments.wants_help:
        before_importing.check()
        if before_importing.problems:
            before_importing.raise_problems()
        return resolver(imports=True)
    return before_importing


# -- arguments -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Arguments:
    """The parts of a command line. `key=value`, `--key=value` and `--key value` mean the same."""

    settings: list[Setting] = dataclasses.field(default_factory=list)
    config: str | None = None
    """The file named by `config=`."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """One sentence for each argument that is not a setting."""
    wants_help: bool = False

    def take(self, key: str) -> str | None:
        """Returns the value of a key that is not one of the config's, and removes it from the settings."""
        found = [setting for setting in self.settings if setting.key == key]
        self.settings = [setting for setting in self.settings if setting.key != key]
        if any(isinstance(setting.value, NoValue) for setting in found):
            self.problems.append(f"{COMMAND_LINE}: --{key} has no value. Write {key}=<value>.")
            return None
        if len(found) > 1:
            values = " and ".join(f"{key}={setting.value.value}" for setting in found)
            self.problems.append(f"{COMMAND_LINE}: {key} is given twice, as {values}. Give it once.")
        return found[-1].value.value if found else None


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Returns the settings on a command line, and the arguments that cannot be settings."""
    arguments = Arguments()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in HELP:
            arguments.wants_help = True
        elif (problem := _read_argument(argument, rest, arguments.settings)) is not None:
            arguments.problems.append(f"{COMMAND_LINE}: {problem}")
    arguments.config = arguments.take("config")
    return arguments


_KEY = r"[A-Za-z_][\w.-]*"
_KEY_AND_VALUE = re.compile(rf"(?:--)?{_KEY}=")


def _read_argument(argument: str, rest: list[str], found: list[Setting]) -> str | None:
    """Adds a setting to `found`, with a value from `rest` if it is there. Otherwise returns the problem."""
    key, has_value, value = argument.partition("=")
    dashed = key.startswith("--")
    key = key.removeprefix("--").replace("-", "_") if dashed else key
    next_one = rest[0] if rest else ""
    if has_value and key.strip() and (_KEY_AND_VALUE.match(argument) or not _names_a_file(argument)):
        if key != key.strip() or (not value and rest and _is_a_value(next_one)):
            return f"write {key.strip()}={value.strip() or rest.pop(0)} without spaces around the =."
        found.append(_setting(key, value))
        return None
    if rest and next_one.startswith("=") and key:
        value = rest.pop(0)[1:] or (rest.pop(0) if rest and _is_a_value(rest[0]) else "<value>")
        return f"write {key}={value} without spaces around the =."
    if dashed and re.fullmatch(_KEY, key):
        value_follows = bool(rest) and _is_a_value(next_one)
        without = Setting(key, NoValue(""), COMMAND_LINE)
        found.append(_setting(key, rest.pop(0)) if value_follows else without)
        return None
    if _names_a_file(argument):
        return f"unrecognised argument {argument!r}. For a config file write config={argument}"
    if (pair := re.fullmatch(rf"({_KEY}):(.+)", argument, re.DOTALL)) is not None:
        return f"unrecognised argument {argument!r}. Write {pair[1]}={pair[2].strip()}"
    if re.fullmatch(_KEY, argument) and rest and _is_a_value(next_one) and not _names_a_file(next_one):
        return f"unrecognised argument {argument!r}. Write {argument}={rest.pop(0)}"
    if re.fullmatch(rf"-{_KEY}", argument) and rest and _is_a_value(next_one):
        return f"unrecognised argument {argument!r}. Write {argument[1:]}={rest.pop(0)}"
    return f"unrecognised argument {argument!r}. Write key=value, or --help for the keys."


def _setting(key: str, value: str) -> Setting:
    parts = key.split(".")
    is_text = parts[-1] in TEXT_KEYS or "template_kwargs" in parts
    return Setting(key, Castable(consoles.decoded_argument(value) if is_text else value), COMMAND_LINE)


def _is_a_value(argument: str) -> bool:
    """Returns whether an argument can be the value of the `--key` before it, rather than a key itself."""
    return not (argument.startswith(("--", "=")) or argument in HELP[:2] or _KEY_AND_VALUE.match(argument))


def _names_a_file(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml", ".json")) or os.path.isfile(os.path.expanduser(argument))


# -- the program ---------------------------------------------------------------------------------


def run(
    target: type[T],
    main: Callable[[T], Coroutine[Any, Any, R]],
    defaults: Mapping[str, Any],
    prog: str,
    argv: Sequence[str] | None = None,
) -> R:
    """Runs a recipe's whole command line. Deliberate errors end it with a few lines and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    with exiting_on_errors():
        config = make_config(target, defaults, argv, prog)
        import asyncio  # help, which ends above, does not need it

        return asyncio.run(main(config))


@contextlib.contextmanager
def exiting_on_errors() -> Iterator[None]:
    """Ends the program after help (exit code 0), a deliberate error (1, in a few lines) and Ctrl-C (130)."""
    consoles.replace_unprintable()
    atexit.register(gc.freeze)  # else the last collection traverses all of torch, for more than a second
    try:
        with consoles.visible_output():
            yield
    except EntrypointHelpException as help_text:
        print_help(str(help_text))
        sys.exit(0)
    except CookbookError as error:
        _print_error(_describe(error), error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except OSError as error:  # such as a full disk or an unreadable file; the message has the path
        _print_error(f"{type(error).__name__}: {error}", error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except UnicodeEncodeError as error:  # a library was given a name that this locale cannot encode
        name = os.fsencode(error.object).decode(errors="replace")
        _print_error(f"{name!r} cannot be used in this locale. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8.", error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_error(failure: str, error: Exception) -> None:
    """Prints the error that ended a run, once even if several processes fail."""
    from cookbook.engine import processes

    if processes.should_report(error):
        where = f"[process {os.environ['RANK']}] " if processes.is_one_of_many() else ""
        print(visible(where + failure), file=sys.stderr, flush=True)


def print_help(text: str) -> None:
    """Prints a text. A reader may close the pipe early, as `head` does."""
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:
        consoles.discard_output()


def _describe(error: CookbookError) -> str:
    """Returns the message without the notes of chz, because the key already names the place."""
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not note.startswith(NOTE_OF_AN_ARGUMENT)]
    return describe(error)


def _help(blueprint: Blueprint[Any], prog: str, deferred: Mapping[str, Setting]) -> str:
    """Returns every key with its value and, below it, its documentation, readable in 80 columns."""
    intro = (
        f"python -m {prog} [config=<file.yaml>] [key=value ...]\n\n"
        "Later wins: the values below, then the config file, then the other keys.\n"
        "A nested key may be given by its last part if it is unambiguous: batch_size=8.\n"
        "--key value is the same as key=value. Of a key given twice, the last counts.\n"
    )
    lines = [intro]
    params = params_of(blueprint)
    for path, param in params.items():
        found = value_at(blueprint, path)
        if found is None or (isinstance(found[0], Reference) and found[0].ref == path):
            found = default_of(param)
        value = None if found is None else _value_text(found[0])
        if path in deferred:
            value = f"{deferred[path].value.value} (not imported for help, so its keys are not here)"
        if value is None and any(other.startswith(f"{path}.") for other in params):
            continue  # the value consists of the keys below it
        line = visible_line(f"{path}={value or '(required)'}")
        lines.append(line if len(line) <= 79 else f"{line[:76]}...")
        lines += textwrap.wrap(param.doc, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    if isinstance(value, Reference):
        return f"<{value.ref}>"
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value.value if isinstance(value, (enum.Enum, Castable)) else value)
