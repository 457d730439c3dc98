"""Tasks run by the real inspect_ai package on local data."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outside_world import forget_inspect

pytest.importorskip("inspect_ai")

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ContentImage
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import Tool, tool

from cookbook import ServiceClient
from cookbook.errors import ConfigError, TrainingError
from cookbook.eval.integrations.inspect import InspectEvaluator, InspectEvaluatorBuilder
from cookbook.eval.integrations.inspect_model import to_call
from cookbook.types import SamplingParams
from cookbook.utils import extras
from renderers import get_renderer

MakeEvaluator = Callable[..., InspectEvaluator]

DEFAULTS = {"max_tokens": 20, "temperature": 0.0, "seed": 3, "max_connections": 16}


@pytest.fixture
def make_evaluator(tmp_path: Path, tiny_qwen3: str, tiny_tokenizer: Any) -> MakeEvaluator:
    def make(
        made: Any, renderer_name: str = "qwen2_5", context_length: int | None = None, **defaults: Any
    ) -> InspectEvaluator:
        renderer = get_renderer(renderer_name, tiny_tokenizer)
        return InspectEvaluator(
            [made],
            renderer,
            tiny_qwen3,
            tmp_path / "logs",
            {**DEFAULTS, **defaults},  # type: ignore[typeddict-item]
            context_length=context_length,
        )

    return make


def run(evaluator: InspectEvaluator, client: Any) -> dict[str, float]:
    return asyncio.run(evaluator(client))


@task
def capitals(**config: Any) -> Task:
    return Task(
        dataset=[Sample("capital of France", target="Paris"), Sample("capital of Japan", target="Tokyo")],
        solver=[system_message("Be brief."), generate(**config)],
        scorer=[match(), includes()],
    )


def test_metrics_are_reported_by_task_and_scorer(
    make_evaluator: MakeEvaluator, scripted: Any, tmp_path: Path
) -> None:
    client = scripted(lambda prompt, sample: "It is Paris, I think")
    found = run(make_evaluator(capitals()), client)
    assert found["inspect/capitals/match/accuracy"] == 0
    assert found["inspect/capitals/includes/accuracy"] == 0.5
    assert found["inspect/capitals/includes/stderr"] == pytest.approx(0.5)
    prompts = sorted(prompt for prompt, _, _ in client.asked)
    assert prompts[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ncapital of France<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (log,) = list_eval_logs(str(tmp_path / "logs"))
    assert read_eval_log(log).eval.model == f"cookbook/{make_evaluator(capitals())._model_name}"


@pytest.mark.slow
def test_the_builder_sets_only_sampling_settings_that_the_task_does_not(
    make_evaluator: MakeEvaluator, scripted: Any
) -> None:
    client = scripted(lambda prompt, sample: "Paris. No more")
    found = run(make_evaluator(capitals(temperature=0.7, stop_seqs=["."]), top_p=0.9), client)
    params = [params for _, _, params in client.asked]
    assert {(p.temperature, p.top_p, p.max_tokens, p.seed) for p in params} == {(0.7, 0.9, 20, 3)}
    assert [p.stop for p in params] == [["."], ["."]]
    assert all(2 in p.stop_token_ids for p in params), "the token that ends a turn"
    assert found["inspect/capitals/match/accuracy"] == 0.5, "a stop string is no part of the reply"


def test_generations_are_queued_together_and_share_batches(
    make_evaluator: MakeEvaluator, scripted: Any
) -> None:
    client = scripted(lambda prompt, sample: "Paris")
    waiting, answer, all_wait = 0, client.sample_async, asyncio.Event()

    async def counted(*args: Any) -> Any:
        nonlocal waiting
        waiting += 1
        if waiting == 12:
            all_wait.set()
        await asyncio.wait_for(all_wait.wait(), timeout=60)
        return await answer(*args)

    client.sample_async = counted
    many = Task(dataset=[Sample(f"one {n}", target="Paris") for n in range(12)], scorer=match())
    run(make_evaluator(many), client)
    assert waiting == 12


def test_another_epoch_samples_different_replies(make_evaluator: MakeEvaluator, scripted: Any) -> None:
    client = scripted(lambda prompt, sample: "Paris")
    repeated = Task(dataset=[Sample("one", target="Paris")], scorer=match(), epochs=3)
    run(make_evaluator(repeated), client)
    assert sorted(params.seed for _, _, params in client.asked) == [3, 4, 5]


@tool
def add() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: One of them.
            y: The other one.
        """
        return x + y

    return execute


def test_a_model_may_call_tools_over_several_turns(make_evaluator: MakeEvaluator, scripted: Any) -> None:
    def answer(prompt: str, sample: int) -> str:
        if "<tool_response>\n5\n</tool_response>" in prompt:
            return "It is 5"
        return '<tool_call>\n{"name": "add", "arguments": {"x": 2, "y": 3}}\n</tool_call>'

    client = scripted(answer)
    sums = Task(
        dataset=[Sample("two and three", target="5")],
        solver=[use_tools(add()), generate()],
        scorer=includes(),
    )
    found = run(make_evaluator(sums, max_tokens=200), client)
    assert found == {"inspect/task/includes/accuracy": 1, "inspect/task/includes/stderr": 0}
    first, second = (prompt for prompt, _, _ in client.asked)
    assert '"name": "add", "description": "Add two numbers."' in first
    assert second.startswith(first)


