"""Evaluators in a run: set in its config, sharing one snapshot, and without an effect on training."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import pytest
from safetensors.numpy import load_file

from cookbook.config import cli
from cookbook.eval.evaluators import EvaluatorBuilder, SamplingClientEvaluator
from cookbook.eval.generation import GenerationEvaluatorBuilder
from cookbook.eval.integrations.inspect import InspectEvaluatorBuilder
from cookbook.eval.integrations.lm_eval import HarnessEvaluatorBuilder
from cookbook.eval.samples import SamplesEvaluatorBuilder
from cookbook.supervised import train
from cookbook.utils import jsonl
from recipes.sft import DEFAULTS

TASK_FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import includes

@task
def facts():
    return Task(dataset=json_dataset({path!r}), scorer=includes())
"""

HARNESS_TASK = """
task: tiny_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    rows = [{"input": "one", "target": "two", "prompt": "one", "completion": "two"}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "evals.py").write_text(TASK_FILE.format(path=str(path)), encoding="utf-8")
    (tmp_path / "tiny_facts.yaml").write_text(
        HARNESS_TASK.format(path=path, cache=tmp_path / "cache"), encoding="utf-8"
    )
    return path


@pytest.fixture
def make_config(tmp_path: Path, tiny_qwen3: str, chats: list) -> Callable[..., train.Config]:
    data = tmp_path / "chats.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8"
    )

    def make(name: str, *argv: str, **more: Any) -> train.Config:
        keys = [f"log_path={tmp_path / name}", f"model_name={tiny_qwen3}", f"dataset={data}", "lora_rank=4"]
        keys += ["max_steps=2", "max_length=256", "test_size=4", "on_evaluator_error=raise"]
        return cli.make_config(train.Config, {**DEFAULTS, **more}, [*keys, *argv])

    return make


def weights_of(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "checkpoints" / "final" / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def every_kind(facts: Path) -> list[EvaluatorBuilder]:
    return [
        GenerationEvaluatorBuilder(path=str(facts), max_tokens=4, temperature=1.0, num_samples=2),
        SamplesEvaluatorBuilder(prompts=["one"], max_tokens=4, temperature=1.0),
        InspectEvaluatorBuilder(tasks=[str(facts.parent / "evals.py")], max_tokens=4),
        HarnessEvaluatorBuilder(
            tasks=["tiny_facts"], include_path=str(facts.parent), apply_chat_template=True
        ),
    ]


@pytest.mark.slow
def test_evaluators_of_every_kind_do_not_change_the_trained_weights(
    make_config: Callable[..., train.Config], facts: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    bare = make_config("bare", "eval_every=0", "infrequent_eval_every=0")
    asyncio.run(train.main(bare))
    capfd.readouterr()
    full = make_config("full", "eval_every=1", evaluator_builders=every_kind(facts))
    summary = asyncio.run(train.main(full))
    assert weights_of(tmp_path / "full") == weights_of(tmp_path / "bare")

    rows = jsonl.read(tmp_path / "full" / "metrics.jsonl")
    for path in (
        "test/nll",
        "generation/exact_match_best_of_2",
        "inspect/facts/includes/accuracy",
        "lm_eval/tiny_facts/exact_match",
    ):
        assert [row["step"] for row in rows if path in row] == [0, 1, 2]
        assert path in summary.metrics
    tables = jsonl.read(tmp_path / "full" / "tables.jsonl")
    assert {(row["step"], row["table"]) for row in tables} == {
        (step, table) for step in (0, 1, 2) for table in ("generation", "samples")
    }
    assert len(list((tmp_path / "full" / "inspect").glob("*.eval"))) == 3
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "step 0: inspect/facts/includes/accuracy 0.0000" in printed.out


@pytest.mark.slow
def test_builders_can_be_set_on_the_command_line(
    make_config: Callable[..., train.Config], facts: Path, tmp_path: Path
) -> None:
    config = make_config(
        "cli",
        "evaluator_builders.0=cookbook.eval.generation:GenerationEvaluatorBuilder",
        f"evaluator_builders.0.path={facts}",
        "evaluator_builders.0.scores=exact_match,f1",
        "evaluator_builders.0.max_tokens=3",
        "evaluator_builders.1=cookbook.eval.samples:SamplesEvaluatorBuilder",
        "evaluator_builders.1.prompts=one,two",
        "evaluator_builders.1.name=shown",
        "infrequent_eval_every=0",
        "max_steps=1",
    )
    summary = asyncio.run(train.main(config))
    assert {"generation/exact_match", "generation/f1"} <= summary.metrics.keys()
    tables = {row["table"] for row in jsonl.read(tmp_path / "cli" / "tables.jsonl")}
    assert tables == {"generation", "shown"}
    recorded = json.loads((tmp_path / "cli" / "config.json").read_text(encoding="utf-8"))[
        "evaluator_builders"
    ][0]
    assert recorded["model_name"] is None, "another model's run of this config asks in that model's tokens"


KEPT: list[Any] = []


class SnapshotKeeper(SamplingClientEvaluator):
    async def __call__(self, sampling_client: Any) -> dict[str, float]:
        KEPT.append(sampling_client)
        return {}


@chz.chz
class SnapshotKeeperBuilder(EvaluatorBuilder):
    def __call__(self) -> SnapshotKeeper:
        return SnapshotKeeper()


@pytest.mark.slow
def test_all_sampling_evaluators_of_a_step_share_one_snapshot(
    make_config: Callable[..., train.Config],
) -> None:
    KEPT.clear()
    builders = [SnapshotKeeperBuilder(), SnapshotKeeperBuilder()]
    config = make_config("shared", "eval_every=1", "max_steps=1", evaluator_builders=builders)
    asyncio.run(train.main(config))
    assert len(KEPT) == 4
    assert KEPT[0] is KEPT[1]
    assert KEPT[2] is KEPT[3]
    assert KEPT[0] is not KEPT[2]
    KEPT.clear()
