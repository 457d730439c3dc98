"""The builders of conversations: from rows to Datums."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from outside_world import replace_hub_datasets

from cookbook import models
from cookbook.data import (
    Conversation,
    FromConversationFileBuilder,
    NamedChatDatasetBuilder,
    SupervisedDatasetFromHFDataset,
    conversation_to_datum,
)
from cookbook.data.sources import Row, Source
from cookbook.data.sources.base import Chunk
from cookbook.data.sources.text_files import JsonLinesSource
from cookbook.data.types import (
    ChatDatasetBuilder,
    ChatDatasetBuilderCommonConfig,
    SupervisedDataset,
    SupervisedDatasetBuilder,
)
from cookbook.errors import ConfigError, DataError
from cookbook.types import Datum, ModelInput
from cookbook.utils import files, notes
from cookbook.utils.notes import Note
from renderers import TrainOnWhat, get_renderer

CHAT = [{"role": "user", "content": "How many legs?"}, {"role": "assistant", "content": "eight"}]


COMMON = ("batch_size", "max_length", "on_long", "renderer_name", "system_prompt", "train_on_what")


def row_datum(row: dict[str, Any]) -> Datum:
    return Datum(ModelInput.from_ints([row["id"], 0]), {"target_tokens": [1, 1], "weights": [1.0, 1.0]})


def ids_of(batch: list[Datum]) -> list[int]:
    return [datum.model_input.to_ints()[0] for datum in batch]


def all_tokens(dataset: SupervisedDataset) -> list[tuple[int, ...]]:
    """Returns the inputs of every Datum of an epoch."""
    found: list[tuple[int, ...]] = []
    for index in itertools.count():
        try:
            batch = dataset.get_batch(index)
        except IndexError:
            return found
        found += [tuple(datum.model_input.to_ints()) for datum in batch]
    raise AssertionError


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_builder(
    path: Path | str,
    model: str,
    kind: type[FromConversationFileBuilder] = FromConversationFileBuilder,
    **options: Any,
) -> FromConversationFileBuilder:
    common = {"batch_size": 2, **{key: options.pop(key) for key in COMMON if key in options}}
    return kind(
        file_path=str(path),
        common_config=ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=model, **common),
        **{"test_size": 0, **options},
    )


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


def test_the_error_for_a_test_size_that_leaves_nothing_names_the_data(
    tmp_path: Path, tiny_qwen3: str
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 2)
    with pytest.raises(DataError, match="test_size=2 leaves nothing .* there are 2 rows in chats.jsonl"):
        make_builder(path, tiny_qwen3, test_size=2)()


def test_by_default_one_row_in_twenty_is_held_out(tmp_path: Path, tiny_qwen3: str) -> None:
    rows = [{"messages": [{**CHAT[0], "content": f"Question {number}?"}, *CHAT[1:]]} for number in range(40)]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    train, test = make_builder(path, tiny_qwen3, test_size=None)()
    assert test is not None
    assert (train.summary()["rows"], test.summary()["rows"]) == (38, 2)


def test_json_and_parquet_files_give_the_same_rows_as_jsonl(
    tmp_path: Path, tiny_qwen3: str, chats: list
) -> None:
    rows = [{"messages": messages} for messages in chats]
    paths = [write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "chats.json", tmp_path / "chats.parquet"]
    paths[1].write_text(json.dumps(rows), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(paths[2])
    batches = [ids_of(make_builder(path, tiny_qwen3)()[0].get_batch(3)) for path in paths]
    assert batches[0] == batches[1] == batches[2]


def test_an_example_without_a_trained_token_is_skipped_and_counted(tmp_path: Path, tiny_qwen3: str) -> None:
    long_prompt = [{"role": "user", "content": "legs " * 50}, {"role": "assistant", "content": "eight"}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": long_prompt}])
    train, _ = make_builder(path, tiny_qwen3, max_length=40)()
    assert len(train.get_batch(0)) == 1
    assert train.reports()[0].untrained == 1


# -- rendered once, kept on disk ------------------------------------------------------------------


def builder_noting_rows(rendered: list[str], path: Path, model: str, **options: Any) -> Any:
    """Returns a builder that notes the place of every row that is read for rendering."""

    class CountedRows(JsonLinesSource):
        def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
            for chunk in super().chunks(start, size):
                rendered.extend(row.place for row in chunk.rows())
                yield chunk

    class NotingBuilder(FromConversationFileBuilder):
        def sources(self) -> list[Source]:
            return [CountedRows(path)]

    return make_builder(path, model, NotingBuilder, **options)


def test_a_second_run_reads_the_rendered_data_of_the_first(
    tmp_path: Path, tiny_qwen3: str, chats: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    rendered: list[str] = []
    make = functools.partial(builder_noting_rows, rendered, path, tiny_qwen3)
    first = all_tokens(make()()[0])
    assert len(rendered) == len(chats)
    # Length, batches and splits do not affect rendering.
    make(max_length=20, test_size=3, shuffle_seed=5)()
    assert all_tokens(make()()[0]) == first
    assert len(rendered) == len(chats)
    make(use_cache=False)()
    assert len(rendered) == 2 * len(chats)


@pytest.mark.parametrize(
    "options",
    [
        {"system_prompt": "Be brief."},
        {"train_on_what": TrainOnWhat.LAST_ASSISTANT_MESSAGE},
        {"renderer_name": "role_colon"},
        {"format": "messages"},
        {"min_reward": 0.5, "reward_key": "metadata.reward"},
        {"mask_key": "metadata.mask"},
    ],
)
def test_any_option_that_changes_the_examples_causes_rendering(
    tmp_path: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "cache"))
    row = {"messages": CHAT, "metadata": {"reward": 1, "mask": [1] * len(CHAT)}}
    path = write_rows(tmp_path / "chats.jsonl", [row] * 3)
    rendered: list[str] = []
    make = functools.partial(builder_noting_rows, rendered, path, tiny_qwen3)
    make()()
    make(**options)()
    assert len(rendered) == 6
    write_rows(path, [row] * 4)
    make()()
    assert len(rendered) == 10


def test_bad_rows_in_cached_data_are_an_error(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": NO_REPLY}])
    make_builder(path, tiny_qwen3, on_bad_row="skip")()
    with pytest.raises(DataError, match="line 2 of chats.jsonl: no assistant message"):
        make_builder(path, tiny_qwen3)()


def test_data_are_rendered_without_a_cache_if_it_cannot_be_written(
    tmp_path: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "file"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)
    train, _ = make_builder(path, tiny_qwen3)()
    assert train.summary()["rows"] == 3
    assert "cannot be kept" in caplog.text


@pytest.mark.slow
def test_any_number_of_processes_renders_the_same_examples(
    tmp_path: Path, tiny_qwen3: str, chats: list
) -> None:
    rows = [{"messages": messages} for messages in chats] * 30
    path = write_rows(tmp_path / "chats.jsonl", [*rows, {"messages": NO_REPLY}])
    made = [
        make_builder(path, tiny_qwen3, num_proc=number, use_cache=False, on_bad_row="skip")()[0]
        for number in (1, 2)
    ]
    assert made[0].fingerprint() == made[1].fingerprint()
    assert made[0].reports()[0].to_json() == made[1].reports()[0].to_json()


def test_a_damaged_cache_is_rendered_again(
    tmp_path: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)
    rendered: list[str] = []
    make = functools.partial(builder_noting_rows, rendered, path, tiny_qwen3)
    whole = all_tokens(make()()[0])
    (store,) = (tmp_path / "cache" / "rendered").iterdir()

    def count_a_bad_row() -> None:
        meta = json.loads((store / "meta.json").read_text(encoding="utf-8"))
        (store / "meta.json").write_text(json.dumps({**meta, "num_bad_rows": 1}), encoding="utf-8")

    damages: list[Callable[[], Any]] = [
        (store / "meta.json").unlink,
        lambda: (store / "meta.json").write_text("{", encoding="utf-8"),
        count_a_bad_row,
        lambda: (store / "tokens.bin").write_bytes((store / "tokens.bin").read_bytes()[:-4]),
        (store / "runs.npy").unlink,
    ]
    for number, damage in enumerate(damages, 1):
        damage()
        assert all_tokens(make()()[0]) == whole
        assert len(rendered) == 3 + 3 * number


def test_rows_read_by_a_users_code_are_not_cached(tmp_path: Path, tiny_qwen3: str) -> None:
    """A user's code may depend on files and values that the cache cannot know."""

    rendered: list[str] = []

    class Mine(FromConversationFileBuilder):
        def conversations_of(self, row: Row) -> list[Conversation]:
            rendered.append(row.place)
            return [Conversation(row["chat"])]

    path = write_rows(tmp_path / "chats.jsonl", [{"chat": CHAT}, {"other": CHAT}])
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3)
    make = functools.partial(Mine, file_path=str(path), common_config=common, test_size=0)
    for _ in range(2):
        (report,) = make(on_bad_row="skip")()[0].reports()
        assert [note.reason for note in report.bad_rows] == ["conversations_of raised KeyError: 'chat'"]
    assert len(rendered) == 4
    with pytest.raises(DataError, match="line 2 of chats.jsonl: conversations_of raised KeyError"):
        make()()


