"""Folders with splits, as on the hub: which files are for training, and which for evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from cookbook.data import NamedChatDatasetBuilder
from cookbook.data.builders import open_sources
from cookbook.data.sources import open_source
from cookbook.data.sources.splits import layout_of
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.errors import DataError

README = """---
license: mit
configs:
{configs}
---
# A dataset
"""


def row(name: str, number: int = 0) -> dict[str, Any]:
    return {"prompt": f"{name} {number}", "completion": "x"}


def write(folder: Path, *names: str, rows: int = 3) -> Path:
    """Writes files whose rows contain the name of their file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row(name, number)) for number in range(rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return folder


def files_of(spec: str | Path, **options: Any) -> list[str]:
    """Returns the names of the files whose rows a source reads."""
    found = open_source(str(spec), **options).rows()
    return list(dict.fromkeys(one["prompt"].split()[0] for one in found if not isinstance(one, tuple)))


def evaluation_files(spec: str | Path) -> list[str]:
    evaluation = open_source(str(spec)).evaluation
    return [] if evaluation is None else list(evaluation.files)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["test-00000-of-00001.jsonl"]),
        (["data/train-00000-of-00001.jsonl"], ["data/validation-00000-of-00001.jsonl"]),
        (["train.jsonl"], ["validation.jsonl", "test.jsonl"]),
        (["training_set.jsonl"], ["dev.jsonl"]),
        (["my-train.jsonl"], ["my-val.jsonl", "my-eval.jsonl"]),
        (["train/a.jsonl", "train/deep/b.jsonl"], ["valid/a.jsonl", "testing/a.jsonl"]),
        (["chats_train_1.jsonl", "chats_train_2.jsonl"], ["chats.evaluation.jsonl"]),
        (["TRAIN.jsonl"], ["Test.jsonl"]),
    ],
)
def test_train_files_are_trained_on_and_the_others_evaluated(
    tmp_path: Path, train: list[str], evaluation: list[str]
) -> None:
    write(tmp_path, *train, *evaluation)
    assert files_of(tmp_path) == train
    assert evaluation_files(tmp_path) == evaluation
    assert files_of(tmp_path, is_for_evaluation=True) == evaluation
    assert files_of(f"{tmp_path}:train") == train


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl"],
        ["latest.jsonl", "contest.jsonl", "trainer.jsonl"],
        ["part1/a.jsonl", "part2/a.jsonl"],
    ],
)
def test_without_names_of_splits_all_files_are_trained_on(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, *names)
    source = open_source(str(tmp_path))
    assert files_of(tmp_path) == sorted(names)
    assert (source.evaluation, source.name) == (None, tmp_path.name)
    assert files_of(tmp_path, is_for_evaluation=True) == sorted(names)
    assert files_of(f"{tmp_path}:train") == sorted(names)


