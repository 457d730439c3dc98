"""The command line of every recipe: key=value over a config file over the recipe's defaults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
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
"""Keys whose values are text for people and models. Any other value may name a file, and stays as it is."""


def make_config(
    target: type[T],
    defaults: Mapping[str, Any],
    argv: Sequence[str],
    prog: str = "recipe",
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """The config that `argv` asks for. Later wins: `defaults`, then `config=<file>`, then the other keys.

    A key that is not a field of the config itself names a nested field by its last part, so `batch_size=8`
    reaches `dataset_builder.common_config.batch_size`. A key may occur once in a file; of one that is
    given twice on the command line the last counts, with a warning. `overrides` win over all of them.

    Raises ConfigError with every setting that cannot be used and where it stands: unknown keys, those that
    are ambiguous, those given twice, and invalid values. Raises EntrypointHelpException where help is
    asked for: it lists the keys that exist with the other arguments, such as those of a class of this
    project that one of them names. No other module is imported for help, nor before everything that can
    be checked without it is checked.
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
    """Resolves the settings of a command line, and above them those in `more` and `overrides`.

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
        made = Resolver(target, defaults, layers, other_names, imports)
        made.problems[:0] = [*arguments.problems, *repeated]
        return made

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
    """A command line, read: `key=value`, `--key=value` and `--key value` are the same."""

    settings: list[Setting] = dataclasses.field(default_factory=list)
    config: str | None = None
    """The file that `config=` names."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """One sentence for each argument that cannot be read as a setting."""
    wants_help: bool = False

    def take(self, key: str) -> str | None:
        """The value of a key that is not the config's own, which is removed from the settings."""
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
    """The settings on a command line, and what cannot be one."""
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
    """Adds a setting to `found`, with its value from `rest` if it is there; otherwise adds what to write
    instead.
    """
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
    is_text = key.rsplit(".", 1)[-1] in TEXT_KEYS
    return Setting(key, Castable(consoles.decoded_argument(value) if is_text else value), COMMAND_LINE)


def _is_a_value(argument: str) -> bool:
    """Returns whether an argument can be the value of `--key` before it: not if it is a key itself."""
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
        with consoles.visible_output():
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
    except UnicodeEncodeError as error:  # a library was given a name that this locale cannot decode
        name = os.fsencode(error.object).decode(errors="replace")
        _tell(f"{name!r} cannot be used in this locale. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8.", error)
        if os.environ.get("COOKBOOK_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(failure: str, error: Exception) -> None:
    """Prints the error that ended a run, in one of several processes, so that it is printed once."""
    from cookbook.engine import processes

    if processes.should_report(error):
        where = f"[process {os.environ['RANK']}] " if processes.is_one_of_many() else ""
        print(visible(where + failure), file=sys.stderr, flush=True)


def _print_help(text: str) -> None:
    """Prints; that a reader closes the pipe early, as `head` does, is not an error."""
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:
        consoles.discard_output()


def _describe(error: CookbookError) -> str:
    """Without the notes in which chz retraces its steps: the key names the place already."""
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not note.startswith(NOTE_OF_AN_ARGUMENT)]
    return describe(error)


def _help(blueprint: Blueprint[Any], prog: str, deferred: Mapping[str, Setting]) -> str:
    """Every key with its value and, below it, what it is for: readable in 80 columns."""
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
            continue  # its value consists of the keys below it
        line = visible_line(f"{path}={value or '(required)'}")
        lines.append(line if len(line) <= 79 else f"{line[:76]}...")
        lines += textwrap.wrap(param.doc, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    if isinstance(value, Reference):
        return f"<{value.ref}>"
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value.value if isinstance(value, (enum.Enum, Castable)) else value)