def test_the_same_rows_under_another_name_have_their_own_places(tmp_path: Path, tiny_qwen3: str) -> None:
    for name in ("first.jsonl", "second.jsonl"):
        path = write_rows(tmp_path / name, [{"messages": CHAT}, {"messages": NO_REPLY}])
        with pytest.raises(DataError, match=f"line 2 of {name}"):
            make_builder(path, tiny_qwen3)()


# -- the report -------------------------------------------------------------------------------


def test_the_report_counts_what_a_loop_over_the_rows_counts(
    tmp_path: Path, tiny_qwen3: str, chats: list
) -> None:
    bad = [{"messages": NO_REPLY}, {"nothing": 1}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats] + bad)
    renderer = get_renderer("chat_template", models.get_tokenizer(tiny_qwen3))
    datums = [conversation_to_datum(messages, renderer, 40) for messages in chats]
    trained = [int(np.count_nonzero(d.loss_fn_inputs["weights"].to_numpy())) for d in datums]
    lengths = [len(renderer.build_supervised_example(messages)[1]) for messages in chats]
    kept = [index for index, count in enumerate(trained) if count]
    (report,) = make_builder(path, tiny_qwen3, max_length=40, on_bad_row="skip")()[0].reports()
    assert (report.rows, report.bad, report.filtered) == (len(chats) + 2, 2, 0)
    assert report.examples == len(kept)
    assert report.tokens == sum(min(lengths[index], 40) for index in kept)
    assert report.trained_tokens == sum(trained)
    assert report.longest == max(lengths)
    assert report.truncated == sum(lengths[index] > 40 for index in kept) > 0
    assert report.untrained == len(chats) - len(kept)
    assert [note.place for note in report.bad_rows] == [
        f"line {len(chats) + 1} of chats.jsonl",
        f"line {len(chats) + 2} of chats.jsonl",
    ]
    text = "\n".join(report.lines())
    assert "2 bad rows skipped" in text
    assert "no assistant message" in text


