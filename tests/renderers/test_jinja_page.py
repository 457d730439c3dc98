"""The page on how templates are read: its program runs, and the files that it mentions are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "renderers" / "jinja"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_program_prints_what_the_model_had_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == "'A spoon.<|im_end|>\\n'\n"


def test_every_file_of_the_folder_is_on_the_page_and_every_file_on_the_page_is_there() -> None:
    named = set(re.findall(r"`([\w*/.]+\.py)`", PAGE))
    files = {path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py"}
    for name in named:
        folder = REPOSITORY if "/" in name else REPOSITORY / "tests" / "renderers"
        assert [*FOLDER.glob(name)] or [*folder.glob(name)], name
    described = {path.name for name in named for path in FOLDER.glob(name)}
    assert described == files


def test_limits_on_the_page_are_those_of_the_code() -> None:
    from renderers.jinja import chat
    from renderers.jinja.template_limits import LIMITS

    for number in [
        f"{LIMITS.seconds:g} s, and {LIMITS.seconds_of_a_message:g} s",
        f"2^{LIMITS.characters.bit_length() - 1} characters",
        f"From {chat._LONG} messages on",
    ]:
        assert number in PAGE
