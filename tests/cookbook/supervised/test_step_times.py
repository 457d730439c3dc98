"""The times of steps that a run logs agree with a separate clock."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import pytest
from safetensors.numpy import load_file
from slow import slow_after
from waiting import wait_until

from cookbook.data.types import SupervisedDataset, SupervisedDatasetBuilder
from cookbook.eval.evaluators import TrainingClientEvaluator
from cookbook.supervised import train
from cookbook.supervised.step_times import StepTimes
from cookbook.trace import Recorder
from cookbook.types import Datum, ModelInput

PARTS = ("saving", "evaluating", "forward_backward", "optim_step", "idle")
LATE_BATCH = 5
RENDERING, EVALUATING = 0.1, 0.05


class SlowDataset(SupervisedDataset):
    """Makes a batch slowly, after every earlier step is in the file."""

    def __init__(self, metrics: Path | None) -> None:
        self._metrics = metrics

    def get_batch(self, index: int) -> list[Datum]:
        if index == LATE_BATCH and self._metrics is not None:
            path = self._metrics
            wait_until(lambda: path.read_bytes().count(b"\n") >= index)
            # The loop may still be logging the row that is in the file: the wait for the batch begins later.
            ends = time.perf_counter() + 3 * RENDERING
            while time.perf_counter() < ends:
                pass  # work
        tokens = [5 + index, 6, 7, 8]
        return [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})]

    def __len__(self) -> int:
        return 8


@chz.chz
class SlowBuilder(SupervisedDatasetBuilder):
    metrics: str | None = None

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        return SlowDataset(None if self.metrics is None else Path(self.metrics)), None


class SlowEvaluator(TrainingClientEvaluator):
    def __init__(self, calls: list[float]) -> None:
        self._calls = calls

    async def __call__(self, training_client: Any) -> dict[str, float]:
        self._calls.append(time.perf_counter())
        data = SlowDataset(None).get_batch(0)
        nll = (await training_client.forward(data)).loss
        ends = time.perf_counter() + EVALUATING
        while time.perf_counter() < ends:
            await asyncio.sleep(0)  # work in parallel to other coroutines
        self._calls.append(time.perf_counter())
        return {"test/nll": nll}


MakeConfig = Callable[..., train.Config]


@pytest.fixture
def make_config(tmp_path: Path, tiny_qwen3: str) -> MakeConfig:
    def make(name: str = "run", **overrides: Any) -> train.Config:
        values: dict[str, Any] = {
            "log_path": str(tmp_path / name),
            "model_name": tiny_qwen3,
            "dataset_builder": SlowBuilder(),
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "save_every": 3,
            "eval_every": 4,
            "trace": True,
        }
        return train.Config(**(values | overrides))

    return make


def rows_of(config: train.Config) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in Path(config.log_path, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def spans_of(config: train.Config) -> dict[str, list[dict[str, Any]]]:
    """Returns the events of each track, ordered by time."""
    events = json.loads(Path(config.log_path, "trace.json").read_text(encoding="utf-8"))
    tracks: dict[str, list[dict[str, Any]]] = {}
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"]):
        tracks.setdefault(event["cat"], []).append(event)
    return tracks


@pytest.mark.slow
@pytest.mark.parametrize("submit_ahead", slow_after(1, [1, 0, 3]))
def test_the_seconds_of_the_steps_and_their_parts_sum_to_those_of_the_run(
    make_config: MakeConfig, submit_ahead: int
) -> None:
    """The separate clock: the first evaluation begins with the run, and the last one ends with it."""
    calls: list[float] = []
    evaluators = [lambda: SlowEvaluator(calls)]
    config = make_config(submit_ahead=submit_ahead, save_every=2, evaluator_builders=evaluators)
    began = time.perf_counter()
    asyncio.run(train.main(config))
    ended = time.perf_counter()
    rows = rows_of(config)
    total = sum(row["perf/seconds"] for row in rows)
    assert calls[-1] - calls[0] <= total + 1e-3
    assert total <= ended - began
    for row in rows:
        parts = sum(row.get(f"perf/seconds_{part}", 0.0) for part in PARTS)
        assert parts == pytest.approx(row["perf/seconds"], abs=1e-6)
    evaluated = [row["step"] for row in rows if row.get("perf/seconds_evaluating", 0.0) >= EVALUATING]
    saved = [row["step"] for row in rows if row.get("perf/seconds_saving", 0.0) > 0]
    assert evaluated == [0, 4, 8]
    assert saved == [2, 4, 6, 8]
    for row in rows[:-1]:
        assert row["perf/seconds_forward_backward"] > 0
        assert row["perf/seconds_optim_step"] > 0


@pytest.mark.slow
def test_the_wait_for_a_late_batch_is_idle_time_of_the_device(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    builder = SlowBuilder(metrics=str(tmp_path / "run" / "metrics.jsonl"))
    config = make_config(dataset_builder=builder, submit_ahead=0, eval_every=0, infrequent_eval_every=0)
    asyncio.run(train.main(config))
    row = rows_of(config)[LATE_BATCH]
    for part in ("rendering", "waited_for_batch", "idle"):
        assert row[f"perf/seconds_{part}"] >= RENDERING


@pytest.mark.slow
def test_a_trace_shows_every_step_on_every_track_in_sequence(make_config: MakeConfig) -> None:
    calls: list[float] = []
    config = make_config(evaluator_builders=[lambda: SlowEvaluator(calls)])
    asyncio.run(train.main(config))
    tracks = spans_of(config)
    assert tracks.keys() == {"render", "loop", "evaluation", "engine"}
    for track in ("render", "loop", "engine"):
        for one, other in itertools.pairwise(tracks[track]):
            assert one["ts"] + one["dur"] <= other["ts"], f"{one} and {other} overlap"

    def steps(track: str, name: str) -> list[int]:
        return [event["args"]["step"] for event in tracks[track] if event["name"] == name]

    assert steps("render", "render") == steps("loop", "queue") == list(range(8))
    assert steps("engine", "forward_backward") == steps("engine", "optim_step") == list(range(8))
    assert steps("engine", "save") == [3, 4, 6, 8]
    assert steps("engine", "forward") == steps("evaluation", "evaluate") == [0, 4, 8]
    assert [event["name"] for event in tracks["engine"][:2]] == ["BaseModel", "Trainer"]
    whole = {event["args"]["step"]: event for event in tracks["evaluation"] if event["name"] == "evaluate"}
    inner = [event for event in tracks["evaluation"] if event["name"] == "SlowEvaluator"]
    inner += [event for event in tracks["engine"] if event["name"] == "forward"]
    assert len(inner) == 6
    for event in inner:
        outer = whole[event["args"]["step"]]
        assert outer["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.slow
def test_the_engine_runs_requests_in_the_order_of_the_loop(make_config: MakeConfig) -> None:
    """forward_backward(k), optim_step(k), save and evaluation of that state, forward_backward(k + 1)."""
    config = make_config(submit_ahead=3, evaluator_builders=[lambda: SlowEvaluator([])])
    asyncio.run(train.main(config))
    jobs = [(event["args"]["step"], event["name"]) for event in spans_of(config)["engine"] if "args" in event]
    expected: list[tuple[int, str]] = []
    for step in range(9):
        expected += [(step, "save")] * (step in (3, 6, 8))
        expected += [(step, "forward")] * (step in (0, 4, 8))
        expected += [(step, "save")] * (step == 4)
        expected += [(step, "forward_backward"), (step, "optim_step")] * (step < 8)
    assert jobs == expected


@pytest.mark.slow
def test_a_trace_changes_no_weight_and_is_optional(make_config: MakeConfig) -> None:
    weights = []
    for trace in (True, False):
        config = make_config(f"trace-{trace}", trace=trace, eval_every=0)
        folder = asyncio.run(train.main(config)).checkpoint_path
        weights.append(load_file(folder / "adapter_model.safetensors"))
        assert Path(config.log_path, "trace.json").exists() == trace
        assert "perf/seconds_forward_backward" in rows_of(config)[0]
    assert {name: tensor.tobytes() for name, tensor in weights[0].items()} == {
        name: tensor.tobytes() for name, tensor in weights[1].items()
    }


def test_times_of_the_device_replace_those_of_the_engine_thread(tmp_path: Path) -> None:
    recorder = Recorder()
    times = StepTimes(recorder, None)
    start = time.perf_counter()
    recorder.add("engine", "forward_backward", start, start + 0.001, 0)
    recorder.add_later("device", "forward_backward", lambda: start + 1, lambda: start + 3, 0)
    recorder.add_later("device", "optim_step", lambda: start + 3, lambda: start + 4, 0)
    found = times.of(0)
    assert found["perf/seconds_forward_backward"] == pytest.approx(2)
    assert found["perf/seconds_optim_step"] == pytest.approx(1)
    assert found["perf/seconds"] == pytest.approx(4, abs=0.1)
    assert found["perf/seconds_idle"] == pytest.approx(1, abs=0.1)
