"""The best evaluation, early stopping, and the checkpoint that is kept."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cookbook import ServiceClient
from cookbook.data import FromConversationFileBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.errors import ConfigError, TrainingError
from cookbook.eval.evaluators import SamplingClientEvaluator, TrainingClientEvaluator
from cookbook.eval.generation import GenerationEvaluatorBuilder
from cookbook.eval.integrations.lm_eval import HarnessEvaluatorBuilder
from cookbook.eval.nll import NLLEvaluator
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.directions import direction
from cookbook.supervised import train
from cookbook.supervised.best import BestTracker
from cookbook.supervised.preflight import check_evaluations
from cookbook.types import ModelInput, SamplingParams

# -- the direction of a metric ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("test/nll", "min"),
        ("test/loss", "min"),
        ("lm_eval/wikitext/word_perplexity", "min"),
        ("test/bits_per_byte", "min"),
        ("test/nll/source_accuracy", "max"),
        ("inspect/arithmetic/accuracy", "max"),
        ("test/exact_match", "max"),
        ("lm_eval/hellaswag/acc_norm", "max"),
        ("test/f1", "max"),
    ],
)
def test_the_direction_of_a_metric_follows_from_its_name(metric: str, better: str) -> None:
    assert direction(metric, "auto") == better
    assert direction(metric, "max") == "max"


def test_a_metric_of_unknown_direction_requires_best_mode() -> None:
    with pytest.raises(ConfigError, match="test/length: its name does not say .* best_mode=min or"):
        direction("test/length", "auto")
    assert direction("test/length", "min") == "min"


# -- the fold over evaluations ----------------------------------------------------------------

VALUES = st.one_of(st.integers(0, 5).map(float), st.just(math.nan), st.none())


@given(values=st.lists(VALUES, max_size=20), patience=st.integers(1, 4), mode=st.sampled_from(["min", "max"]))
def test_best_evaluation_and_stop_equal_those_of_brute_force(
    values: list[float | None], patience: int, mode: Any
) -> None:
    """`values` are from one evaluation per step, from step 1; None is an evaluation without the metric."""
    tracker = BestTracker("m", mode, patience)
    seen: list[float] = []
    for step, value in enumerate(values, 1):
        better = {"min": lambda a, b: a < b, "max": lambda a, b: a > b}[mode]
        is_best = (
            value is not None
            and not math.isnan(value)
            and all(math.isnan(old) or better(value, old) for old in seen)
        )
        assert tracker.observe(step, {} if value is None else {"m": value}) == is_best
        if value is not None:
            seen.append(value)
        since = 0
        for index in range(len(seen)):
            earlier = [old for old in seen[:index] if not math.isnan(old)]
            improved = not math.isnan(seen[index]) and all(better(seen[index], old) for old in earlier)
            since = 0 if improved else since + 1
        assert tracker.is_out_of_patience == (since >= patience)


@given(values=st.lists(VALUES, min_size=1, max_size=20), cut=st.integers(0, 20))
def test_a_tracker_is_restored_from_its_history(values: list[float | None], cut: int) -> None:
    rows = [{"step": step, **({} if value is None else {"m": value})} for step, value in enumerate(values)]
    whole = BestTracker("m", "min", 3, 0.5)
    told = [whole.observe(row["step"], row) for row in rows]  # type: ignore[arg-type]
    resumed = BestTracker("m", "min", 3, 0.5, history=json.loads(json.dumps(rows[:cut])))
    assert [resumed.observe(row["step"], row) for row in rows[cut:]] == told[cut:]  # type: ignore[arg-type]
    assert resumed.is_out_of_patience == whole.is_out_of_patience


def test_an_improvement_within_min_delta_is_the_best_but_uses_up_patience() -> None:
    tracker = BestTracker("m", "min", patience=2, min_delta=0.1)
    assert tracker.observe(1, {"m": 1.0})
    assert tracker.observe(2, {"m": 0.95})
    assert not tracker.is_out_of_patience
    assert tracker.observe(3, {"m": 0.92})
    assert tracker.is_out_of_patience


# -- in a run ---------------------------------------------------------------------------------


class Scripted(TrainingClientEvaluator):
    """Returns the values of a list, one per evaluation; raises it if it is an exception."""

    def __init__(self, results: list[Any]) -> None:
        self._results = iter(results)

    async def __call__(self, training_client: Any) -> Any:
        result = next(self._results)
        if isinstance(result, Exception):
            raise result
        return result if isinstance(result, dict) else {"test/accuracy": result}


MakeConfig = Callable[..., train.Config]


@pytest.fixture
def make_config(tmp_path: Path, tiny_qwen3: str, chats: list) -> MakeConfig:
    data = tmp_path / "chats.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8"
    )
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3, batch_size=4)

    def make(results: list[Any] | None = None, test_size: int = 4, **overrides: Any) -> train.Config:
        values: dict[str, Any] = {
            "log_path": str(tmp_path / "run"),
            "model_name": tiny_qwen3,
            "dataset_builder": FromConversationFileBuilder(
                file_path=str(data), test_size=test_size, common_config=common
            ),
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "max_steps": 4,
            "eval_every": 1,
            "save_every": 0,
        }
        if results is not None:
            values |= {"evaluator_builders": [lambda: Scripted(results)], "best_metric": "test/accuracy"}
        return train.Config(**(values | overrides))

    return make


def run(config: train.Config) -> train.RunSummary:
    return asyncio.run(train.main(config))


def checkpoints_on_disk(config: train.Config) -> list[str]:
    return sorted(path.name for path in Path(config.log_path, "checkpoints").iterdir())


def test_the_best_checkpoint_has_the_recorded_value(make_config: MakeConfig) -> None:
    config = make_config(learning_rate=3e-2, max_steps=None, num_epochs=5, keep_checkpoints=1, submit_ahead=2)
    summary = run(config)
    assert summary.best is not None
    assert 0 < summary.best.step < summary.num_steps
    assert summary.best == CheckpointLog(Path(config.log_path)).best()
    _, held_out = config.dataset_builder()
    assert held_out is not None
    client = ServiceClient().create_training_client_from_state(summary.log_path / summary.best.path)
    measured = asyncio.run(NLLEvaluator(held_out)(client))
    assert measured["test/nll"] == pytest.approx(summary.best.value, rel=1e-6)
    assert checkpoints_on_disk(config) == [summary.best.name, "final"]


@pytest.mark.slow
def test_a_former_best_checkpoint_is_removed_unless_it_is_a_periodic_one(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config([0.9, 0.1, 0.2, 0.3, 0.0], save_every=2)
    with caplog.at_level(logging.INFO, "cookbook"):
        summary = run(config)
    assert (summary.best.name, summary.best.value) == ("000003", 0.3)  # type: ignore[union-attr]
    assert checkpoints_on_disk(config) == ["000002", "000003", "final"]
    assert "Finished after 4 steps. Saved" in caplog.text
    assert "checkpoints/000003: test/accuracy 0.3000 after 3 steps." in caplog.text
    assert "test/accuracy was better before training than in any evaluation since" in caplog.text


@pytest.mark.slow
def test_a_best_that_is_also_a_periodic_checkpoint_is_saved_once(make_config: MakeConfig) -> None:
    config = make_config([0.0, 0.1, 0.5, 0.4, 0.5], save_every=2, trace=True)
    run(config)
    events = json.loads(Path(config.log_path, "trace.json").read_text(encoding="utf-8"))
    saved = [
        event["args"]["step"] for event in events if event.get("cat") == "engine" and event["name"] == "save"
    ]
    assert saved == [1, 2, 4]


@pytest.mark.slow
def test_the_finished_model_may_be_the_best(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config([0.0, 0.1, 0.1, 0.1, 0.2])
    with caplog.at_level(logging.INFO, "cookbook"):
        summary = run(config)
    assert (summary.best.name, summary.best.value) == ("final", 0.2)  # type: ignore[union-attr]
    assert summary.log_path / summary.best.path == summary.checkpoint_path  # type: ignore[union-attr]
    assert checkpoints_on_disk(config) == ["final"]
    assert "It is the best: test/accuracy 0.2000." in caplog.text
    assert run(config).best == summary.best, "a finished run says it again"


@pytest.mark.slow
def test_a_failing_evaluator_ends_no_run_and_uses_up_no_patience(make_config: MakeConfig) -> None:
    broken = ValueError("no judge today")
    config = make_config(
        [broken, 0.5, broken, 0.4, math.nan, 0.9], early_stopping_patience=2, max_steps=5, num_epochs=2
    )
    summary = run(config)
    assert (summary.stopped_early, summary.num_steps) == (True, 4)
    assert (summary.best.step, summary.best.value) == (1, 0.5)  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished_and_runs_every_evaluator_once(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    seldom = [{"test/seldom": float(i)} for i in range(9)]
    config = make_config(
        [0.0, 0.5, 0.4, 0.3, 0.9],
        early_stopping_patience=1,
        infrequent_eval_every=3,
        infrequent_evaluator_builders=[lambda: Scripted(seldom)],
    )
    with caplog.at_level(logging.INFO, "cookbook"):
        summary = run(config)
    assert summary.is_finished
    assert (summary.stopped_early, summary.num_steps) == (True, 2)
    assert (summary.metrics["test/accuracy"], summary.metrics["test/seldom"]) == (0.4, 1.0)
    assert "Stopped early after 2 steps: no better test/accuracy in 1 evaluations." in caplog.text
    rows = [
        json.loads(line)
        for line in Path(config.log_path, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 1, 2]
    again = run(config)
    assert (again.is_finished, again.num_steps, again.best) == (True, 2, summary.best)


@pytest.mark.slow
def test_a_small_improvement_at_the_last_evaluation_of_patience_is_kept_and_ends_the_run(
    make_config: MakeConfig,
) -> None:
    config = make_config([0.0, 0.5, 0.51, 0.9], early_stopping_patience=1, early_stopping_min_delta=0.1)
    summary = run(config)
    assert (summary.best.step, summary.checkpoint_path.name) == (2, "final")  # type: ignore[union-attr]
    assert CheckpointLog(Path(config.log_path)).is_finished


def test_a_metric_that_nothing_measures_is_an_error_before_training_that_lists_the_known_ones(
    make_config: MakeConfig,
) -> None:
    config = make_config([0.1] * 9, best_metric="test/acuracy", best_mode="max")
    with pytest.raises(TrainingError, match="best_metric=test/acuracy .*: test/.*nll.*Name one of those"):
        run(config)  # the metrics of a function are known only after it has run
    assert not Path(config.log_path, "metrics.jsonl").read_text(encoding="utf-8")


def test_a_metric_that_no_evaluator_declares_is_an_error_before_the_data_are_read(
    make_config: MakeConfig,
) -> None:
    graded = GenerationEvaluatorBuilder(path="questions.jsonl", name="facts", scores=["exact_match"])
    for metric, builders, known in (
        ("test/acuracy", [], "test/nll, .*test/token_accuracy"),
        ("facts/f1", [graded], "test/nll, .*facts/exact_match, .*facts/cut_off"),
        ("facts/exact_match", [], "test/nll"),
    ):
        config = make_config(best_metric=metric, best_mode="max", evaluator_builders=builders)
        with pytest.raises(ConfigError, match=f"best_metric={metric} is not among .*: {known}"):
            run(config)
        assert not Path(config.log_path).exists()


def test_a_metric_that_an_evaluator_declares_is_accepted(make_config: MakeConfig) -> None:
    @chz.chz
    class Other(GenerationEvaluatorBuilder):
        def __call__(self) -> Any:
            return Scripted([0.1] * 9)

    graded = GenerationEvaluatorBuilder(path="questions.jsonl", name="facts", scores=["exact_match"])
    harness = HarnessEvaluatorBuilder(tasks=["arc_easy"])
    for metric, builder in (
        ("facts/exact_match", graded),
        ("lm_eval/arc_easy/acc", harness),
        ("test/pirate/nll", graded),
        ("test/acuracy", Other(path="questions.jsonl")),
    ):
        config = make_config(best_metric=metric, best_mode="max", evaluator_builders=[builder])
        check_evaluations(config, has_eval_data=None)
    config = make_config(best_metric="test/nll", early_stopping_patience=1, evaluator_builders=[graded])
    with pytest.raises(ConfigError, match="best_metric=test/nll is not among"):
        check_evaluations(config, has_eval_data=False)


def test_a_cadence_with_nothing_to_evaluate_is_refused(make_config: MakeConfig) -> None:
    default = make_config(test_size=0, eval_every=50)
    check_evaluations(default, has_eval_data=False)
    with pytest.raises(ConfigError, match="eval_every=3, but there is nothing to evaluate. Give data"):
        run(make_config(test_size=0, eval_every=3))
    with pytest.raises(ConfigError, match="infrequent_eval_every=3, but .* infrequent_evaluator_builders="):
        run(make_config(infrequent_eval_every=3))


@pytest.mark.slow
def test_the_default_metric_without_held_out_data_is_reported(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config([0.1] * 9, test_size=0, best_metric="test/nll")
    with caplog.at_level(logging.INFO, "cookbook"):
        assert run(config).best is None
    assert "No best checkpoint is kept: nothing measures test/nll (found: test/accuracy)." in caplog.text
    assert checkpoints_on_disk(config) == ["final"]


@pytest.mark.slow
def test_without_evaluations_nothing_is_tracked(make_config: MakeConfig) -> None:
    assert run(make_config(eval_every=0, infrequent_eval_every=0)).best is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best_metric": "test/length"}, "its name does not say"),
        ({"best_metric": "test/nl"}, "Did you mean `test/nll`"),
        ({"early_stopping_patience": 0}, "Invalid early_stopping_patience=0: must be >= 1"),
        ({"early_stopping_patience": 1, "best_metric": None}, "waits for a better best_metric"),
        ({"early_stopping_patience": 1, "eval_every": 0, "infrequent_eval_every": 0}, "set eval_every"),
        ({"early_stopping_min_delta": -1.0}, "Invalid early_stopping_min_delta=-1.0: must be >= 0"),
    ],
)
def test_invalid_settings_of_tracking_are_errors_before_anything_is_loaded(
    make_config: MakeConfig, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(model_name="owner/nowhere", renderer_name="x", **values)


def test_early_stopping_without_an_evaluator_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="counts evaluations, and this run has none"):
        run(make_config(test_size=0, early_stopping_patience=1))


class Dice(SamplingClientEvaluator):
    """Samples without a seed. `fails_at` is the number of the evaluation that raises."""

    def __init__(self, fails_at: int | None) -> None:
        self._fails_at = fails_at

    async def __call__(self, sampling_client: Any) -> dict[str, float]:
        if self._fails_at == 0:
            raise KeyboardInterrupt
        self._fails_at = None if self._fails_at is None else self._fails_at - 1
        sampled = await sampling_client.sample_async(
            ModelInput.from_ints([5, 6]), 8, SamplingParams(max_tokens=4)
        )
        tokens = [token for sequence in sampled.sequences for token in sequence.tokens]
        return {"test/score": sum(tokens) / len(tokens)}


@pytest.mark.slow
def test_a_run_resumed_from_its_best_checkpoint_draws_the_same_samples(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The checkpoint of the best evaluation is written after that evaluation has drawn samples."""

    def config(name: str, fails_at: int | None) -> train.Config:
        return make_config(
            log_path=str(tmp_path / name),
            max_steps=5,
            evaluator_builders=[lambda: Dice(fails_at)],
            best_metric="test/score",
            best_mode="min" if better == "min" else "max",
            submit_ahead=0,
        )

    for better in ("min", "max"):
        whole = run(config(f"whole-{better}", None))
        for fails_at in (2, 3, 4):
            name = f"stopped-{better}-{fails_at}"
            with pytest.raises(KeyboardInterrupt):
                run(config(name, fails_at))
            resumed = run(config(name, None))
            scores = [
                [
                    json.loads(line)["test/score"]
                    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                ]
                for folder in (whole.log_path, resumed.log_path)
            ]
            assert scores[0] == scores[1]
            assert whole.best == resumed.best
