"""Writes docs/models.md: what works for each family of chat models. `make families` runs it.

With names of families as arguments, only their rows are made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import families
from families import FAMILIES
from family_checks import COLUMNS, Subject
from family_table import REFUSED, WITHOUT_ROW

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAILED = "no: "
NOT_REACHED = "–"
_LONGEST_REASON = 90

HEAD = """# Families of chat models

What works for each family, tried on a tiny random model of it (hidden size 32, 2 to 4 layers) in the class in
which its checkpoints are published, with the flags that distinguish it: windows, sinks, shared experts, caps,
layers without RoPE. Tiny models show that the computation is right. They do not show speed on real sizes.

`make families` writes this page. It ran {versions} on the CPU, in float32, at the project's default settings.
**{num_passing} of {num_families} families pass every column.**

| column | what was compared |
|---|---|
"""
_REFUSED = """
These are refused when they are loaded, with the error that follows the class. A model that reads its prompt
in both directions would be trained with attention to the tokens that it has to predict.
"""
_WITHOUT_ROW = """
transformers has other classes that write text. They have no row for these reasons:
"""
_FOOT = """
The models are in [tests/helpers/family_table.py](../tests/helpers/family_table.py), and the comparisons in
[tests/helpers/family_checks.py](../tests/helpers/family_checks.py). A cell that fails says why. With
`{not_reached}` a column was not reached, because the model could not be loaded or adapted.
"""


def row_of(name: str) -> dict[str, str]:
    """Returns the cell of each column."""
    cells: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        subject = Subject(name, Path(folder))
        for column, check in COLUMNS.items():
            cells[column] = _cell(check, subject)
            if cells[column].startswith(FAILED) and not subject.has_client:
                return {**dict.fromkeys(COLUMNS, NOT_REACHED), **cells}
    return cells


def _cell(check: Callable[[Subject], str], subject: Subject) -> str:
    try:
        return check(subject)
    except Exception as error:  # the page says what failed
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        reason = reason.replace(str(subject.published), "the model").replace("|", "/")
        reason = reason.replace(str(subject.folder), "")
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON].rpartition(' ')[0]} ..."
        return f"{FAILED}{reason}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings and progress bars of transformers, PEFT and bitsandbytes on random models."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("cookbook").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refusal_of(name: str) -> str:
    """Returns the class of a refused family and the first line of the error."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        published = families.save(name, Path(folder) / "published")
        (kind,) = json.loads((published / "config.json").read_text(encoding="utf-8"))["architectures"]
        try:
            BaseModel(str(published), EngineOptions(device="cpu", dtype="float32"))
        except ModelError as error:
            reason = str(error).partition("\n")[0].replace(str(published), "the model")
            return f"{kind}: {re.sub(' by [0-9.]+%', '', reason)}"
    raise AssertionError(f"{name} is not refused")


def passes(cells: Mapping[str, str]) -> bool:
    return all(not cell.startswith(FAILED) and cell != NOT_REACHED for cell in cells.values())


def rows_of_page() -> dict[str, dict[str, str]]:
    """Returns the cells of each family on the page; {} if there is no page."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    rows = {}
    for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name.strip("`")] = dict(zip(COLUMNS, cells, strict=True))
    return rows


def refusals_of_page() -> dict[str, str]:
    """Returns what the page says of each refused family; {} if there is no page."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return dict(re.findall(r"^- `(.*?)`, (.*)$", text, re.MULTILINE))


def page_of(rows: Mapping[str, Mapping[str, str]], refusals: Mapping[str, str]) -> str:
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    lines = [
        HEAD.format(
            versions=versions,
            num_passing=sum(passes(row) for row in rows.values()),
            num_families=len(rows),
        ).rstrip("\n")
    ]
    for column, check in COLUMNS.items():
        lines.append(f"| {column} | {' '.join((check.__doc__ or '').split())} |")
    lines += ["", f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| `{name}` | {' | '.join(rows[name].values())} |" for name in rows]
    lines += ["", _REFUSED.rstrip("\n"), ""]
    lines += [f"- `{name}`, {refusal}" for name, refusal in refusals.items()]
    lines += [_WITHOUT_ROW]
    lines += [f"- {reason}: {', '.join(map(_code, names.split()))}." for reason, names in WITHOUT_ROW.items()]
    return "\n".join(lines) + "\n" + _FOOT.format(not_reached=NOT_REACHED)


def _code(name: str) -> str:
    return f"`{name}`"


def main(names: Sequence[str], num_processes: int) -> None:
    known, refusals = rows_of_page(), refusals_of_page()
    # Each process imports torch itself: a fork would share the threads of this one.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for name in (name for name in names if name in REFUSED):
            refusals[name] = refusal_of(name)
            print(name, refusals[name], flush=True)
        tried = [name for name in names if name in FAMILIES]
        for name, row in zip(tried, pool.map(row_of, tried), strict=True):
            known[name] = row
            failed = {column: cell for column, cell in row.items() if cell.startswith(FAILED)}
            print(name, failed or "passes", flush=True)
    text = page_of(
        {name: known[name] for name in FAMILIES if name in known},
        {name: refusals[name] for name in REFUSED if name in refusals},
    )
    PAGE.write_text(text, encoding="utf-8")
    print(f"Wrote {PAGE}: {sum(map(passes, known.values()))} of {len(known)} families pass every column.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.families if name not in FAMILIES | REFUSED]:
        parser.error(f"unknown family {unknown[0]}. Known: {', '.join(FAMILIES | REFUSED)}")
    main(arguments.families or list(FAMILIES | REFUSED), arguments.processes)
