"""The report on conversations of thousands of messages."""

from __future__ import annotations

from typing import Any

from cookbook.data.conversation import Conversation
from cookbook.data.rendering import RowRenderer
from cookbook.data.report import note_lines
from cookbook.data.sources import Row
from cookbook.utils import notes
from renderers import TrainOnWhat, get_renderer


def chat(num_messages: int) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"word {i}"} for i in range(num_messages)]


def lines_and_examples(tokenizer: Any, renderer_name: str, num_messages: int) -> tuple[str, list[Any]]:
    renderer = get_renderer(renderer_name, tokenizer)
    rows = RowRenderer(
        renderer,
        TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        lambda row: [Conversation(row["messages"])],
        None,
    )
    with notes.collected() as found:
        examples = rows(Row({"messages": chat(num_messages)}, "row 1"))
    assert examples is not None
    return " ".join(" ".join(note_lines(found)).split()), examples


def test_the_report_states_the_cost_of_a_conversation_of_thousands_of_messages(tiny_tokenizer: Any) -> None:
    line, examples = lines_and_examples(tiny_tokenizer, "role_colon", 2000)
    num_tokens = sum(len(example.tokens_T) for example in examples)
    assert line.startswith("Conversations of 1,000 messages or 100 examples and more")
    assert "(what examples share is stored once, and computed once where the model allows)" in line
    assert f"in all examples ({num_tokens:,} tokens), without those that examples share" in line
    assert "read (2,000 messages)" in line
    assert f"trained ({len(examples):,} example" in line
    assert "found (1 conversation)" in line


def test_the_report_states_the_cost_of_a_conversation_with_many_examples(tiny_tokenizer: Any) -> None:
    """Qwen3 drops the thinking of earlier turns, so that each reply is an example."""
    line, examples = lines_and_examples(tiny_tokenizer, "qwen3", 200)
    assert len(examples) == 100
    assert "read (200 messages)" in line
    assert "trained (100 examples)" in line
    num_tokens = sum(example.num_tokens for example in examples)
    num_alone = sum(len(example.own_T) for example in examples)
    assert f"in all examples ({num_tokens:,} tokens)" in line
    assert f"without those that examples share ({num_alone:,} tokens)" in line
    assert num_alone < num_tokens / 20


def test_the_report_states_no_cost_for_short_conversations(tiny_tokenizer: Any) -> None:
    line, _ = lines_and_examples(tiny_tokenizer, "role_colon", 100)
    assert line == ""