LONG = [{"role": "user", "content": "legs"}, {"role": "assistant", "content": "eight " * 30}]


def test_long_examples_are_truncated_skipped_or_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": LONG}])

    def make(on_long: str) -> SupervisedDataset:
        return make_builder(path, tiny_qwen3, max_length=30, on_long=on_long)()[0]

    cut, dropped = make("truncate"), make("drop")
    assert sorted(len(tokens) for tokens in all_tokens(cut))[-1] == 29
    assert (cut.reports()[0].truncated, cut.reports()[0].too_long) == (1, 0)
    assert (dropped.reports()[0].truncated, dropped.reports()[0].too_long) == (0, 1)
    assert len(all_tokens(dropped)) == 1
    with pytest.raises(DataError, match=r"line 2 of chats.jsonl: an example of \d+ tokens is longer"):
        make("raise")


def test_data_without_any_trainable_example_are_refused_with_the_reasons(
    tmp_path: Path, tiny_qwen3: str
) -> None:
    long_prompt = [{"role": "user", "content": "legs " * 50}, {"role": "assistant", "content": "eight"}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": long_prompt}] * 3)
    with pytest.raises(DataError, match="(?s)Nothing is left to train on.*3 examples skipped: no trained"):
        make_builder(path, tiny_qwen3, max_length=40)()


def test_weights_of_messages_are_the_weights_of_their_tokens(tmp_path: Path, tiny_qwen3: str) -> None:
    chat = [*CHAT, CHAT[0], {**CHAT[1], "weight": 0.5}, CHAT[0], {**CHAT[1], "weight": 0}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}])
    (datum,) = make_builder(path, tiny_qwen3)()[0].get_batch(0)
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    num_tokens = int(np.count_nonzero(weights == 1))
    assert num_tokens > 1
    assert np.count_nonzero(weights == 0.5) == num_tokens
    assert set(weights.tolist()) == {0, 0.5, 1}


