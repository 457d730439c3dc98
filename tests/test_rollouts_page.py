"""The commands of docs/rollouts.md print what the page says, and its example of an importer runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rollouts_page import FOLDER, PAGE, REPOSITORY, Shown, printed_by, shown

from cookbook.data.importers import IMPORTERS

TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = list(shown())


def test_every_command_has_its_output() -> None:
    assert len(SHOWN) == len(re.findall(r"^```bash$", TEXT, re.MULTILINE)) >= 12


@pytest.mark.cases(6)
@pytest.mark.parametrize("example", SHOWN, ids=lambda example: example.command)
def test_a_command_prints_what_the_page_says(example: Shown) -> None:
    assert printed_by(example.command) == example.output


def test_the_page_shows_every_file_and_every_format() -> None:
    commands = " ".join(command for command, _ in SHOWN)
    read = {Path(name).name for name in re.findall(r"dataset=(\S+)", commands)}
    assert read == {path.name for path in FOLDER.iterdir() if path.suffix in (".json", ".jsonl", ".traj")}
    # A trajectory is recognised without its name.
    assert set(IMPORTERS) - {"trajectory"} <= set(re.findall(r"format=(\S+)", commands))


def test_the_page_shows_the_importer_as_it_is() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert program == (FOLDER / "my_importer.py").read_text(encoding="utf-8")


def test_links_of_the_page_exist() -> None:
    headings = [heading.lower() for heading in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)]
    anchors = {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (REPOSITORY / "docs" / target).exists(), target
