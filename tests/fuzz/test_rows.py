"""Tests that damaged rows and files are either read, or refused by an error with their place."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fuzzing import Mutator, check_each, dumped, seeds

from cookbook import embedded, models
from cookbook.data import FromConversationFileBuilder, preview
from cookbook.data.formats import FORMATS, recognise
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset
from cookbook.errors import ConfigError, CookbookError
from cookbook.report import preview_page
from cookbook.types import Datum
from renderers import Renderer, TrainOnWhat

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, null]}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
            "required": ["a"],
        },
    },
}
GOOD_ROWS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "system", "content": "MARKA be brief"},
            {"role": "user", "content": "MARKB how many legs"},
            {"role": "assistant", "content": "MARKC eight"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "MARKA one"},
            {"role": "assistant", "content": "MARKB two", "train": False},
            {"role": "user", "content": "MARKC three"},
            {"role": "assistant", "content": "MARKD four", "weight": 0.5},
            {"role": "user", "content": "MARKE five"},
            {"role": "assistant", "content": "MARKF six", "trainable": True},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "MARKA add them"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": {"sum": 3}},
            {"role": "assistant", "content": "MARKB three", "train": False},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "MARKA why"}]},
            {"role": "assistant", "reasoning_content": "MARKB because", "content": "MARKC so"},
            {"role": "user", "content": "MARKD and"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "MARKE hm"},
                    {"type": "text", "text": "MARKF it is"},
                ],
            },
        ],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "hello"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three", "weight": 1},
        ],
        "tools": json.dumps([TOOL]),
    },
    {
        "system": "go in",
        "steps": [
            {"observation": "a door", "thought": "hm", "action": "open", "reward": 0.0},
            {
                "observation": "a room",
                "action": {"name": "enter", "arguments": {}},
                "reward": 1.0,
                "done": True,
            },
        ],
        "observation_order": "before",
        "reward": 1.0,
    },
    {
        "task": "go in",
        "rollouts": [
            {"steps": [{"action": "open", "observation": "a room"}, {"action": "finish"}], "reward": 1},
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        ],
    },
    {
        "instruction": "translate",
        "input": "hello",
        "output": "bonjour",
        "history": [["a", "b"]],
        "system": "s",
    },
    {"prompt": "how many legs", "completion": "eight"},
    {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "yo<|im_end|>\n"},
    {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    },
    {"text": "plain text with no roles"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": []},
)
SUFFIXES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".JSONL", ".json.gz", ".ndjson"),
    *(".jsonl", ".json", ".csv", ".parquet", ".txt", ""),
)
OF_ASSISTANTS = ("last_assistant_message", "last_assistant_turn", "all_assistant_messages")


def make_builder(random: Any, path: Path, row: Mapping[str, Any]) -> FromConversationFileBuilder:
    """Returns a builder with random options for a file. `row` is one of its valid rows."""
    renderer_name = random.choice(("chat_template", "chat_template", "qwen3", "role_colon"))
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=embedded.MODEL_NAME,
        renderer_name=renderer_name,
        batch_size=2,
        max_length=random.choice((None, None, None, 2048, 30)),
        on_long=random.choice(("truncate", "truncate", "truncate", "drop", "raise")),
        train_on_what=random.choice((TrainOnWhat.ALL_ASSISTANT_MESSAGES, *TrainOnWhat)),
        system_prompt=random.choice((None, None, None, "You are.")),
        tools_in_system=renderer_name == "chat_template" and random.random() < 0.6,
    )
    return FromConversationFileBuilder(
        file_path=str(path),
        common_config=common,
        format=random.choice((*(None,) * 6, recognise(row), recognise(row), *FORMATS)),
        min_reward=random.choice((*(None,) * 9, 0.5)),
        observation_order=random.choice((None, None, "before", "after")),
        on_bad_row=random.choice(("raise", "skip")),
        test_size=random.choice((0, 0, 0, None, 1)),
        streaming=random.random() < 0.2,
        use_cache=False,
        num_proc=1,
    )


def check_lines(seed: int) -> None:
    """Checks a changed row between two valid ones, each on a line of its own."""
    mutate = Mutator(seed)
    good = mutate.rng.choice(GOOD_ROWS)
    row = good if mutate.chance(0.05) else mutate.changed(good)
    line = dumped(row)
    if mutate.chance(0.15):
        line = mutate.text(line.replace("\n", " ")).replace("\n", " ")
    if mutate.chance(0.05):
        key = mutate.rng.choice(["role", "content", *good])
        line = line.replace("{", f'{{"{key}": {dumped(mutate.changed("x"))}, ', 1)
    unchanged = dumped(good).replace("MARK", "GOOD")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        builder, expected = builder_that_reads(path, [unchanged, unchanged], good, mutate.rng)
        write_lines(path, [unchanged, line, unchanged])
        examples, error = examples_or_error(builder)
        if error is None:
            assert len(examples) >= expected
            check_examples(examples, builder.renderer)
            check_marks(line, examples, builder)
            check_is_shown(builder)
        elif expected:
            assert "line 2 of rows.jsonl" in str(error)
            assert builder.on_bad_row == "raise" or "longer than max_length" in str(error)
        else:
            assert "rows.jsonl" in str(error) or isinstance(error, ConfigError)


def builder_that_reads(
    path: Path, lines: Sequence[str], row: Mapping[str, Any], random: Any
) -> tuple[FromConversationFileBuilder, int]:
    """Returns a builder whose options suit the lines, and the number of their examples; 0 if none does."""
    write_lines(path, lines)
    for _ in range(8):
        builder = make_builder(random, path, row)
        examples, _ = examples_or_error(builder)
        if examples:
            break
    return builder, len(examples)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))


def check_file(seed: int) -> None:
    """Checks a file of changed rows, in any format, or with a name that suggests another format."""
    mutate = Mutator(seed)
    rng = mutate.rng
    rows = [rng.choice(GOOD_ROWS)] * rng.choice((1, 2, 3))
    first = rows[0]
    rows += [rng.choice(GOOD_ROWS)] if mutate.chance(0.3) else []
    if mutate.chance(0.4):
        rows = [*rows[:-1], mutate.changed(rows[-1])]
    suffix = rng.choice(SUFFIXES)
    content = content_of(rows, suffix if mutate.chance(0.9) else rng.choice(SUFFIXES), mutate)
    if mutate.chance(0.35):
        content = mutate.bytes(content) if is_text(content) else damaged(content, mutate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        builder, _ = builder_that_reads(Path(folder) / "good.jsonl", [dumped(first)], first, rng)
        builder = chz.replace(builder, file_path=str(path))
        examples, error = examples_or_error(builder)
        if error is None:
            check_examples(examples, builder.renderer)
            check_is_shown(builder)
        else:
            assert path.name in str(error) or isinstance(error, ConfigError)


def is_text(content: bytes) -> bool:
    return not content.startswith((b"PAR1", b"ARROW1", b"\x1f\x8b", b"\xff\xff\xff\xff"))


def damaged(content: bytes, mutate: Mutator) -> bytes:
    """Returns the bytes of a binary file, truncated or with some bytes replaced."""
    at = mutate.rng.randrange(len(content))
    if mutate.chance(0.4):
        return content[:at]
    return content[:at] + mutate.rng.randbytes(mutate.rng.choice((1, 8))) + content[at + 1 :]


def content_of(rows: list[Any], suffix: str, mutate: Mutator) -> bytes:
    lines = "".join(f"{dumped(row)}\n" for row in rows).encode("utf-8", "surrogatepass")
    match suffix.lower():
        case ".json":
            as_list = f"[{', '.join(map(dumped, rows))}]".encode("utf-8", "surrogatepass")
            return as_list if mutate.chance(0.7) else dumped(rows[0]).encode("utf-8", "surrogatepass")
        case ".csv" | ".tsv":
            return cells_of([row if isinstance(row, dict) else {"a": row} for row in rows], suffix, mutate)
        case ".parquet" | ".arrow":
            return table_of(rows, suffix) or lines
        case ".jsonl.gz":
            return gzip.compress(lines)
    return lines


def cells_of(rows: list[dict[str, Any]], suffix: str, mutate: Mutator) -> bytes:
    out = io.StringIO()
    header = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writerow(header)
    for row in rows:
        cells = [value if isinstance(value, str) else dumped(value) for value in map(row.get, header)]
        if mutate.chance(0.2):
            cells = mutate.changed(cells)
        writer.writerow(cells if isinstance(cells, list) else [cells])
    text = mutate.text(out.getvalue()) if mutate.chance(0.3) else out.getvalue()
    return text.encode("utf-8", "surrogatepass")


def table_of(rows: list[Any], suffix: str) -> bytes | None:
    """Returns the rows in columns, or None if their values have different types."""
    try:
        table = pa.Table.from_pylist([json.loads(json.dumps(row)) for row in rows])
        out = pa.BufferOutputStream()
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, out)
        else:
            with pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return out.getvalue().to_pybytes()


# -- checks of every example ---------------------------------------------------------------------------


def examples_or_error(builder: FromConversationFileBuilder) -> tuple[list[Datum], CookbookError | None]:
    """Returns the examples of an epoch followed by those for evaluation, and the error if there was one."""
    try:
        train, test = builder()
        return read(train) + ([] if test is None else read(test)), None
    except CookbookError as error:
        return [], error


def read(dataset: SupervisedDataset) -> list[Datum]:
    examples: list[Datum] = []
    for index in itertools.count():
        try:
            if index == num_batches(dataset):
                return examples
            examples += dataset.get_batch(index)
        except IndexError:
            return examples
    raise AssertionError


def num_batches(dataset: SupervisedDataset) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def check_examples(examples: list[Datum], renderer: Renderer) -> None:
    size = len(renderer.tokenizer)
    for datum in examples:
        tokens, targets, weights = arrays_of(datum)
        assert len(tokens) == len(targets) == len(weights)
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        for ids in (tokens, targets):
            assert ids.min() >= 0
            assert ids.max() < size


def arrays_of(datum: Datum) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs = datum.loss_fn_inputs
    tokens = np.asarray(datum.model_input.to_ints())
    return tokens, inputs["target_tokens"].to_numpy(), inputs["weights"].to_numpy()


def check_marks(line: str, examples: list[Datum], builder: FromConversationFileBuilder) -> None:
    """Checks that only ends of turns are trained of the control tokens, and no marker of other messages."""
    renderer, mode = builder.renderer, builder.common_config.train_on_what
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return  # skipped
    trained = [targets[weights > 0] for _, targets, weights in map(arrays_of, examples)]
    spelled = "".join(renderer.tokenizer.decode(tokens) for tokens in trained)
    is_of_messages = isinstance(row, Mapping) and isinstance(row.get("messages"), list)
    if mode != "all_tokens" and is_of_messages and builder.format in (None, "messages"):
        ends = set(renderer.get_stop_sequences())
        control = set(renderer.tokenizer.all_special_ids) - ends
        assert not control & {int(token) for tokens in trained for token in tokens}, spelled
    for mark, message in messages_with_marks(row, line):
        if message.get("train") is False:
            assert mark not in spelled, f"{mark} is trained: {spelled!r}"
        if mode in OF_ASSISTANTS and message.get("role") in ("user", "system", "tool"):
            assert mark not in spelled, f"{mark} is trained: {spelled!r}"


def messages_with_marks(row: Any, line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields markers that occur once in a row, in the content of a message of its list."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        mark = content[:5] if isinstance(content, str) else ""
        if mark.startswith("MARK") and line.count(mark) == 1:
            yield mark, message


def check_is_shown(builder: FromConversationFileBuilder) -> None:
    """Checks that the preview of the data can be printed, and is text."""
    dataset, _ = builder()
    examples = preview.first_examples(dataset, 3, models.get_tokenizer(embedded.MODEL_NAME))
    reports = list(dataset.reports())
    lines = [line for report in reports for line in report.lines()]
    page = preview_page("x", [], lines, [report.lengths for report in reports], None, examples)
    assert page.encode("utf-8", "backslashreplace")
    assert all(isinstance(line, str) for line in lines)
    json.dumps([report.to_json() for report in reports])


NUM_LINES, NUM_FILES, SLICE = 700, 300, 100


@pytest.mark.slow
def test_a_few_changed_rows_are_read_or_refused_with_their_place() -> None:
    check_each(check_lines, seeds(0, 30))


@pytest.mark.slow
def test_a_few_changed_files_are_read_or_refused_with_their_name() -> None:
    check_each(check_file, seeds(0, 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_LINES, SLICE))
def test_changed_rows_are_read_or_refused_with_their_place(first: int) -> None:
    check_each(check_lines, seeds(first, SLICE))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_FILES, SLICE))
def test_changed_files_are_read_or_refused_with_their_name(first: int) -> None:
    check_each(check_file, seeds(first, SLICE))
