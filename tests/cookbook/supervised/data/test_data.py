"""Rows to Datums, and the builders that hold the way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from cookbook.errors import ConfigError, CookbookError, DataError
from cookbook.supervised.data import (
    FromConversationFileBuilder,
    NamedChatDatasetBuilder,
    StreamingSupervisedDatasetFromHFDataset,
    SupervisedDatasetFromHFDataset,
    conversation_to_datum,
    datum_from_tokens,
)
from cookbook.supervised.types import (
    ChatDatasetBuilder,
    ChatDatasetBuilderCommonConfig,
    SupervisedDataset,
    SupervisedDatasetBuilder,
)
from cookbook.types import Datum, ModelInput
from renderers import TrainOnWhat, get_renderer

CHAT = [{"role": "user", "content": "How many legs?"}, {"role": "assistant", "content": "eight"}]


def row_datum(row: dict[str, Any]) -> Datum:
    return Datum(ModelInput.from_ints([row["id"], 0]), {"target_tokens": [1, 1], "weights": [1.0, 1.0]})


def ids_of(batch: list[Datum]) -> list[int]:
    return [datum.model_input.to_ints()[0] for datum in batch]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_builder(path: Path, model: str, **options: Any) -> FromConversationFileBuilder:
    common = {
        "batch_size": 2,
        **{key: options.pop(key) for key in ("max_length", "train_on_what") if key in options},
    }
    return FromConversationFileBuilder(
        file_path=str(path),
        common_config=ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=model, **common),
        **{"test_size": 0, **options},
    )


# -- one example ------------------------------------------------------------------------------


def test_a_datum_is_the_tokens_shifted_by_one() -> None:
    datum = datum_from_tokens([10, 11, 12, 13], np.array([0, 0, 1, 1], np.float32), max_length=None)
    assert datum.model_input.to_ints() == [10, 11, 12]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [11, 12, 13]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1, 1]


def test_a_truncated_datum_keeps_its_prompt() -> None:
    datum = datum_from_tokens([10, 11, 12, 13], np.array([0, 0, 1, 1], np.float32), max_length=3)
    assert datum.model_input.to_ints() == [10, 11]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1]


def test_a_conversation_trains_the_reply_and_its_end_alone(tiny_tokenizer: Any) -> None:
    renderer = get_renderer("chat_template", tiny_tokenizer)
    datum = conversation_to_datum(CHAT, renderer, 512, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    assert tiny_tokenizer.decode(targets[weights > 0]) == "eight<|im_end|>"
    full = datum.model_input.to_ints()[:1] + targets.tolist()
    assert full == tiny_tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


# -- datasets ---------------------------------------------------------------------------------


@pytest.fixture
def numbered() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"id": number} for number in range(10)])


def test_an_epoch_has_every_row_once_in_the_order_of_its_seed(numbered: datasets.Dataset) -> None:
    dataset = SupervisedDatasetFromHFDataset(numbered, 4, map_fn=row_datum)
    assert len(dataset) == 3
    orders = []
    for seed in (1, 2, 1):
        dataset.set_epoch(seed)
        orders.append([number for index in range(3) for number in ids_of(dataset.get_batch(index))])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] == orders[2] != orders[1]


def test_a_row_may_become_several_datums(numbered: datasets.Dataset) -> None:
    dataset = SupervisedDatasetFromHFDataset(numbered, 4, flatmap_fn=lambda row: [row_datum(row)] * 2)
    assert ids_of(dataset.get_batch(0)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_stream_gives_its_rows_once_and_skips_ahead_to_where_a_run_resumes(
    numbered: datasets.Dataset,
) -> None:
    stream = numbered.to_iterable_dataset()

    def make() -> StreamingSupervisedDatasetFromHFDataset:
        dataset = StreamingSupervisedDatasetFromHFDataset(
            stream, 4, length=10, map_fn=row_datum, buffer_size=3
        )
        dataset.set_epoch(7)
        return dataset

    whole = make()
    batches = [ids_of(whole.get_batch(index)) for index in range(len(whole))]
    assert sorted(itertools.chain(*batches)) == list(range(10))
    assert list(itertools.chain(*batches)) != list(range(10))
    resumed = make()
    assert [ids_of(resumed.get_batch(index)) for index in (1, 2)] == batches[1:]
    assert ids_of(resumed.get_batch(0)) == batches[0]


def test_a_stream_shorter_than_its_length_is_an_error(numbered: datasets.Dataset) -> None:
    dataset = StreamingSupervisedDatasetFromHFDataset(
        numbered.to_iterable_dataset(), 4, length=20, map_fn=row_datum
    )
    with pytest.raises(DataError, match="fewer than length=20 rows"):
        dataset.get_batch(4)


# -- builders ---------------------------------------------------------------------------------


def test_a_builder_subclass_needs_no_decorator(tiny_qwen3: str) -> None:
    class MyDatasetBuilder(SupervisedDatasetBuilder):
        def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
            rows = datasets.Dataset.from_list([{"id": 1}])
            return SupervisedDatasetFromHFDataset(rows, 1, map_fn=row_datum), None

    class MyChats(ChatDatasetBuilder):
        common_config = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=tiny_qwen3, renderer_name="chat_template", batch_size=8, max_length=4096
        )

    assert ids_of(MyDatasetBuilder()()[0].get_batch(0)) == [1]
    assert MyChats().common_config.batch_size == 8
    assert MyChats().renderer.name == "chat_template"
    assert len(MyChats().tokenizer) > 0


def test_held_out_rows_are_never_trained_on(tmp_path: Path, tiny_qwen3: str, chats: list) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    train, test = make_builder(path, tiny_qwen3, test_size=5)()
    assert test is not None

    def examples(dataset: SupervisedDataset) -> list[tuple[int, ...]]:
        return [tuple(d.model_input.to_ints()) for i in range(len(dataset)) for d in dataset.get_batch(i)]

    assert len(examples(test)) == 5
    assert len(examples(train)) == len(chats) - 5
    assert not set(examples(test)) & set(examples(train))


def test_by_default_one_row_in_twenty_is_held_out(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 40)
    train, test = make_builder(path, tiny_qwen3, test_size=None)()
    assert test is not None
    assert (train.summary()["rows"], test.summary()["rows"]) == (38, 2)


def test_json_and_parquet_files_hold_the_same_rows_as_jsonl(
    tmp_path: Path, tiny_qwen3: str, chats: list
) -> None:
    rows = [{"messages": messages} for messages in chats]
    paths = [write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "chats.json", tmp_path / "chats.parquet"]
    paths[1].write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(paths[2])
    batches = [ids_of(make_builder(path, tiny_qwen3)()[0].get_batch(3)) for path in paths]
    assert batches[0] == batches[1] == batches[2]


def test_an_example_without_a_trained_token_is_left_out_and_counted(
    tmp_path: Path, tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    long_prompt = [{"role": "user", "content": "legs " * 50}, {"role": "assistant", "content": "eight"}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": long_prompt}])
    train, _ = make_builder(path, tiny_qwen3, max_length=40)()
    assert len(train.get_batch(0)) == 1
    assert train.summary()["untrained_examples"] == 1
    assert "no trained token is left" in caplog.text


# -- bad input --------------------------------------------------------------------------------

NO_REPLY = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"messages": []}\n{"messages": [\n', "line 2 of .* is not JSON: Expecting value at column 15"),
        (json.dumps({"messages": CHAT}) + "\n[1]\n", "line 2 of .* is a JSON list, not an object"),
        (
            json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"messages": NO_REPLY}) + "\n",
            r"line 3 of chats.jsonl: no assistant message \(roles: system, user\)",
        ),
        ('{"text": "hello", "id": 3}\n', r"line 1 of chats.jsonl: no list of `messages` \(keys: text, id\)"),
    ],
)
def test_a_bad_file_is_one_error_that_names_the_place(
    tmp_path: Path, tiny_qwen3: str, content: str, message: str
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        make_builder(path, tiny_qwen3)()


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        make_builder(path, tiny_qwen3)()


def test_bad_rows_can_be_skipped_and_are_counted(
    tmp_path: Path, tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [
        json.dumps({"messages": CHAT}),
        "{",
        json.dumps({"messages": NO_REPLY}),
        json.dumps({"messages": CHAT}),
    ]
    path.write_text("\n".join(lines))
    train, _ = make_builder(path, tiny_qwen3, on_bad_row="skip")()
    assert len(train.get_batch(0)) == 2
    assert "Left out 1 lines" in caplog.text
    assert "Left out 1 of 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*CHAT, {"role": "critic", "content": "no"}], "cannot render role `critic`"),
        (["hi", "there"], "message 1 is a str, not an object"),
        ([{"role": "user", "content": 7}, CHAT[1]], "message 1"),
        ([CHAT[0], {"role": "assistant", "content": "\ud800"}], "Message 2 has half a character"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named_before_training(
    tmp_path: Path, tiny_qwen3: str, messages: list[Any], message: str
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(DataError, match=f"line 2 of chats.jsonl: .*{message}"):
        make_builder(path, tiny_qwen3)()
    skipping, _ = make_builder(path, tiny_qwen3, on_bad_row="skip")()
    assert len(skipping.get_batch(0)) == 1


def test_a_row_that_fails_only_when_it_is_mapped_is_named_or_skipped(numbered: datasets.Dataset) -> None:
    def fail_on_three(row: dict[str, Any]) -> Datum:
        if row["id"] == 3:
            raise DataError("three is bad")
        return row_datum(row)

    with pytest.raises(DataError, match="row 3: three is bad"):
        SupervisedDatasetFromHFDataset(numbered, 4, map_fn=fail_on_three).get_batch(0)
    dataset = SupervisedDatasetFromHFDataset(numbered, 4, map_fn=fail_on_three, on_bad_row="skip")
    assert ids_of(dataset.get_batch(0)) == [0, 1, 2]
    assert dataset.summary()["bad_rows"] == 1


def test_a_row_of_a_json_list_that_is_no_object_is_named(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": CHAT}, 3]))
    with pytest.raises(DataError, match="row 1 of .*chats.json is a JSON int"):
        make_builder(path, tiny_qwen3)()
    train, _ = make_builder(path, tiny_qwen3, on_bad_row="skip")()
    assert len(train.get_batch(0)) == 1


def test_a_folder_is_no_dataset_file(tmp_path: Path, tiny_qwen3: str) -> None:
    with pytest.raises(DataError, match="is a folder"):
        make_builder(tmp_path, tiny_qwen3)()


def test_a_missing_or_unknown_dataset_says_what_there_is(tmp_path: Path, tiny_qwen3: str) -> None:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3)
    for name, message in {
        "no_robot": "no known name, file or hub id",
        str(tmp_path / "none.jsonl"): "does not exist",
        "owner/name": "offline mode is on.*On a machine with network access run `hf download",
    }.items():
        with pytest.raises(DataError, match=f"(?s){message}"):
            NamedChatDatasetBuilder(common_config=common, dataset=name)()


def test_impossible_settings_are_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)
    for options in ({"max_length": 1}, {"test_size": -1}, {"test_size": 3}):
        with pytest.raises((ConfigError, DataError)):
            make_builder(path, tiny_qwen3, **options)()
    with pytest.raises(ConfigError, match="batch_size=0"):
        ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3, batch_size=0)
    with pytest.raises(CookbookError, match="map_fn or flatmap_fn"):
        SupervisedDatasetFromHFDataset(datasets.Dataset.from_list([{"id": 1}]), 1)
