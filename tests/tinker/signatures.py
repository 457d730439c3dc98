"""Writes the table of the Tinker SDK's public names and signatures, with which this project's are compared.

    .venv-tinker/bin/python tests/tinker/signatures.py > tests/tinker/sdk.json

With `--check` it prints the lines in which the table and the installed SDK differ instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")


def table() -> dict[str, Any]:
    """Returns the version, the names, the parameters of the clients' methods, and the fields of the types."""
    import tinker

    types = {name: value for name, value in vars(tinker.types).items() if inspect.isclass(value)}
    fields = {name: found for name, value in types.items() if (found := _fields(value)) is not None}
    return {
        "version": tinker.__version__,
        "names": sorted(tinker.__all__),
        "methods": {client: _methods(getattr(tinker, client)) for client in CLIENTS},
        "fields": dict(sorted(fields.items())),
        "losses": [*tinker.types.LossFnType.__args__],
    }


def _methods(client: type) -> dict[str, list[list[str]]]:
    """Returns the positional and the keyword-only parameters of each public method."""
    found = {}
    for name in sorted(dir(client)):
        value = getattr(client, name)
        if (name.startswith("_") and name != "__init__") or not callable(value):
            continue
        parameters = [*inspect.signature(value).parameters.values()]
        positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        found[name] = [[one for one in positional if one != "self"], keywords]
    return found


def _fields(kind: type) -> list[str] | None:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    fields = getattr(kind, "model_fields", None)
    return None if fields is None else [*fields]


def main(argv: list[str]) -> int:
    text = json.dumps(table(), indent=1) + "\n"
    if "--check" not in argv:
        print(text, end="")
        return 0
    path = Path(__file__).parent / "sdk.json"
    earlier = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(earlier.splitlines(), text.splitlines(), str(path), "the installed SDK")
    print(*lines, sep="\n")
    return int(earlier != text)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