# -- several sources --------------------------------------------------------------------------


def test_demonstrations_and_trajectories_can_be_mixed(tmp_path: Path, tiny_qwen3: str) -> None:
    demonstrations = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT, "reward": 1}] * 6)
    steps = [{"observation": "a door", "action": "open it"}, {"observation": "a hall", "action": "go"}]
    rollouts = [
        {"task": f"Task {reward}.", "steps": steps, "reward": reward, "observation_order": "before"}
        for reward in (0.0, 0.9, 1.0, 0.2)
    ]
    trajectories = write_rows(tmp_path / "rollouts.jsonl", rollouts)
    builder = make_builder(f"{demonstrations},{trajectories}", tiny_qwen3, min_reward=0.5, batch_size=4)
    train, _ = builder()
    assert train.summary() == {"rows": 8, "batches": 2}
    assert [(r.name, r.rows, r.filtered) for r in train.reports()] == [
        ("chats.jsonl", 6, 0),
        ("rollouts.jsonl", 4, 2),
    ]
    tokenizer = models.get_tokenizer(tiny_qwen3)
    texts = [tokenizer.decode(tokens) for tokens in all_tokens(train)]
    assert sum("a door" in text and "a hall" in text for text in texts) == 2
    mixed, _ = make_builder(
        f"{demonstrations},{trajectories}", tiny_qwen3, weights=[1.0, 2.0], min_reward=0
    )()
    assert mixed.summary()["rows"] == 6
    with pytest.raises(ConfigError, match="1 weights for 2 datasets"):
        make_builder(f"{demonstrations},{trajectories}", tiny_qwen3, weights=[1.0])()


def test_weights_that_take_no_rows_of_a_source_are_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    paths = [write_rows(tmp_path / name, [{"messages": CHAT}] * 20) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match="20 rows of a.jsonl, 0 rows of b.jsonl"):
        make_builder(",".join(map(str, paths)), tiny_qwen3, weights=[1000.0, 1.0])()


def test_an_empty_list_of_names_and_missing_files_are_refused(tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match="names no data"):
        make_builder(",", tiny_qwen3)()
    long_names = ",".join(f"part-{number:05}.jsonl" for number in range(30))
    with pytest.raises(DataError, match="part-00000.jsonl does not exist"):
        make_builder(long_names, tiny_qwen3)()


def test_evaluation_data_may_come_from_another_source(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 40)
    other = write_rows(tmp_path / "other.jsonl", [{"messages": LONG}] * 7)
    train, test = make_builder(path, tiny_qwen3, eval_dataset=str(other), test_size=None)()
    assert test is not None
    assert (train.summary()["rows"], test.summary()["rows"]) == (40, 7)
    assert not set(all_tokens(train)) & set(all_tokens(test))
    _, some = make_builder(path, tiny_qwen3, eval_dataset=str(other), test_size=3)()
    assert some is not None
    assert some.summary()["rows"] == 3
    assert make_builder(path, tiny_qwen3, eval_dataset=str(other), test_size=0)()[1] is None