@pytest.mark.parametrize(
    ("arguments", "read", "error"),
    [
        ({"x": 1}, {"x": 1}, None),
        ('{"x": 1}', {"x": 1}, None),
        ("{x", {}, "is not JSON"),
        ("[1]", {}, "not a JSON object"),
    ],
)
def test_the_model_is_told_about_arguments_that_are_not_a_json_object(
    arguments: Any, read: dict, error: str | None
) -> None:
    call = to_call({"id": "a", "function": {"name": "add", "arguments": arguments}})
    assert (call.id, call.function, call.arguments) == ("a", "add", read)
    assert call.parse_error is None if error is None else error in str(call.parse_error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            Task(dataset=[Sample("one", target="a")], solver=generate(logit_bias={1: 1}), scorer=match()),
            "logit_bias",
        ),
        (
            Task(
                dataset=[Sample([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA")])])]
            ),
            "content of type image",
        ),
    ],
)
def test_unsupported_settings_fail_the_evaluator_with_the_reason(
    make_evaluator: MakeEvaluator, scripted: Any, made: Task, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(make_evaluator(made), scripted(lambda prompt, sample: "Paris"))


def test_a_reply_without_room_is_empty_and_a_truncated_one_has_its_stop_reason(
    make_evaluator: MakeEvaluator, scripted: Any, tmp_path: Path
) -> None:
    asked = ["one " * 300, "one " * 115, "one"]
    long = Task(dataset=[Sample(text, target="a") for text in asked], scorer=includes())
    run(make_evaluator(long, context_length=256, max_tokens=50), scripted(lambda prompt, sample: "one " * 60))
    samples = read_eval_log(list_eval_logs(str(tmp_path / "logs"))[0]).samples or []
    assert [sample.output.stop_reason for sample in samples] == ["model_length", "model_length", "max_tokens"]


def test_thinking_becomes_reasoning_content_of_inspect(
    make_evaluator: MakeEvaluator, scripted: Any, tmp_path: Path
) -> None:
    history = [
        ChatMessageSystem(content="Be brief."), ChatMessageUser(content="one"),
        ChatMessageAssistant(content="two"), ChatMessageUser(content="three"),
    ]  # fmt: skip
    client = scripted(lambda prompt, sample: "<think>\nhmm\n</think>\n\nfour")
    thinking = Task(dataset=[Sample(history, target="four")], scorer=match())
    assert run(make_evaluator(thinking, "qwen3", max_tokens=99), client)["inspect/task/match/accuracy"] == 1
    samples = read_eval_log(list_eval_logs(str(tmp_path / "logs"))[0]).samples or []
    thought, said = samples[0].output.choices[0].message.content
    assert (thought.reasoning, said.text) == ("hmm", "four")  # type: ignore[union-attr]
    assert "two<|im_end|>\n<|im_start|>user\nthree" in client.asked[0][0]


@pytest.mark.slow
def test_nothing_is_printed_and_logging_is_restored(
    make_evaluator: MakeEvaluator,
    scripted: Any,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_inspect(monkeypatch)
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook)
    run(make_evaluator(capitals()), scripted(lambda prompt, sample: "Paris"))
    assert (root.handlers, root.level, sys.excepthook) == before
    assert capfd.readouterr() == ("", "")


def test_unknown_tasks_are_named(make_evaluator: MakeEvaluator, scripted: Any) -> None:
    with pytest.raises(Exception, match="No inspect tasks were found") as caught:
        run(make_evaluator("gsm8kk"), scripted(lambda prompt, sample: ""))
    assert caught.value.__notes__ == ["in Inspect tasks: gsm8kk"]


# -- the builder ------------------------------------------------------------------------------

TASK_FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import includes

@task
def facts(path="facts.jsonl"):
    return Task(dataset=json_dataset(path), scorer=includes())
"""


@pytest.mark.slow
def test_a_task_in_a_file_on_local_data_runs_with_the_model_itself(tmp_path: Path, tiny_qwen3: str) -> None:
    with_base = ServiceClient(device="cpu")
    client = with_base.create_sampling_client(base_model=tiny_qwen3)
    renderer = get_renderer("chat_template", client.get_tokenizer())
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "one two"}])
    greedy = client.sample(prompt, 1, SamplingParams(max_tokens=6, temperature=0)).sequences[0]
    said = str(renderer.parse_response(greedy.tokens)[0]["content"])
    data = tmp_path / "facts.jsonl"
    data.write_text(
        "".join(json.dumps({"input": "one two", "target": t}) + "\n" for t in (said, "~no~")),
        encoding="utf-8",
    )
    (tmp_path / "evals.py").write_text(TASK_FILE, encoding="utf-8")
    arguments = tmp_path / "arguments.yaml"
    arguments.write_text(f"path: {data}\n", encoding="utf-8")
    builder = InspectEvaluatorBuilder(
        tasks=[f"{tmp_path / 'evals.py'}@facts"],
        task_args=str(arguments),
        model_name=tiny_qwen3,
        max_tokens=6,
        log_dir=str(tmp_path / "logs"),
        name="held_out",
    )
    assert run(builder(), client)["held_out/facts/includes/accuracy"] == 0.5
    with_base.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["nowhere.py@facts"]}, "there is no file"),
        ({"tasks": ["a"], "limit": 0}, "Invalid limit=0: must be >= 1"),
        ({"tasks": ["a"], "max_connections": 0}, "Invalid max_connections=0: must be >= 1"),
    ],
)
def test_invalid_settings_are_refused(options: dict, message: str, tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InspectEvaluatorBuilder(model_name=tiny_qwen3, **options)()


def test_without_the_package_the_error_names_the_install_command() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'sft-cookbook\[inspect\]'"):
        extras.require("no_such_inspect", "InspectEvaluatorBuilder", extra="inspect")
