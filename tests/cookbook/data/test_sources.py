"""Reading rows, with their places, from files, folders and hub datasets."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_data
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outside_world import replace_hub_commits, replace_hub_datasets

from cookbook.data import cache
from cookbook.data.formats import conversations_of
from cookbook.data.selection import ReadingOptions
from cookbook.data.sources import (
    KNOWN_DATASETS,
    BadRow,
    HubSource,
    HubStream,
    Row,
    Source,
    known_test_source,
    open_source,
    without_nulls,
)
from cookbook.data.sources.hub import HubName
from cookbook.errors import DataError

CALLS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "id": 1},
    {
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}},
                    {"id": "b", "type": "function", "function": {"name": "g", "arguments": {"s": "t"}}},
                    {"id": "c", "type": "function", "function": {"name": "h", "arguments": {}}},
                ],
            },
        ]
    },
]
"""Rows, messages and arguments with different keys, to which Arrow adds null values."""


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COOKBOOK_CACHE", str(folder))
    return folder


def number_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"é {number}", "number": str(number)} for number in range(count)]


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text(lines_of(rows), encoding="utf-8")
    return path


def write_gzip(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(gzip.compress(lines_of(rows).encode(), mtime=0))
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def write_table(path: Path, rows: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.json": write_json,
    "lines.json": write_jsonl,
    "a.parquet": write_parquet,
    "a.csv": write_table,
    "a.tsv": write_table,
}


def write_folder(folder: Path, rows: list[Any], suffix: str = ".jsonl") -> Path:
    """Writes several files, one of which is shorter than a chunk."""
    folder.mkdir()
    for number, (first, stop) in enumerate([(0, 9), (9, 10), (10, 17), (17, None)]):
        WRITERS[f"a{suffix}"](folder / f"part-{number}{suffix}", rows[first:stop])
    return folder


def hub_source(rows: list[Any]) -> HubSource:
    return HubSource(HubName("owner/name"), datasets.Dataset.from_list(rows))


def hub_stream(rows: list[Any], num_shards: int = 3) -> HubStream:
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)
    return HubStream(HubName("owner/name"), stream, "abc")


KINDS = [*WRITERS, "folder of .jsonl", "folder of .parquet", "folder of .csv", "hub", "hub stream"]


def make_source(kind: str, folder: Path, rows: list[Any]) -> Source:
    if kind.startswith("folder"):
        return open_source(str(write_folder(folder / "parts", rows, kind.removeprefix("folder of "))))
    if kind.startswith("hub"):
        return hub_source(rows) if kind == "hub" else hub_stream(rows)
    return open_source(str(WRITERS[kind](folder / kind, rows)))


def all_rows(source: Source, start: int = 0, size: int = 256) -> list[Row | BadRow]:
    return [row for chunk in source.chunks(start, size) for row in chunk.rows()]


def place(row: Row | BadRow) -> str:
    return row.place


# -- every source -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_reads_the_rows_that_were_written(kind: str, tmp_path: Path) -> None:
    rows = number_rows(23)
    source = make_source(kind, tmp_path, rows)
    assert list(source.rows()) == rows
    assert source.num_rows() in (23, None)
    assert source.name in {"a.jsonl", *WRITERS, "parts", "owner/name (train)"}
    assert len({place(row) for row in source.rows()}) == 23


@pytest.mark.cases(5)
@pytest.mark.parametrize("kind", KINDS)
def test_skipping_equals_slicing_for_every_start_and_size(kind: str, tmp_path: Path) -> None:
    rows = number_rows(23)
    source = make_source(kind, tmp_path, rows)
    whole = all_rows(source)
    for size in (1, 4, 5, 23, 100):
        for start in range(26):
            chunks = list(source.chunks(start, size))
            found = [row for chunk in chunks for row in chunk.rows()]
            assert found == rows[start:]
            assert list(map(place, found)) == list(map(place, whole[start:]))
            assert all(len(chunk) == size for chunk in chunks[:-1])
            assert all(0 < len(chunk) == len(chunk.rows()) <= size for chunk in chunks)
    assert list(source.rows(20)) == rows[20:]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_can_be_passed_to_other_processes(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path, number_rows(23))
    for chunk in source.chunks(2, 10):
        copied = pickle.loads(pickle.dumps(chunk))
        assert copied.rows() == chunk.rows()
        assert list(map(place, copied.rows())) == list(map(place, chunk.rows()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hub")])
def test_a_fingerprint_changes_with_the_content_and_not_with_a_copy(kind: str, tmp_path: Path) -> None:
    fingerprints = []
    for name, rows in {"one": number_rows(23), "copy": number_rows(23), "other": number_rows(24)}.items():
        (tmp_path / name).mkdir()
        fingerprints.append(make_source(kind, tmp_path / name, rows).fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_fingerprints_differ_by_file_type_and_order(tmp_path: Path) -> None:
    rows = [{"text": "a"}]
    same_bytes = [
        open_source(str(write_jsonl(tmp_path / f"a{suffix}", rows))) for suffix in (".jsonl", ".csv")
    ]
    assert len({source.fingerprint() for source in same_bytes}) == 2
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for folder, names in (("x", "ab"), ("y", "ba")):
        for number, name in enumerate(names):
            write_jsonl(tmp_path / folder / f"{name}.jsonl", number_rows(number + 1))
    first, second = (open_source(str(tmp_path / name)) for name in "xy")
    assert first.fingerprint() != second.fingerprint()


def test_a_row_keeps_its_place_in_a_pickle() -> None:
    copied = pickle.loads(pickle.dumps(Row({"a": 1}, "line 3 of b.jsonl")))
    assert (copied, copied.place) == ({"a": 1}, "line 3 of b.jsonl")


# -- text files -------------------------------------------------------------------------------


def test_lines_are_numbered_as_in_an_editor_and_blank_lines_are_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n{"text": "a\\u2028"}\r\n  \r\n{"text": "b\xe2\x80\xa8"}\r\n\r\n[1]\r\n{"text": \r\n'
    )
    rows = list(open_source(str(path)).rows())
    assert rows[:2] == [{"text": "a\u2028"}, {"text": "b\u2028"}]
    assert list(map(place, rows)) == [f"line {number} of a.jsonl" for number in (2, 4, 6, 7)]
    assert rows[2:] == [
        BadRow("line 6 of a.jsonl", "is a JSON list, not an object."),
        BadRow("line 7 of a.jsonl", "is not JSON: Expecting value at column 9."),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "is not UTF-8 text: .*0xff in position 10"),
        (b'{"text": "a', "is not JSON: Unterminated string starting at at column 10"),
        (b"[" * 100_000, "is JSON that cannot be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is JSON that cannot be read"),
        (b"null", "is a JSON NoneType, not an object"),
    ],
)
def test_a_bad_line_is_a_bad_row_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}')
    first, bad, last = open_source(str(path)).rows()
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert isinstance(bad, BadRow)
    assert bad.place == "line 2 of a.jsonl"
    with pytest.raises(DataError, match=reason):
        raise DataError(bad.reason)


@pytest.mark.parametrize("name", WRITERS)
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, number_rows(3))
    content = path.read_bytes()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(content), mtime=0))
    elif not name.endswith(".parquet"):
        path.write_bytes(b"\xef\xbb\xbf" + content)
    assert list(open_source(str(path)).rows()) == number_rows(3)


def test_a_json_list_numbers_its_rows_and_keeps_true_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": {"b": None}}, 3], indent=1), encoding="utf-8")
    row, bad = open_source(str(path)).rows()
    assert row == {"a": {"b": None}}
    assert place(row) == "row 0 of a.json"
    assert bad == BadRow("row 1 of a.json", "is a JSON int, not an object.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *[(name, b"", "has no rows") for name in WRITERS if not name.endswith((".gz", ".parquet"))],
        ("a.jsonl.gz", gzip.compress(b"\n\n", mtime=0), "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"text,number\n", "has no rows"),
        ("a.json", b'"text"', "holds a JSON str. Give a list of objects"),
        ("a.json", b'[{"a": 1}, {"b"', "is not JSON: Expecting ':' delimiter at column 16"),
        ("a.json", b'[\n{"a": 1},\n{"b"\n]', "is not JSON: Expecting ':' delimiter at line 4, column 1"),
        ("a.json", b'["\xff"]', "is not UTF-8 text"),
        ("a.json", b"[" * 100_000, "is JSON that cannot be read"),
        ("a.csv", b"text\n\xff\n", "is not UTF-8 text"),
        ("a.csv", b"text,text\na,b\n", "has two columns `text`"),
        ("a.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"no parquet", "is not a readable Parquet file"),
        ("a.parquet", b"", "is not a readable Parquet file"),
        ("a.txt", b"words", "is not a supported type of file. Give a .jsonl"),
    ],
)
def test_the_error_for_a_bad_file_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(open_source(str(path)).rows())
    assert str(path) in str(caught.value)


def test_an_empty_parquet_file_has_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no rows"):
        list(open_source(str(tmp_path / "a.parquet")).rows())


def test_a_missing_file_is_an_error_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Dataset file .*none.jsonl does not exist"):
        open_source(str(tmp_path / "none.jsonl"))


def test_json_cells_are_decoded_and_empty_cells_are_absent(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'a "b"\nc' + "d" * 200_000}]
    cells = [json.dumps(messages), "", "[not json", "[1]", ""]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["messages", "system", "tools", "text", "empty"], cells, [], ["x"], list("123456")]
        )
    first, second, third = open_source(str(tmp_path / "a.csv")).rows()
    assert first == {"messages": messages, "tools": "[not json", "text": "[1]"}
    assert second == {"messages": "x"}
    # The header, two records and a blank line precede it; in JSON a line break in a text is two characters.
    assert third == BadRow("line 5 of a.csv", "has 6 cells, and the header names 5.")


def test_line_numbers_are_right_after_a_cell_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one\ntwo"\nthree\n', encoding="utf-8")
    rows = list(open_source(str(tmp_path / "a.csv")).rows())
    assert [(row["text"], place(row)) for row in rows if isinstance(row, Row)] == [
        ("one\ntwo", "line 2 of a.csv"),
        ("three", "line 4 of a.csv"),
    ]


# -- Arrow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a.parquet", "hub", "hub stream"])
def test_nulls_that_arrow_adds_are_removed(tmp_path: Path, kind: str) -> None:
    source = hub_stream(CALLS, 1) if kind == "hub stream" else make_source(kind, tmp_path, CALLS)
    raw = pa.Table.from_pylist(CALLS).to_pylist()
    assert raw[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"n": 1, "s": None}
    rows = [row for row in source.rows() if isinstance(row, Row)]
    assert rows == CALLS
    for row, expected in zip(rows, CALLS, strict=True):
        assert conversations_of(row)[0].messages == expected["messages"]


def test_nulls_are_removed_from_objects_and_kept_in_lists() -> None:
    value = {"a": None, "b": [None, {"c": None, "d": 0}], "e": {"f": None}, "g": ""}
    assert without_nulls(value) == {"b": [None, {"d": 0}], "e": {}, "g": ""}


def test_nulls_of_arrow_json_are_kept_and_maps_become_objects(tmp_path: Path) -> None:
    storage = pa.array(['{"role": "tool", "content": {"a": null}}', None, "3"], pa.string())
    table = pa.table(
        {
            "steps": pa.array([[{"x": 0}], [], None], pa.list_(pa.struct([("x", pa.int64())]))),
            "raw": pa.ExtensionArray.from_storage(pa.json_(), storage),
            "map": pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet")).rows()) == [
        {"steps": [{"x": 0}], "raw": {"role": "tool", "content": {"a": None}}, "map": {"a": 1, "b": None}},
        {"steps": []},
        {"raw": 3, "map": {}},
    ]


def test_a_pickled_slice_does_not_contain_the_rest_of_its_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "x" * 1000}] * 100)
    (chunk,) = [*open_source(str(tmp_path / "a.parquet")).chunks(99, 10)]
    assert len(pickle.dumps(chunk)) < 3000


# -- folders ----------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.ndjson", "c.jsonl.gz"):
        WRITERS[f"a{name[1:]}"](tmp_path / name, [{"text": name}])
    (tmp_path / ".hidden").write_text("not data", encoding="utf-8")
    rows = list(open_source(str(tmp_path)).rows())
    assert rows == [{"text": name} for name in ("a.ndjson", "b.jsonl", "c.jsonl.gz")]
    assert place(rows[1]) == f"line 1 of {tmp_path.name}/b.jsonl"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "it has nothing"),
        (["a.jsonl", "b.parquet"], "it has a.jsonl, b.parquet"),
        (["a.txt", "README.md"], "it has README.md, a.txt"),
        ([f"{number}.txt" for number in range(10)], "7.txt and 2 more"),
    ],
)
def test_the_error_for_any_other_folder_lists_its_files(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=f"is a folder, .*{found}"):
        open_source(str(tmp_path))


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", number_rows(2))
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl has no rows"):
        list(open_source(str(tmp_path)).rows())


def test_skipping_decodes_nothing_before_the_start(tmp_path: Path) -> None:
    """Only `rows` decodes a chunk, so bad lines that are skipped have no cost and are not reported."""
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n" * 5 + b'{"text": "a"}\n')
    assert list(open_source(str(tmp_path / "a.jsonl")).rows(5)) == [{"text": "a"}]


# -- the cache of digests ---------------------------------------------------------------------


def settle(path: Path) -> Path:
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def test_a_digest_is_cached_until_the_file_changes(tmp_path: Path, cache_of_the_test: Path) -> None:
    path = settle(write_jsonl(tmp_path / "a.jsonl", number_rows(3)))
    digest = cache.file_digest(path)
    (note,) = (cache_of_the_test / "fingerprints").iterdir()
    values = json.loads(note.read_text(encoding="utf-8"))
    assert values["digest"] == digest
    note.write_text(json.dumps({**values, "digest": "remembered"}), encoding="utf-8")
    assert cache.file_digest(path) == "remembered"
    os.utime(path, (1_000_000_001, 1_000_000_001))
    assert cache.file_digest(path) == digest
    settle(write_jsonl(path, number_rows(4)))
    assert cache.file_digest(path) != digest


def test_the_digest_of_a_file_that_has_just_changed_is_not_cached(
    tmp_path: Path, cache_of_the_test: Path
) -> None:
    cache.file_digest(write_jsonl(tmp_path / "a.jsonl", number_rows(3)))
    assert not (cache_of_the_test / "fingerprints").exists()


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"size": 1, "mtime_ns": 2, "digest": 3}', "\ud800"])
def test_a_damaged_note_is_ignored(tmp_path: Path, cache_of_the_test: Path, note: str) -> None:
    path = settle(write_jsonl(tmp_path / "a.jsonl", number_rows(3)))
    digest = cache.file_digest(path)
    (file,) = (cache_of_the_test / "fingerprints").iterdir()
    file.write_bytes(note.encode(errors="surrogatepass"))
    assert cache.file_digest(path) == digest


def test_a_cache_that_cannot_be_written_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("", encoding="utf-8")
    monkeypatch.setenv("COOKBOOK_CACHE", str(in_the_way / "cache"))
    path = settle(write_jsonl(tmp_path / "a.jsonl", number_rows(3)))
    assert cache.file_digest(path) == cache.file_digest(path)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOKBOOK_CACHE", "~/elsewhere")
    assert cache.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("COOKBOOK_CACHE")
    assert cache.cache_folder() == Path.home() / ".cookbook" / "cache"


# -- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes `load_dataset` read a folder of this machine, and notes its arguments."""
    folder = tmp_path / "published"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{**row, "split": split} for row in CALLS])
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def load_locally(
        hub_id: str, name: str | None = None, revision: str | None = None, **options: Any
    ) -> Any:
        asked.append({"hub_id": hub_id, "name": name, "revision": revision, **options})
        return load(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    replace_hub_datasets(monkeypatch, load_locally)
    return asked


@pytest.mark.parametrize(
    ("spec", "split", "config", "read"),
    [
        ("owner/name", None, None, "train"),
        ("owner/name:small", None, "small", "train"),
        ("owner/name:small:test", None, "small", "test"),
        ("owner/name::test", None, None, "test"),
        ("owner/name::test", "train", None, "train"),
        ("no_robots", None, None, "train"),
        ("no_robots", "test", None, "test"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_may_include_config_and_split(
    local_hub: list[dict[str, Any]],
    spec: str,
    split: str | None,
    config: str | None,
    read: str,
    streaming: bool,
) -> None:
    source = open_source(spec, split, streaming)
    hub_id = "HuggingFaceH4/no_robots" if spec == "no_robots" else "owner/name"
    expected = {"hub_id": hub_id, "name": config, "revision": None, "split": read}
    assert local_hub == [{**expected, "streaming": True} if streaming else expected]
    assert list(source.rows()) == [{**row, "split": read} for row in CALLS]
    assert place(next(iter(source.rows(1)))) == f"row 1 of {hub_id} ({f'{config}, ' * bool(config)}{read})"
    assert isinstance(source, HubStream if streaming else HubSource)


def test_a_stream_reads_the_commit_in_its_fingerprint(
    local_hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_hub_commits(monkeypatch, iter(["one", "one", "two"]))
    first, again, second = (open_source("owner/name", streaming=True).fingerprint() for _ in range(3))
    assert [asked["revision"] for asked in local_hub] == ["one", "one", "two"]
    assert first == again != second


def test_a_fingerprint_of_a_hub_dataset_changes_with_rows_and_split(local_hub: list[dict[str, Any]]) -> None:
    first, again, test = (open_source(spec).fingerprint() for spec in ("a/b", "a/b", "a/b::test"))
    assert first == again != test
    assert hub_source(number_rows(3)).fingerprint() != hub_source(number_rows(4)).fingerprint()


def test_a_selection_of_a_dataset_is_read_in_its_order() -> None:
    dataset = datasets.Dataset.from_list(number_rows(9)).select([7, 1, 3])
    rows = number_rows(9)
    assert list(HubSource(HubName("a/b"), dataset).rows(1)) == [rows[1], rows[3]]


def test_an_interrupted_stream_is_an_error() -> None:
    def broken() -> Any:
        yield {"text": "a"}
        raise ConnectionError("the cable was cut\nand more")

    source = HubStream(HubName("a/b"), datasets.IterableDataset.from_generator(broken), None)
    with pytest.raises(DataError, match=r"Reading a/b \(train\) failed: .*cable was cut"):
        all_rows(source, size=1)


def test_a_hub_dataset_without_rows_is_an_error() -> None:
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    for source in (hub_source([]), HubStream(HubName("owner/name"), empty, None)):
        with pytest.raises(DataError, match=r"owner/name \(train\) has no rows"):
            list(source.rows())


def test_the_error_for_an_unavailable_dataset_tells_how_to_download_it() -> None:
    with pytest.raises(DataError) as caught:
        open_source("owner/name:small")
    said = str(caught.value)
    assert said.startswith(
        "Cannot load split 'train' of dataset 'owner/name' (config 'small'): offline mode is on"
    )
    assert "`hf download --repo-type dataset owner/name`" in said
    assert "dataset=pirate" in said


def test_a_missing_split_is_reported_offline_too(local_hub: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"Cannot load split 'dev' of dataset 'a/b': Unknown split \"dev\""):
        open_source("a/b::dev")


# -- names ------------------------------------------------------------------------------------


def test_pirate_is_embedded() -> None:
    source = open_source("pirate")
    assert source.name == "pirate.jsonl"
    assert all(conversations_of(row) for row in source.rows() if isinstance(row, Row))


def test_test_splits_of_short_names_are_those_of_the_table(local_hub: list[dict[str, Any]]) -> None:
    source = known_test_source("no_robots")
    assert source is not None
    assert local_hub[0]["split"] == "test"
    assert [known_test_source(spec) for spec in ("tulu3", "pirate", "owner/name", "x.jsonl")] == [None] * 4
    assert set(KNOWN_DATASETS) == {"no_robots", "tulu3", "pirate_ultrachat"}


@pytest.mark.parametrize("spec", ["no_robot", "a/b/c", "/a", "a/", "squad", "a/b:c:d:e", "./a", "~/a:test"])
def test_the_error_for_an_unknown_name_lists_the_names(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(spec)
    said = str(caught.value)
    assert said.startswith(f"dataset={spec!r} is not a known name, file or hub id (owner/name).")
    assert said.endswith("Names: pirate, no_robots, tulu3, pirate_ultrachat.")
    assert ("Did you mean `no_robots`?" in said) == (spec == "no_robot")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", number_rows(1))
    for spec in (str(path), "pirate"):
        with pytest.raises(DataError, match="has no splits, and split='test'"):
            open_source(spec, "test")


def test_jsonl_is_read_without_importing_arrow_datasets_or_torch(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CALLS)
    code = (
        "import sys\n"
        "from cookbook.data.formats import conversations_of\n"
        "from cookbook.data.sources import open_source\n"
        f"source = open_source({str(path)!r})\n"
        "assert source.fingerprint() and all(conversations_of(row) for row in source.rows())\n"
        "print([name for name in ('datasets', 'pyarrow', 'torch', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- whole files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chat_data.ROWS)
@pytest.mark.parametrize("kind", ["own", pytest.param("published", marks=pytest.mark.published)])
def test_files_of_well_known_formats_are_read_completely(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "published":
        path, values = chat_data.published_path(name), chat_data.published_rows(name)
    else:
        path, values = tmp_path / name, chat_data.ROWS[name]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in values)
        text = lines if path.suffix == ".jsonl" else json.dumps(values, ensure_ascii=False, indent=2)
        path.write_text(text, encoding="utf-8")
    rows = list(open_source(str(path)).rows())
    assert rows == values
    assert all(len(conversations_of(row)) == 1 for row in rows if isinstance(row, Row))


def test_an_unclosed_quote_in_a_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nq1,a1\nq2,"a2 unclosed\n' + "q3,a3\n" * 5, encoding="utf-8")
    rows = []
    with contextlib.suppress(DataError):
        rows = list(open_source(str(path)).rows())
    assert not any("q3" in str(row.get("completion")) for row in rows if isinstance(row, Row))
    assert not rows or isinstance(rows[-1], BadRow)


def test_a_value_of_a_table_that_cannot_be_read_gives_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = list(open_source(str(tmp_path / "a.parquet")).rows())
    assert [type(row) for row in rows] == [Row, BadRow, Row]


def test_a_number_that_python_refuses_to_parse_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "n": ' + "9" * 5000 + "}]", encoding="utf-8")
    with pytest.raises(DataError, match="a.json"):
        list(open_source(str(path)).rows())


# -- what is nearly right ---------------------------------------------------------------------

OBJECT = {"prompt": "Grüße ☕", "completion": "x"}
PRETTY = json.dumps(OBJECT, indent=2, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{PRETTY}\n{PRETTY}\n",
            r"has an object over lines 1 to 4, and JSON lines have one object",
        ),
        (f"\n{PRETTY}", r"has an object over lines 2 to 5.*jq -c \. a.jsonl"),
        (
            json.dumps([OBJECT, OBJECT], indent=1),
            r"has a list over lines 1 to 10.*name end in .json.*jq -c '.\[\]'",
        ),
        ("[\n" + json.dumps(OBJECT) + ",\n" + json.dumps(OBJECT) + "\n]\n", r"has a list over lines 1 to 4"),
    ],
)
@pytest.mark.parametrize("on_gzip", [False, True])
def test_pretty_printed_json_lines_are_refused_and_read_as_json(
    tmp_path: Path, text: str, said: str, on_gzip: bool
) -> None:
    content = b"\xef\xbb\xbf" + text.encode()
    suffix = ".gz" if on_gzip else ""
    for ending in ("jsonl", "json"):
        (tmp_path / f"a.{ending}{suffix}").write_bytes(
            gzip.compress(content, mtime=0) if on_gzip else content
        )
    with pytest.raises(DataError, match=said) as caught:
        list(open_source(str(tmp_path / f"a.jsonl{suffix}")).rows())
    assert "\n" not in str(caught.value)
    if text.count("prompt") > 1:
        assert list(open_source(str(tmp_path / f"a.json{suffix}")).rows()) == [OBJECT, OBJECT]
    assert ("Let its name end in .json" in str(caught.value)) == (text.count("prompt") > 1)


def test_long_first_lines_are_read_as_lines(tmp_path: Path) -> None:
    rows = [{"text": "x" * 100_000}, {"text": "[" * 2_000_000}]
    for names in (rows, rows[::-1]):
        assert list(open_source(str(write_jsonl(tmp_path / "a.jsonl", names))).rows()) == names


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": 1,}', "Remove the comma before `}`."),
        ('{"a": [1, ]}', "Remove the comma before `]`."),
        ('{"a": 1},', "JSON lines have one object per line, without commas."),
        ('{"a": 1} {"a": 2}', "JSON lines have one object per line."),
        ("{'a': 1}", "Quotes are double in JSON: write Python's values with json.dumps."),
        ('{"a": [', "The line ends within a value: JSON lines have one object per line."),
        ('[{"a": 1}]', "Write one object a line; a file that is one list is named .json."),
        ('[{"role": "user", "content": "a"}]', 'Write {"messages": [...]}.'),
        (
            "{\"messages\": \"[{'role': 'user'}]\"}",
            "is Python's repr of its value (single quotes), not JSON.",
        ),
    ],
)
def test_the_error_for_a_line_that_is_nearly_json_gives_advice(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n', encoding="utf-8")
    _, bad = open_source(str(path)).rows()
    assert isinstance(bad, BadRow)
    assert bad.place == "line 2 of a.jsonl"
    assert said in bad.reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": {"0": "a"}, "completion": {"0": "b"}}', 'to_json(path, orient="records")'),
        ('[{"a": 1},]', "Remove the comma before `]`."),
        ("[{'a': 1}]", "write Python's values with json.dumps"),
        ('"text"', "holds a JSON str. Give a list of objects."),
    ],
)
def test_the_error_for_a_json_file_that_is_nearly_a_list_gives_advice(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(open_source(str(path)).rows())
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_json_file_of_one_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"messages": [\n{"role": "user", "content": "a"}]}', encoding="utf-8")
    (row,) = open_source(str(path)).rows()
    assert (dict(row), row.place) == ({"messages": [{"role": "user", "content": "a"}]}, "a.json")


def test_an_object_around_the_rows_is_refused_with_how_to_unwrap_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": 1, "rows": [{"a": 1}]}', encoding="utf-8")
    (row,) = open_source(str(path)).rows()
    with pytest.raises(DataError, match=r"""The rows may be those under `rows`: jq '.\["rows"\]'"""):
        conversations_of(row)


def test_nan_is_read_as_python_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "score": NaN}\n', encoding="utf-8")
    (row,) = open_source(str(path)).rows()
    assert isinstance(row, Row)
    assert len(conversations_of(row)) == 1
    with pytest.raises(DataError, match="`score` is nan|`reward` is nan"):
        conversations_of({**row, "reward": float("nan")}, options=ReadingOptions(min_reward=0.5))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    "cell",
    [
        repr(CALLS[0]["messages"]),
        "[{'content': 'a', 'role': 'user'}\n {'content': \"it's\", 'role': 'assistant'}]",  # str of an array
        f"array({CALLS[0]['messages']!r}, dtype=object)",
    ],
)
def test_cells_with_a_python_repr_are_refused_with_their_line(tmp_path: Path, suffix: str, cell: str) -> None:
    path = tmp_path / f"a{suffix}"
    good = json.dumps(CALLS[0]["messages"])
    write_table(path, [{"messages": good}, {"messages": cell}])
    first, bad = open_source(str(path)).rows()
    assert first == {"messages": CALLS[0]["messages"]}
    assert isinstance(bad, BadRow)
    assert bad.place == f"line 3 of a{suffix}"
    assert bad.reason.startswith(
        "`messages` is Python's repr of its value (single quotes), not JSON. Write it with"
    )
    assert "json.dumps" in bad.reason
    assert "Parquet" in bad.reason


