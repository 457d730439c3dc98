"""docs/coming_from.md agrees with the table of other trainers' keys, and its configs are valid ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cookbook.config import cli
from cookbook.config.other_trainers import answer, keys_in
from cookbook.supervised import train
from recipes import sft

TEXT = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| `(?P<theirs>(?P<key>\w+)(?:: |=)[^|]*)` \| (?P<ours>[^|]*) \|(?P<note>[^|]*)\|$", re.MULTILINE
)
SECTIONS = dict(
    zip(re.findall(r"^## (.*)$", TEXT, re.M), re.split(r"^## .*$", TEXT, flags=re.M)[1:], strict=True)
)
NAMED_ALIKE = {
    key.rsplit(".", 1)[-1] for key in cli.make_resolver(train.Config, sft.DEFAULTS, cli.Arguments()).params
}


def rows(section: str) -> list[re.Match[str]]:
    return list(ROW.finditer(SECTIONS[section]))


def settings(row: re.Match[str]) -> list[str]:
    return re.findall(r"`([^`]+)`", row["ours"])


@pytest.mark.parametrize("section", SECTIONS)
def test_every_line_is_answered_as_the_error_answers_it(section: str) -> None:
    found = rows(section)
    assert len(found) == SECTIONS[section].count("\n| `") >= 20
    for row in found:
        ours = {setting.partition("=")[0] for setting in settings(row)}
        told = answer(row["key"])
        if row["key"] in NAMED_ALIKE:
            assert ours == {row["key"]}, row[0]
        elif told is None:
            raise AssertionError(f"{row['key']} is in no table: add it to cookbook/config/other_trainers.py")
        else:
            assert ours <= set(keys_in(told)), row[0]
            assert ours or not keys_in(told) or row["note"].strip(), row[0]


@pytest.mark.parametrize("section", SECTIONS)
def test_what_stands_here_is_one_valid_config(section: str) -> None:
    given = dict.fromkeys(setting for row in rows(section) for setting in settings(row))
    keys = [setting.partition("=")[0] for setting in given]
    assert len(keys) == len(set(keys)), "a key has two values"
    assert cli.make_config(
        train.Config, sft.DEFAULTS, [one for setting in given for one in shlex.split(setting)]
    )