NAMES = [
    ["train.jsonl", "test.jsonl", "other.jsonl"],
    ["data/train-00000-of-00001.jsonl", "data/extra-00000-of-00001.jsonl", "test.jsonl"],
    ["train/a.jsonl", "val/b.jsonl", "c.jsonl"],
    ["eval-1.jsonl", "x.dev.jsonl", "train 3.jsonl", "7training.jsonl"],
    ["a/train.jsonl", "b/test/c.jsonl"],
    ["testing.jsonl", "validation_matched.jsonl", "train.v2.jsonl"],
    ["a.jsonl", "__cache__/train.jsonl", ".hidden/test.jsonl", ".train.jsonl"],
    ["traineval.jsonl", "pretrain.jsonl", "devel.jsonl"],
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: " ".join(names))
def test_splits_equal_those_of_the_datasets_library(
    tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", *names, rows=1)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    expected = {split: sorted(loaded[split]["prompt"]) for split in loaded}
    layout = layout_of(folder, lambda path: path.endswith(".jsonl"))
    found = {split: sorted(f"{name} 0" for name in files) for split, files in layout.splits.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("names", "spec", "said"),
    [
        (["test.jsonl"], "", "has no split 'train': it has test (test.jsonl). Name the split"),
        (
            ["dev.jsonl", "chats.jsonl"],
            "",
            "The names of chats.jsonl say no split. Rename them, as to train-chats.jsonl",
        ),
        (
            ["train.jsonl", "test.jsonl"],
            ":dev",
            "has no split 'dev'. It has train (train.jsonl), test (test.jsonl).",
        ),
        (["train.jsonl", "test.jsonl"], "::train+dev", "has no split 'dev'."),
        (["a.jsonl"], ":test", "has no split 'test'. It has train (a.jsonl)."),
        (["train.jsonl"], ":small:train", "has no config 'small'. Its README.md defines none."),
        (["train.jsonl", "test_train.jsonl"], "", "test_train.jsonl in"),
        (["data/chats-00000-of-00001.jsonl"], "", "it has chats (data/chats-00000-of-00001.jsonl)"),
    ],
)
def test_the_error_for_a_missing_split_lists_the_splits(
    tmp_path: Path, names: list[str], spec: str, said: str
) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        open_source(f"{tmp_path}{spec}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_is_named_after_a_folder_as_after_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "owner" / "name", "train.jsonl", "dev.jsonl", "test.jsonl")
    monkeypatch.chdir(tmp_path)
    for spec in ("owner/name:test", "owner/name::test", f"{tmp_path}/owner/name/:test"):
        assert files_of(spec) == ["test.jsonl"]
    assert files_of("owner/name::dev+test".replace("dev", "validation")) == ["dev.jsonl", "test.jsonl"]
    assert files_of("owner/name", split="test") == ["test.jsonl"]
    assert open_source("owner/name:test").name == "name (test)"
    assert open_source("owner/name:test").unread == ["dev.jsonl", "train.jsonl"]
    assert [source.name for source in open_sources("owner/name:test,owner/name")] == [
        "name (test)",
        "name (train)",
    ]


def test_an_existing_path_with_a_colon_is_read_as_a_path(tmp_path: Path) -> None:
    write(tmp_path / "a:test", "a.jsonl")
    write(tmp_path / "a", "train.jsonl", "test.jsonl")
    assert files_of(tmp_path / "a:test") == ["a.jsonl"]
    with pytest.raises(DataError, match="has no splits, and split='train' was asked for"):
        open_source(f"{tmp_path}/a:test/a.jsonl:train")


def test_the_name_of_the_folder_itself_does_not_select_a_split(tmp_path: Path) -> None:
    folder = write(tmp_path / "test" / "train [1]*", "a.jsonl", "b.jsonl")
    assert files_of(folder) == ["a.jsonl", "b.jsonl"]


# -- cloned from the hub ----------------------------------------------------------------------


def write_readme(folder: Path, configs: str) -> Path:
    (folder / "README.md").write_text(README.format(configs=configs), encoding="utf-8")
    return folder


TWO_CONFIGS = """\
- config_name: small
  data_files:
  - split: train
    path: small/*.jsonl
  - split: test_sft
    path: [held/a.jsonl, "held/b*"]
- config_name: large
  default: true
  data_files:
  - split: train
    path: "large/**"
"""


def test_the_readme_of_a_cloned_folder_defines_configs_and_splits(tmp_path: Path) -> None:
    names = ["small/1.jsonl", "small/2.jsonl", "held/a.jsonl", "held/b1.jsonl", "large/x/test.jsonl"]
    folder = write_readme(write(tmp_path, *names), TWO_CONFIGS)
    assert files_of(folder) == ["large/x/test.jsonl"]
    assert files_of(f"{folder}:small") == ["small/1.jsonl", "small/2.jsonl"]
    assert evaluation_files(f"{folder}:small") == ["held/a.jsonl", "held/b1.jsonl"]
    assert files_of(f"{folder}:small:test_sft") == ["held/a.jsonl", "held/b1.jsonl"]
    assert open_source(f"{folder}:small").name == f"{tmp_path.name} (small, train)"
    with pytest.raises(DataError, match=r"has no config 'tiny'. Its README.md has small, large."):
        open_source(f"{folder}:tiny:train")
    with pytest.raises(
        DataError, match=r"has no split 'tiny'. It has train \(large/x/test.jsonl\) in config"
    ):
        open_source(f"{folder}:tiny")


@pytest.mark.parametrize(
    ("configs", "train", "evaluation"),
    [
        ("- config_name: default\n  data_files: '*.jsonl'", ["test.jsonl", "train.jsonl"], []),
        ("- config_name: default\n  data_files: [train.jsonl]", ["train.jsonl"], []),
        ("- config_name: one", ["train.jsonl"], ["test.jsonl"]),
        ("- config_name: one\n  data_dir: inner", ["inner/train.jsonl"], ["inner/test.jsonl"]),
    ],
)
def test_data_files_may_have_every_form_of_the_hub(
    tmp_path: Path, configs: str, train: list[str], evaluation: list[str]
) -> None:
    names = ["train.jsonl", "test.jsonl"]
    if "data_dir" in configs:
        names += ["inner/train.jsonl", "inner/test.jsonl"]
    folder = write_readme(write(tmp_path, *names), configs)
    assert files_of(folder) == train
    assert evaluation_files(folder) == evaluation


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    ("readme", "said"),
    [
        (
            README.format(configs="- config_name: a\n- config_name: b"),
            "has the configs a, b, and none is the default",
        ),
        (README.format(configs="- data_files: x"), "must include `config_name`"),
        (
            README.format(configs="- config_name: a\n  data_files: no*"),
            "is no*, and no data file there is called so",
        ),
        (
            README.format(configs="- config_name: a\n  data_files: ../train.jsonl"),
            "no data file there is called so",
        ),
        (README.format(configs="- config_name: a\n  sep: ';'"), "has `sep`, which is not supported"),
        ("---\nconfigs: [\n---\n", "cannot be read"),
        (f"---\nconfigs: {'[' * 3000}\n---\n", "cannot be read"),
        ("---\nconfigs: !!int ''\n---\n", "cannot be read as int"),
        ("---\na: &a {b: *a}\n---\n", "an alias refers to a value that contains it"),
    ],
)
def test_an_invalid_readme_is_an_error_of_one_line(tmp_path: Path, readme: str, said: str) -> None:
    folder = write(tmp_path / "set", "train.jsonl", "test.jsonl")
    write(tmp_path, "train.jsonl")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        open_source(str(folder))
    assert said in str(caught.value)
    assert "README.md" in str(caught.value) or "configs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_data_are_ignored_in_a_cloned_folder(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    for name in ("LICENSE", "make.py", ".gitattributes", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text", encoding="utf-8")
    (folder / "README.md").write_text("# No YAML here", encoding="utf-8")
    (folder / "dataset_infos.json").write_text("{}", encoding="utf-8")
    source = open_source(str(folder))
    assert source.files == ["data/train-00000-of-00001.jsonl"]
    assert source.unread == ["LICENSE", "dataset_infos.json", "make.py"]


