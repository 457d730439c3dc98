"""Tests of the lines of keys in YAML and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cookbook.config import config_files
from cookbook.config.documents import read_document
from cookbook.errors import ConfigError

YAML = """# settings
a: 1
b:
  c: {d: 1,
      e: 2}
  f:
    - x
    - g: y
      h: z
"""


def test_every_key_and_item_of_yaml_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML, encoding="utf-8")
    document = read_document(str(tmp_path / "a.yaml"))
    assert document.values == {"a": 1, "b": {"c": {"d": 1, "e": 2}, "f": ["x", {"g": "y", "h": "z"}]}}
    lines = {".".join(path): line for path, line in document.lines.items()}
    keys = ["a", "b", "b.c", "b.c.d", "b.c.e", "b.f", "b.f.0", "b.f.1", "b.f.1.g", "b.f.1.h"]
    assert lines == dict(zip(keys, [2, 3, 4, 4, 5, 6, 7, 8, 8, 9], strict=True))
    assert document.repeated == []


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
def test_every_key_and_item_of_json_has_its_line_for_any_values(
    tmp_path: Path, indent: int | str | None
) -> None:
    values = {
        "a": -1.5e-7,
        "b": [],
        "c": {},
        "d": [True, None, [[1], {"x": 'a "quoted" {brace}, [bracket] \\ \n end \x7f é 😀'}]],
        "é\n": {"": "empty"},
        "z": "last",
    }
    (tmp_path / "a.json").write_text(text := json.dumps(values, indent=indent), encoding="utf-8")
    document = read_document(str(tmp_path / "a.json"))
    assert document.values == values
    lines = {path[-1]: line for path, line in document.lines.items() if not path[-1].isdecimal()}
    assert lines == {
        key: text[: text.index(f"{json.dumps(key)}:")].count("\n") + 1 for key in [*values, "x", ""]
    }


def test_yaml_merge_keys_are_not_repetitions(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  a: 3\n", encoding="utf-8"
    )
    document = read_document(str(tmp_path / "a.yaml"))
    assert (document.values["mine"], document.repeated) == ({"a": 3, "b": 2}, [])
    assert (document.lines["mine", "a"], document.lines["mine", "b"]) == (4, 1)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "a: 1\nb:\n  c: 1\n  d: 2\n  c: 1\n", "line 5: b.c is already given in line 3."),
        ("a.yaml", "a:\n  - {b: 1, b: 2}\n", "line 2: a.0.b is already given in line 2."),
        ("a.yaml", "a: [1, {b: 1}]\na: [2, {b: 2}]\n", "line 2: a is already given in line 1."),
        ("a.json", '{"a": [{"b": 1,\n"b": 1}]}', "line 2: a.0.b is already given in line 1."),
    ],
)
def test_a_key_that_occurs_twice_in_a_file_is_an_error(
    tmp_path: Path, name: str, text: str, line: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_document(str(tmp_path / name)).repeated == [f"{tmp_path / name} {line}"]
    with pytest.raises(ConfigError, match="is already given in line"):
        config_files.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", b"a: [\n"),
        ("a.json", b"{'a': 1}"),
        ("a.yaml", b"a: \xff\n"),
        ("a.yaml", b"a: 1\n---\nb: 2\n"),
    ],
)
def test_an_unreadable_file_is_an_error_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read|is not UTF-8 text: .* Save it as UTF-8\."):
        read_document(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"sweep=missing.yaml: there is no such file"):
        read_document("missing.yaml", argument="sweep")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("laughs.yaml", LAUGHS, "more than 100,000 values once aliases"),
        (
            "merged.yaml",
            "a: &a {x: *a}\n",
            "an alias refers to a value that contains it|undefined alias|more than",
        ),
        ("deep.yaml", "[" * 5000 + "]" * 5000, "nested in more than 100 levels"),
        ("deep.json", "[" * 200_000 + "]" * 200_000, "nested in more than 100 levels"),
        ("sixties.yaml", "a: " + "1:" * 100_000 + "1\n", "cannot be read as int"),
        ("digits.yaml", "a: " + "9" * 100_000 + "\n", "cannot be read as int"),
        ("floats.yaml", "a: " + "1:" * 1000 + "1.5\n", "cannot be read as float"),
        (
            "huge.yaml",
            "a: " + "x" * 5_000_000 + "\n",
            "has 5,000,004 bytes, and a config has at most 4,194,304",
        ),
        ("huge.json", '{"a": "' + "x" * 5_000_000 + '"}', "a config has at most 4,194,304"),
    ],
)
def test_a_document_that_expands_too_much_is_refused_by_name(
    name: str, text: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as error:
        read_document(str(tmp_path / name))
    assert name in str(error.value)
    assert len(str(error.value)) < 2000
