"""Tests that untrusted JSON has the expected types, or raises an error with file and key."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cookbook.errors import DataError
from cookbook.utils import json_files
from cookbook.utils.json_files import Count, JsonOrigin, Measured

ORIGIN = JsonOrigin("notes.json", DataError, "Restore it.")


@dataclass(frozen=True)
class Place:
    row: Count


@dataclass(frozen=True)
class Note:
    name: str
    weight: float = 1.0
    places: list[Count] | None = None
    at: Place | None = None
    others: Mapping[str, int] | None = None


def test_an_object_of_the_right_types_becomes_its_dataclass() -> None:
    values: dict[str, Any] = {
        "name": "a",
        "weight": 2,
        "places": [1, 2],
        "at": {"row": 3},
        "others": {"x": -1},
    }
    assert json_files.record_of(Note, values, ORIGIN) == Note("a", 2, [1, 2], Place(3), {"x": -1})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "it lacks `name`, text"),
        ({"name": 5}, "`name` is 5, expected text"),
        ({"name": None}, "`name` is null, expected text"),
        ({"name": "a", "weight": "2"}, '`weight` is "2", expected a finite number'),
        ({"name": "a", "weight": True}, "`weight` is true, expected a finite number"),
        ({"name": "a", "weight": float("nan")}, "`weight` is NaN, expected a finite number"),
        ({"name": "a", "weight": float("-inf")}, "`weight` is -Infinity, expected a finite number"),
        ({"name": "a", "weight": 10**400}, "`weight` is a whole number of more than 64 bits, expected"),
        ({"name": "a", "places": {"1": 2}}, "`places` is an object of 1, expected a list or null"),
        ({"name": "a", "places": [1, -1]}, r"`places\[1\]` is -1, expected a whole number of at least 0"),
        ({"name": "a", "places": [1.5]}, r"`places\[0\]` is 1.5, expected a whole number of at least 0"),
        ({"name": "a", "at": {"row": 2**63}}, "`at.row` is a whole number of more than 64 bits"),
        ({"name": "a", "at": {"row": 1, "col": 2}}, "`at.col` is an unknown key"),
        ({"name": "a", "others": {"x": []}}, "`others.x` is a list of 0, expected a whole number"),
        ({"name": "a", "wieght": 1}, "`wieght` is an unknown key. Did you mean `weight`"),
    ],
)
def test_a_wrong_type_is_named_with_its_key(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=rf"notes.json is damaged: {problem}.*Restore it\."):
        json_files.record_of(Note, values, ORIGIN)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "Expecting property name"),
        (b"[1]", "it holds a list of 1, expected an object"),
        (b"null", "it holds null, expected an object"),
        (b'{"a": 1, "a": 2}', 'the key "a" occurs twice'),
        (b'{"a": {"b": 1, "b": 2}}', 'the key "b" occurs twice'),
        (b'\xef\xbb\xbf{"a": 1}', "it begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8 text"),
        (b'{"a": "\xff"}', "it is not UTF-8 text"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested in more than 100 levels"),
        (b'{"a": ' + b"[" * 100_000, "nested in more than 100 levels"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "Exceeds the limit|it holds"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_text_that_is_not_a_plain_object_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is damaged: .*({problem})"):
        json_files.read_object(path, DataError, "Restore it.")


def test_a_folder_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, problem in (
        ("", "it is a folder"),
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
    ):
        with pytest.raises(DataError, match=problem):
            json_files.read_object(tmp_path / name, DataError, "Restore it.")
    with pytest.raises(DataError, match="it cannot be read"):
        json_files.read_object(tmp_path / "loop", DataError, "Restore it.")


def test_a_measured_value_may_be_nan_but_not_text() -> None:
    json_files.check(
        {"step": 1, "nll": float("nan"), "on": True}, {"step": Count}, ORIGIN, rest=Measured | bool
    )
    with pytest.raises(DataError, match='`nll` is "0.5", expected a number or true or false'):
        json_files.check({"step": 1, "nll": "0.5"}, {"step": Count}, ORIGIN, rest=Measured | bool)


@pytest.mark.slow
def test_a_repeated_key_among_many_is_found_in_linear_time() -> None:
    many = ",".join(f'"{index}":0' for index in range(200_000))
    started = time.process_time()
    with pytest.raises(DataError, match='the key "199999" occurs twice'):
        json_files.value_of(f'{{{many},"199999":1}}', JsonOrigin("it", DataError, ""))
    assert time.process_time() - started < 10  # quadratic time took minutes


def test_a_long_key_is_truncated_in_the_error() -> None:
    with pytest.raises(DataError) as caught:
        json_files.record_of(Note, {"name": "a", "k" * 10**6: 1}, JsonOrigin("it", DataError, ""))
    assert len(str(caught.value)) < 500