def test_a_subclass_can_read_rows_in_its_own_format(tmp_path: Path, tiny_qwen3: str) -> None:
    class Sums(FromConversationFileBuilder):
        def conversations_of(self, row: Row) -> list[Conversation]:
            question = {"role": "user", "content": f"{row['a']} + {row['b']}?"}
            answer = {"role": "assistant", "content": str(row["a"] + row["b"])}
            return [Conversation([question, answer])]  # type: ignore[list-item]

    path = write_rows(tmp_path / "sums.jsonl", [{"a": 1, "b": 2}])
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3)
    train, _ = Sums(file_path=str(path), common_config=common, test_size=0)()
    assert "1 + 2?" in models.get_tokenizer(tiny_qwen3).decode(all_tokens(train)[0])


# -- streaming --------------------------------------------------------------------------------


def test_a_streamed_file_gives_the_same_rows(tmp_path: Path, tiny_qwen3: str, chats: list) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    whole, _ = make_builder(path, tiny_qwen3)()
    stream, test = make_builder(path, tiny_qwen3, streaming=True, buffer_size=7)()
    assert test is None
    with pytest.raises(TypeError):
        len(stream)
    assert sorted(all_tokens(stream)) == sorted(all_tokens(whole))
    (report,) = stream.reports()
    assert (report.name, report.rows) == ("the beginning of chats.jsonl", len(chats))
    again, _ = make_builder(path, tiny_qwen3, streaming=True, buffer_size=7)()
    assert ids_of(again.get_batch(5)) == ids_of(stream.get_batch(5))


def test_the_first_rows_of_a_stream_are_held_out(tmp_path: Path, tiny_qwen3: str, chats: list) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    stream, test = make_builder(path, tiny_qwen3, streaming=True, test_size=5)()
    assert test is not None
    assert len(all_tokens(test)) == 5
    assert len(all_tokens(stream)) == len(chats) - 5
    assert not set(all_tokens(test)) & set(all_tokens(stream))


def test_a_stream_whose_rows_are_all_held_out_is_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    with pytest.raises(DataError, match="256 rows held out to evaluate on are all that chats.jsonl has"):
        make_builder(path, tiny_qwen3, streaming=True, test_size=None)()


@pytest.mark.slow
def test_an_index_error_in_a_users_code_does_not_end_a_stream(tmp_path: Path, tiny_qwen3: str) -> None:
    class Mine(FromConversationFileBuilder):
        def conversations_of(self, row: Row) -> list[Conversation]:
            return [Conversation(row["chats"][0])]

    rows = [{"chats": [CHAT]}] * 1001 + [{"chats": []}] + [{"chats": [CHAT]}] * 5
    path = write_rows(tmp_path / "chats.jsonl", rows)
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3, batch_size=1005)
    stream, _ = Mine(file_path=str(path), common_config=common, test_size=0, streaming=True, buffer_size=1)()
    with pytest.raises(DataError, match="line 1002 of chats.jsonl: conversations_of raised IndexError"):
        stream.get_batch(0)