def test_the_error_for_a_cell_of_invalid_json_gives_the_position(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", [{"messages": '[{"role": "user"'}])
    (bad,) = open_source(str(tmp_path / "a.csv")).rows()
    assert bad == BadRow("line 2 of a.csv", "`messages` is not JSON: Expecting ',' delimiter at column 17.")


LATIN1 = "text\nok\ncafé\n".encode("latin-1")
JSON_LATIN1 = '{"text": "ok"}\n{"text": "café"}\n'.encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", LATIN1, r"line 3 of .*a.csv is not UTF-8 text: byte 0xe9 in position 3 of the line.*iconv"),
        ("a.tsv.gz", gzip.compress(LATIN1, mtime=0), r"line 3 of .*a.tsv.gz is not UTF-8 text"),
        (
            "a.json",
            b'[\n{"text": "caf\xe9"}\n]',
            r"line 2 of .*a.json is not UTF-8 text: byte 0xe9 in position 13",
        ),
        *[
            (f"a.{kind}", text.encode(encoding), rf"a.{kind} is UTF-16.* text, not UTF-8.*iconv -f UTF-16")
            for kind, text in (
                ("jsonl", '{"text": "a"}\n'),
                ("json", '[{"text": "a"}]'),
                ("csv", "text\na\n"),
            )
            for encoding in ("utf-16", "utf-16-le", "utf-16-be")
        ],
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is compressed with gzip. Let its name end in .gz"),
        ("a.json", b"PAR1....", "is a Parquet file. Let its name end in .parquet"),
        ("a.parquet", gzip.compress(b"x", mtime=0), "is compressed with gzip"),
        ("a.csv.gz", b"text\na\n", r"Not a gzipped file.*Remove .gz from its name"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "it is truncated. Copy it again"),
    ],
)
def test_a_file_in_another_encoding_or_format_is_an_error_of_one_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(open_source(str(tmp_path / name)).rows())
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_in_another_encoding_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSON_LATIN1)
    first, bad = open_source(str(tmp_path / "a.jsonl")).rows()
    assert first == {"text": "ok"}
    assert isinstance(bad, BadRow)
    assert bad.place == "line 2 of a.jsonl"
    assert bad.reason.startswith("is not UTF-8 text: byte 0xe9 in position 13 of the line. Convert the file")


def test_a_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", number_rows(50))
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a.parquet is not a readable Parquet file"):
            list(open_source(str(path)).rows())


@pytest.mark.parametrize(
    "name", [f"a{suffix}.gz" for suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")]
)
def test_text_files_may_be_gzipped(tmp_path: Path, name: str) -> None:
    plain = WRITERS[name.removesuffix(".gz")](tmp_path / name.removesuffix(".gz"), number_rows(3))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    assert list(open_source(str(tmp_path / name)).rows()) == number_rows(3)
