"""Agent rollouts and logged calls, each format read by an importer of its own.

`IMPORTERS` lists them. Where a config names no format, a row that is certainly of one (`marked`) is refused
with its name, because what a log trains is never guessed. `base.Importer` is what a user's own one
implements, `transcript.Transcript` collects messages as a log holds them, and `blocks` reads the parts of
their content.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from cookbook.data.importers.base import Imported, Importer
from cookbook.data.selection import ReadingOptions
from cookbook.errors import ConfigError, CookbookError, describe

__all__ = ["IMPORTERS", "Imported", "Importer", "importer_of", "marked"]

_PLACES = {
    "trajectory": "trajectory:TrajectoryImporter",
    "atif": "atif:AtifImporter",
    "inspect": "inspect:InspectImporter",
    "openai_log": "openai_log:OpenAILogImporter",
    "anthropic": "anthropic:AnthropicImporter",
    "swe_agent": "swe_agent:SweAgentImporter",
    "openhands": "openhands:OpenHandsImporter",
}
"""The importers of this package, `module:class`, by their names."""


@functools.cache
def _class_of(name: str) -> type[Importer]:
    module, _, class_name = _PLACES[name].partition(":")
    found: type[Importer] = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return found


class _Importers(Mapping[str, type[Importer]]):
    """The importers of this package, each imported when it is first read."""

    def __getitem__(self, name: str) -> type[Importer]:
        return _class_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


IMPORTERS: Mapping[str, type[Importer]] = _Importers()
"""The importers by their names. A subclass of `Importer` elsewhere is named `my_module:MyImporter`."""


@functools.cache
def _marking() -> list[Importer]:
    return [importer() for importer in IMPORTERS.values()]


def marked(row: Mapping[str, Any]) -> type[Importer] | None:
    """Returns the importer of the format that a row certainly has; None where no importer knows it."""
    return next((type(importer) for importer in _marking() if importer.marks(row)), None)


def importer_of(format: str | None, options: ReadingOptions) -> Importer | None:
    """Returns the importer that a format names, with these options; None for a format of rows, or none.

    Raises ConfigError where `my_module:MyImporter` is not there or is no importer.
    """
    if format is None:
        return None
    if format in _PLACES:
        kind = IMPORTERS[format]
    else:
        module, colon, name = format.partition(":")
        if not colon:
            return None
        kind = _imported(format, module, name)
    importer = kind()
    importer.options = options
    return importer


def _imported(format: str, module: str, name: str) -> type[Importer]:
    """The class that `module:name` names. The module is code of the user's, which may raise anything."""
    try:
        found: Any = getattr(importlib.import_module(module), name, None)
    except CookbookError:
        raise
    except Exception as error:
        raise ConfigError(
            f"Invalid format={format}: `{module}` cannot be imported: {describe(error)}"
        ) from error
    if not isinstance(found, type) or not issubclass(found, Importer):
        what = "is not there" if found is None else "is not a subclass of cookbook.data.importers.Importer"
        raise ConfigError(f"Invalid format={format}: `{name}` in {module} {what}.")
    return found