@pytest.mark.slow
def test_a_stream_reports_bad_rows_when_it_reads_them(tmp_path: Path, tiny_qwen3: str) -> None:
    rows = [{"messages": CHAT}] * 1100 + [{"messages": NO_REPLY}, {"messages": LONG}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    options = {"streaming": True, "buffer_size": 1, "batch_size": 1102, "max_length": 30}
    with pytest.raises(DataError, match="line 1101 of chats.jsonl: no assistant message"):
        make_builder(path, tiny_qwen3, **options)()[0].get_batch(0)
    skipping, _ = make_builder(path, tiny_qwen3, on_bad_row="skip", on_long="drop", **options)()
    assert len(skipping.get_batch(0)) == 1100
    assert skipping.summary() == {"rows": 1102, "bad_rows": 1, "too_long_examples": 1}


# -- bad input --------------------------------------------------------------------------------

NO_REPLY = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        (json.dumps({"messages": CHAT}) + '\n{"messages": [\n', "line 2 of .* is not JSON: Expecting value"),
        (json.dumps({"messages": CHAT}) + "\n[1]\n", "line 2 of .* is a JSON list, not an object"),
        (
            json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"messages": NO_REPLY}) + "\n",
            r"line 3 of chats.jsonl: no assistant message \(roles: system, user\)",
        ),
        ('{"words": "hello", "id": 3}\n', r"line 1 of chats.jsonl: its format is unknown \(keys: words"),
    ],
)
def test_the_error_for_a_bad_file_names_the_place(
    tmp_path: Path, tiny_qwen3: str, content: str, message: str
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        make_builder(path, tiny_qwen3)()


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        make_builder(path, tiny_qwen3)()


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [
        json.dumps({"messages": CHAT}),
        "{",
        json.dumps({"messages": NO_REPLY}),
        json.dumps({"messages": CHAT}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    train, _ = make_builder(path, tiny_qwen3, on_bad_row="skip")()
    assert len(train.get_batch(0)) == 2
    (report,) = train.reports()
    assert (report.rows, report.bad, report.examples) == (4, 2, 2)
    assert [note.place for note in report.bad_rows] == ["line 2 of chats.jsonl", "line 3 of chats.jsonl"]


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


def test_an_item_of_a_json_list_that_is_not_an_object_is_named(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": CHAT}, 3]), encoding="utf-8")
    with pytest.raises(DataError, match="row 1 of chats.json: is a JSON int"):
        make_builder(path, tiny_qwen3)()
    train, _ = make_builder(path, tiny_qwen3, on_bad_row="skip")()
    assert len(train.get_batch(0)) == 1


def test_a_folder_without_data_files_is_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    with pytest.raises(DataError, match="is a folder"):
        make_builder(tmp_path, tiny_qwen3)()


def test_the_error_for_a_missing_or_unknown_dataset_lists_the_alternatives(
    tmp_path: Path, tiny_qwen3: str
) -> None:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3)
    for name, message in {
        "no_robot": "not a known name, file or hub id",
        str(tmp_path / "none.jsonl"): "does not exist",
        str(tmp_path / "*.jsonl"): "does not exist. Patterns are not read: give the folder",
        "owner/name": "offline mode is on.*On a machine with network access run `hf download",
    }.items():
        with pytest.raises(DataError, match=f"(?s){message}"):
            NamedChatDatasetBuilder(common_config=common, dataset=name)()


def test_invalid_settings_are_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)
    for options in ({"max_length": 1}, {"test_size": -1}, {"test_size": 3}):
        with pytest.raises((ConfigError, DataError)):
            make_builder(path, tiny_qwen3, **options)()
    with pytest.raises(ConfigError, match="batch_size=0"):
        ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3, batch_size=0)


# -- the hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_gives_the_same_data_as_a_file_of_its_rows(
    tmp_path: Path, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """The rows have different keys, so that Arrow adds null values."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": "legs?"}, {"role": "assistant", "content": "eight"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 0.5},
            ]
        },
        {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": "so", "tool_calls": [call]}]},
    ]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str, split: str, streaming: bool = False) -> Any:
        asked.append((path, name, split, streaming))
        loaded = datasets.Dataset.from_list(rows)
        return loaded.to_iterable_dataset() if streaming else loaded

    replace_hub_datasets(monkeypatch, load_dataset)
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=tiny_qwen3, batch_size=2, renderer_name="qwen3"
    )
    builder = NamedChatDatasetBuilder(
        dataset="owner/name:chats:validation", common_config=common, test_size=0, streaming=streaming
    )
    train, _ = builder()
    assert asked == [("owner/name", "chats", "validation", streaming)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    of_file, _ = make_builder(path, tiny_qwen3, renderer_name="qwen3")()

    def trained(dataset: SupervisedDataset) -> list[tuple[list[int], list[float]]]:
        batches = [dataset.get_batch(index) for index in range(2)]
        return sorted(
            (d.model_input.to_ints(), d.loss_fn_inputs["weights"].tolist())  # type: ignore[union-attr]
            for batch in batches
            for d in batch
        )

    assert trained(train) == trained(of_file)


# -- what is counted on the way ---------------------------------------------------------------


class CountingBuilder(FromConversationFileBuilder):
    def conversations_of(self, row: Row) -> list[Conversation]:
        if row.get("is_unwanted"):
            notes.count("row", "were unwanted")
            return []
        notes.count("row", "Colours", row["colour"])
        if row["colour"] == "bad":
            raise DataError("is bad.")
        return [Conversation(CHAT)]  # type: ignore[list-item]


def counting_builder(path: Path, model: str, **options: Any) -> CountingBuilder:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=model, batch_size=100)
    return CountingBuilder(file_path=str(path), common_config=common, **{"test_size": 0, **options})


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_report_has_the_counts_of_all_processes(tiny_qwen3: str, tmp_path: Path, num_proc: int) -> None:
    rows = [{"colour": "red"}] * 600 + [{"colour": "blue"}] * 3 + [{"colour": "bad"}, {"is_unwanted": True}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    train, _ = counting_builder(path, tiny_qwen3, num_proc=num_proc, on_bad_row="skip")()
    (report,) = train.reports()
    colours = {note: number for note, number in report.notes.items() if note.what == "Colours"}
    assert colours == {Note("row", "Colours", "red"): 600, Note("row", "Colours", "blue"): 3}
    assert "  Colours: red (600 rows), blue (3 rows)" in report.lines()
    assert report.to_json()["notes"][:2] == [
        {"noun": "row", "what": "Colours", "item": "red", "count": 600},
        {"noun": "row", "what": "Colours", "item": "blue", "count": 3},
    ]
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert train.notes() == {}


@pytest.mark.slow
def test_a_stream_counts_each_row_once(tiny_qwen3: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"colour": "red"}] * 1_000 + [{"colour": "blue"}] * 150)
    train, _ = counting_builder(path, tiny_qwen3, streaming=True, buffer_size=1)()
    (report,) = train.reports()
    colours = {note: number for note, number in report.notes.items() if note.what == "Colours"}
    assert colours == {Note("row", "Colours", "red"): 1_000}, "the first rows are looked at"
    train.get_batch(0)
    for _ in all_tokens(train):
        pass
    assert train.notes() == {Note("row", "Colours", "red"): 1_000, Note("row", "Colours", "blue"): 150}


def test_rows_read_by_a_users_function_are_counted_once() -> None:
    def to_datum(row: dict[str, Any]) -> Datum:
        notes.count("row", "were seen")
        return row_datum(row)

    dataset = SupervisedDatasetFromHFDataset(
        datasets.Dataset.from_list([{"id": 1}, {"id": 2}]), 2, map_fn=to_datum
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        dataset.get_batch(0)
    assert dataset.notes() == {Note("row", "were seen"): 2}


def test_files_of_killed_runs_are_removed_from_the_cache_and_those_of_live_runs_kept(
    tmp_path: Path, tiny_qwen3: str, chats: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are removed whether or not the data are already rendered, as are those of earlier versions."""
    monkeypatch.setenv("COOKBOOK_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    rendered = tmp_path / "cache" / "rendered"
    with files.temporary_folder(rendered / ("a" * 32)) as live:
        *parts, _, number = live.name.split("-")
        killed = live.with_name("-".join([*parts, "1", number]))  # the process id is used again
        for folder in (killed, rendered / f".{'b' * 32}.k1ll3d"):
            folder.mkdir()
            (folder / "lock").touch()
            (folder / "tokens.bin").write_bytes(b"half")
        for _ in range(2):
            make_builder(path, tiny_qwen3)()
            hidden = [found for found in rendered.iterdir() if found.name.startswith(".")]
            assert hidden == [live]
            killed.mkdir()