def test_a_git_lfs_pointer_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    for name in ("train.jsonl", "train.parquet", "train.arrow", "train.json"):
        (tmp_path / name).write_text(pointer, encoding="utf-8")
        with pytest.raises(DataError, match=f"{name} is a pointer of Git LFS.*Run: git lfs pull"):
            list(open_source(str(tmp_path / name)).rows())


# -- saved by datasets ------------------------------------------------------------------------


def saved_rows(name: str, number: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([row(name, index) for index in range(number)])


def test_a_saved_dataset_is_read_in_order(tmp_path: Path) -> None:
    dataset = saved_rows("a", 25)
    dataset.save_to_disk(tmp_path / "whole", num_shards=3)
    dataset.select([7, 1, 3]).save_to_disk(tmp_path / "some")
    source = open_source(str(tmp_path / "whole"))
    assert list(source.rows()) == dataset.to_list()
    assert list(source.rows(11)) == dataset.to_list()[11:]
    assert source.num_rows() == 25
    assert list(open_source(str(tmp_path / "some")).rows()) == [row("a", number) for number in (7, 1, 3)]


def test_a_saved_dictionary_of_datasets_has_splits(tmp_path: Path) -> None:
    splits = {"train": saved_rows("train", 4), "test": saved_rows("test", 2), "more": saved_rows("more", 1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    assert list(source.rows()) == splits["train"].to_list()
    assert source.evaluation is not None
    assert list(source.evaluation.rows()) == splits["test"].to_list()
    assert source.unread == ["more/data-00000-of-00001.arrow"]
    assert list(open_source(f"{tmp_path}/set:more").rows()) == splits["more"].to_list()
    with pytest.raises(DataError, match="has no split 'dev'. It has train .*, test .*, more "):
        open_source(f"{tmp_path}/set:dev")


def test_datasets_saved_in_sibling_folders_are_splits(tmp_path: Path) -> None:
    saved_rows("train", 2).save_to_disk(tmp_path / "train")
    saved_rows("test", 1).save_to_disk(tmp_path / "test")
    assert files_of(tmp_path) == ["train"]
    assert evaluation_files(tmp_path) == ["test/data-00000-of-00001.arrow"]


def test_a_saved_dataset_with_a_missing_file_is_an_error(tmp_path: Path) -> None:
    saved_rows("a", 2).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"state.json names data-00000-of-00001.arrow, which is not there"):
        open_source(str(tmp_path / "set"))


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_arrow_streams_and_arrow_files_with_an_index_are_read(
    tmp_path: Path, compression: str | None
) -> None:
    table = pa.Table.from_pylist([row("a", number) for number in range(10)])
    options = pa.ipc.IpcWriteOptions(compression=compression)
    for name, writer in (("a", pa.ipc.new_stream), ("b", pa.ipc.new_file)):
        with writer(tmp_path / f"{name}.arrow", table.schema, options=options) as file:
            file.write_table(table, max_chunksize=4)
    for name in ("a", "b"):
        source = open_source(str(tmp_path / f"{name}.arrow"))
        assert source.num_rows() == 10
        for start in (0, 3, 4, 9, 10):
            assert list(source.rows(start)) == table.to_pylist()[start:]


def test_a_truncated_arrow_file_is_an_error_at_any_length(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row("a", number) for number in range(10)])
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    content = (tmp_path / "a.arrow").read_bytes()
    for length in range(0, len(content), 8):
        (tmp_path / "a.arrow").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a.arrow is not a readable Arrow file"):
            list(open_source(str(tmp_path / "a.arrow")).rows())


# -- builders ---------------------------------------------------------------------------------


def built(model: str, dataset: str, **options: Any) -> Any:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=model, batch_size=2)
    return NamedChatDatasetBuilder(dataset=dataset, common_config=common, **options)()


def num_rows(data: Any) -> int | None:
    return None if data is None else data.summary()["rows"]


@pytest.mark.parametrize(
    ("spec", "options", "sizes"),
    [
        ("", {}, (6, 5)),
        ("", {"test_size": 2}, (4, 2)),
        ("", {"test_size": 0}, (6, None)),
        ("", {"eval_dataset": "more.jsonl"}, (6, 7)),
        ("", {"eval_dataset": "set:validation"}, (6, 2)),
        (":test", {}, (3, None)),
        (":train", {"eval_dataset": "set"}, (6, 5)),
    ],
)
def test_the_other_splits_are_evaluated_unless_the_config_says_otherwise(
    tmp_path: Path,
    tiny_qwen3: str,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    options: dict[str, Any],
    sizes: tuple[int, int | None],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", "train.jsonl", rows=6)
    write(tmp_path / "set", "test.jsonl", rows=3)
    write(tmp_path / "set", "validation.jsonl", rows=2)
    write(tmp_path, "more.jsonl", rows=7)
    train, test = built(tiny_qwen3, f"set{spec}", **options)
    assert (num_rows(train), num_rows(test)) == sizes


def test_the_report_lists_the_files_of_each_role(tmp_path: Path, tiny_qwen3: str) -> None:
    folder = write(tmp_path / "set", "train.jsonl", "test.jsonl", "other.jsonl")
    train, test = built(tiny_qwen3, str(folder))
    assert "  training files: train.jsonl" in train.reports()[0].lines()
    assert "  not read for training: other.jsonl" in train.reports()[0].lines()
    assert "  evaluation files: test.jsonl" in test.reports()[0].lines()
    assert train.reports()[0].to_json()["files"] == ["train.jsonl"]
    held_out, _ = built(tiny_qwen3, str(folder), test_size=1)
    assert "  not read for training: other.jsonl, test.jsonl" in held_out.reports()[0].lines()


def test_a_streamed_folder_trains_on_its_train_files(tmp_path: Path, tiny_qwen3: str) -> None:
    folder = write(tmp_path / "set", "train.jsonl", "test.jsonl")
    stream, test = built(tiny_qwen3, str(folder), streaming=True)
    assert sum(len(stream.get_batch(index)) for index in range(2)) == 3
    assert num_rows(test) == 3
    assert "  training files: train.jsonl" in stream.reports()[0].lines()
    assert "  evaluation files: test.jsonl" in test.reports()[0].lines()


def test_the_training_data_of_a_folder_do_not_depend_on_the_other_splits(
    tmp_path: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "set", "train.jsonl", "test.jsonl")

    def fingerprint() -> str:
        found = built(tiny_qwen3, str(folder))[0].fingerprint()
        assert found is not None
        return str(found)

    def num_rendered() -> int:
        return len(list((tmp_path / "cache" / "rendered").iterdir()))

    first = fingerprint()
    assert (fingerprint(), num_rendered()) == (first, 2)
    write(folder, "test.jsonl", rows=5)
    assert (fingerprint(), num_rendered()) == (first, 3)
    write(folder, "train.jsonl", rows=5)
    assert fingerprint() != first


def test_a_link_must_lead_to_a_file_or_to_a_folder_inside(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "set", "a/one.jsonl"), write(tmp_path / "blobs", "two")
    (folder / "two.jsonl").symlink_to(other / "two")
    (folder / "b").symlink_to("a")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        assert layout_of(place, lambda path: True).files(["train"]) == ["a/one.jsonl", "two.jsonl"]
    (folder / "all").symlink_to("/")
    with pytest.raises(DataError, match="all is a link to the folder /, outside of"):
        layout_of(folder, lambda path: True)


@pytest.mark.parametrize("split", ["../../elsewhere", "a/b", "a\0b", ""])
def test_a_split_of_a_saved_dataset_must_be_a_folder_inside(tmp_path: Path, split: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [split]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset_dict.json has the split .*, which names no folder"):
        layout_of(tmp_path, lambda path: True)


@pytest.mark.parametrize("name", ["../data.arrow", "/etc/passwd", "a\0b", "x" * 300])
def test_a_file_of_a_saved_dataset_must_be_in_the_folder_of_its_state(tmp_path: Path, name: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="which is not there"):
        layout_of(tmp_path, lambda path: True)


def test_the_time_to_read_a_table_is_linear_in_its_columns(tmp_path: Path) -> None:
    columns = [*(f"c{number}" for number in range(100_000)), "prompt", "completion"]
    cells = [*[""] * 100_000, "a", "b"]
    (tmp_path / "a.csv").write_text(f"{','.join(columns)}\n{','.join(cells)}\n", encoding="utf-8")
    started = time.process_time()
    assert len(list(open_source(str(tmp_path / "a.csv")).rows())) == 1
    assert time.process_time() - started < 10  # quadratic time would be minutes
