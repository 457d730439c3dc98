"""A killed and resumed run is bit-identical to one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from slow import slow_after, slow_except
from waiting import wait_until

from cookbook.utils import jsonl

METRICS_THAT_ARE_TIMES = "perf/"
NUM_STEPS = 10


@pytest.fixture(scope="module")
def make_config(
    tiny_qwen3: str, chats: list, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Returns a run of two epochs of five steps, with checkpoints and evaluations at different steps."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "chats.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8"
    )

    def config(name: str, **overrides: Any) -> dict[str, Any]:
        return {
            "log_path": str(folder / name),
            "model_name": tiny_qwen3,
            "dataset_builder": {
                "_type": "cookbook.data:FromConversationFileBuilder",
                "file_path": str(data),
                "test_size": 4,
                "common_config": {"model_name_for_tokenizer": tiny_qwen3, "batch_size": 4},
            },
            "learning_rate": 1e-2,
            "num_epochs": 2,
            "lora_rank": 4,
            "save_every": 3,
            "eval_every": 4,
            "keep_checkpoints": 2,
            **overrides,
        }

    return config


@pytest.fixture(scope="module")
def uninterrupted(server: Any, make_config: Callable) -> Path:
    config = make_config("uninterrupted")
    assert server.run(config) == 0, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
    return Path(config["log_path"])


def assert_same_run(folder: Path, other: Path) -> None:
    assert metrics_of(folder) == metrics_of(other)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors, others = (load_file(run / "checkpoints" / "final" / file) for run in (folder, other))
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.tobytes() == others[name].tobytes(), f"{name} of {file}"


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(METRICS_THAT_ARE_TIMES)}
        for row in rows
    ]


def wait_for_rows(folder: Path, num_rows: int) -> None:
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= num_rows, seconds=120)


def test_the_uninterrupted_run_has_a_row_per_step_and_learns(uninterrupted: Path) -> None:
    rows = metrics_of(uninterrupted)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert [row["step"] for row in rows if "test/nll" in row] == [0, 4, 8, NUM_STEPS]
    assert rows[-2]["train/nll"] < rows[0]["train/nll"] - 1


@pytest.mark.slow
def test_two_uninterrupted_runs_are_bit_identical(
    server: Any, make_config: Callable, uninterrupted: Path
) -> None:
    config = make_config("again")
    assert server.run(config) == 0
    assert_same_run(Path(config["log_path"]), uninterrupted)


@pytest.mark.slow
def test_the_depth_of_pipelining_changes_nothing(
    server: Any, make_config: Callable, uninterrupted: Path
) -> None:
    for depth in (0, 4):
        config = make_config(f"depth{depth}", submit_ahead=depth)
        assert server.run(config) == 0
        assert_same_run(Path(config["log_path"]), uninterrupted)


@pytest.mark.slow
def test_a_run_killed_before_any_file_operation_resumes_to_the_same_bits(
    server: Any, make_config: Callable, uninterrupted: Path
) -> None:
    """Kills and resumes a run every few file operations, until it ends."""
    rng = random.Random(0)
    config = make_config("killed-at-events")
    num_kills = 0
    while True:
        code = server.run(config, kill_at_event=rng.randint(35, 130))
        if code == 0:
            break
        assert code == -signal.SIGKILL, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
        num_kills += 1
        assert num_kills < 200
    assert num_kills >= 3, num_kills
    assert_same_run(Path(config["log_path"]), uninterrupted)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("on_files", "event"),
    slow_except(
        [("000003", 13), ("checkpoints.jsonl", 2)],
        [
            *(("000003", event) for event in range(1, 14, 3)),
            ("checkpoints.jsonl", 1),
            ("checkpoints.jsonl", 2),
        ],
    ),
)
def test_a_run_killed_while_it_saves_resumes_to_the_same_bits(
    server: Any, make_config: Callable, uninterrupted: Path, on_files: str, event: int
) -> None:
    """Kills at every third operation of the first checkpoint, and both operations of its record."""
    config = make_config(f"killed-in-save-{on_files}-{event}")
    assert server.run(config, event, on_files=on_files) == -signal.SIGKILL
    assert server.run(config) == 0, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
    assert_same_run(Path(config["log_path"]), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_after(1, range(3)))
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(
    server: Any, make_config: Callable, uninterrupted: Path, seed: int
) -> None:
    config = make_config(f"killed-at-random-{seed}")
    rng = random.Random(seed)

    def kill(child: int) -> None:
        wait_for_rows(Path(config["log_path"]), rng.randint(1, 6))
        os.kill(child, signal.SIGKILL)

    assert server.run(config, meanwhile=kill) == -signal.SIGKILL
    assert server.run(config) == 0
    assert_same_run(Path(config["log_path"]), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_after(1, range(3)))
def test_a_killed_run_on_a_stream_resumes_to_the_same_bits(
    server: Any, make_config: Callable, seed: int
) -> None:
    def streamed(name: str) -> dict[str, Any]:
        config = make_config(name, max_steps=NUM_STEPS)
        config["dataset_builder"] |= {"streaming": True, "buffer_size": 7}
        return config

    whole, killed = streamed(f"streamed-{seed}"), streamed(f"streamed-killed-{seed}")
    assert server.run(whole) == 0, Path(whole["log_path"] + ".out").read_text(encoding="utf-8")
    rng = random.Random(seed)

    def kill(child: int) -> None:
        wait_for_rows(Path(killed["log_path"]), rng.randint(4, 8))
        os.kill(child, signal.SIGKILL)

    assert server.run(killed, meanwhile=kill) == -signal.SIGKILL
    assert server.run(killed) == 0, Path(killed["log_path"] + ".out").read_text(encoding="utf-8")
    assert_same_run(Path(killed["log_path"]), Path(whole["log_path"]))


@pytest.mark.parametrize("number", slow_after(1, [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    server: Any, make_config: Callable, uninterrupted: Path, number: signal.Signals
) -> None:
    config = make_config(f"stopped-by-{number.name}")
    folder = Path(config["log_path"])

    def stop(child: int) -> None:
        wait_for_rows(folder, 2)
        os.kill(child, number)

    assert server.run(config, meanwhile=stop) == 0
    last = json.loads((folder / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert 2 <= last["step"] < NUM_STEPS
    assert (folder / last["path"]).is_dir()
    assert "Run the same command again to resume" in Path(f"{folder}.out").read_text(encoding="utf-8")
    assert len(metrics_of(folder)) == last["step"]
    assert server.run(config) == 0
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_a_finished_run_is_not_changed(server: Any, make_config: Callable) -> None:
    config = make_config("finished", max_steps=2)
    assert server.run(config) == 0
    before = (Path(config["log_path"]) / "metrics.jsonl").read_bytes()
    assert server.run(config) == 0
    assert (Path(config["log_path"]) / "metrics.jsonl").read_bytes() == before
    assert "This run is finished" in Path(config["log_path"] + ".out").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_checkpoint_of_step_k_holds_nothing_of_step_k_plus_1(
    server: Any, make_config: Callable, uninterrupted: Path
) -> None:
    """A run of only three steps has the same weights after step three."""
    ends = make_config("three", max_steps=3, lr_schedule="constant")
    goes_on = make_config("goes-on", lr_schedule="constant", submit_ahead=4, keep_checkpoints=None)
    assert server.run(ends) == server.run(goes_on) == 0
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        ended = load_file(Path(ends["log_path"]) / "checkpoints" / "final" / file)
        passed = load_file(Path(goes_on["log_path"]) / "checkpoints" / "000003" / file)
        assert {name: tensor.tobytes() for name, tensor in ended.items()} == {
            name: tensor.tobytes() for name, tensor in passed.items()
        }


# -- the best checkpoint, and early stopping ---------------------------------------------------

BEST, STOPPED_AT = 17, 21


@pytest.fixture(scope="module")
def make_stopping_config(make_config: Callable) -> Callable[[str], dict[str, Any]]:
    """Returns an overfitting run: the best evaluation is that of step 17, and patience ends four steps later.

    Checkpoints are due every third step, so some of the best states are periodic checkpoints, and some are
    not.
    """

    def config(name: str, **overrides: Any) -> dict[str, Any]:
        values = {"learning_rate": 3e-2, "num_epochs": 6, "eval_every": 1, "early_stopping_patience": 4}
        return make_config(name, **values | overrides)

    return config


@pytest.fixture(scope="module")
def stopped_early(server: Any, make_stopping_config: Callable) -> Path:
    config = make_stopping_config("stopped-early")
    assert server.run(config) == 0, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
    return Path(config["log_path"])


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    files = ("adapter_model.safetensors", "optimizer.safetensors")
    return {
        f"{file}: {name}": tensor.tobytes()
        for file in files
        for name, tensor in load_file(checkpoint / file).items()
    }


def assert_same_best(folder: Path, other: Path) -> None:
    assert_same_run(folder, other)
    records, others = (jsonl.read(one / "checkpoints.jsonl") for one in (folder, other))
    for record in (*records, *others):  # these name the run's own folder
        del record["state_path"], record["sampler_path"]
    assert records == others
    for record in records:
        assert tensors_of(folder / record["path"]) == tensors_of(other / record["path"])


@pytest.mark.slow
def test_early_stopping_ends_a_run_and_keep_checkpoints_does_not_remove_the_best(stopped_early: Path) -> None:
    """The reference is the least of all logged values, and four evaluations after it."""
    nlls = {row["step"]: row["test/nll"] for row in metrics_of(stopped_early)}
    assert min((step for step in nlls if step), key=nlls.__getitem__) == BEST
    assert max(nlls) == STOPPED_AT == BEST + 4
    records = [
        json.loads(line)
        for line in (stopped_early / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(record["name"], record.get("value")) for record in records] == [
        ("000017", nlls[BEST]),
        ("000021", None),
        ("final", None),
    ]
    assert {path.name for path in (stopped_early / "checkpoints").iterdir()} == {"000017", "000021", "final"}
    out = Path(f"{stopped_early}.out").read_text(encoding="utf-8")
    assert "Stopped early after 21 steps: no better test/nll in 4 evaluations. Saved" in out
    assert f"The best is {stopped_early}/checkpoints/000017: test/nll {nlls[BEST]:.4f} after 17 steps." in out


@pytest.mark.slow
def test_the_best_checkpoint_is_the_state_that_was_evaluated(
    server: Any, make_stopping_config: Callable, stopped_early: Path
) -> None:
    """The reference is a run without tracking that saves every state, at another depth of pipelining."""
    all_saved = make_stopping_config(
        "all-saved",
        best_metric=None,
        early_stopping_patience=None,
        save_every=1,
        keep_checkpoints=None,
        submit_ahead=3,
    )
    assert server.run(all_saved) == 0, Path(all_saved["log_path"] + ".out").read_text(encoding="utf-8")
    saved = Path(all_saved["log_path"], "checkpoints")
    for name, step in (("000017", BEST), ("000021", 21), ("final", STOPPED_AT)):
        assert tensors_of(stopped_early / "checkpoints" / name) == tensors_of(saved / f"{step:06d}")
    assert metrics_of(Path(all_saved["log_path"]))[:STOPPED_AT] == metrics_of(stopped_early)[:STOPPED_AT]


@pytest.mark.slow
def test_the_depth_of_pipelining_changes_neither_the_best_nor_the_stop(
    server: Any, make_stopping_config: Callable, stopped_early: Path
) -> None:
    for depth in (0, 4):
        config = make_stopping_config(f"stopping-depth{depth}", submit_ahead=depth)
        assert server.run(config) == 0
        assert_same_best(Path(config["log_path"]), stopped_early)


@pytest.mark.slow
def test_a_run_killed_before_any_file_operation_keeps_the_same_best_and_stops_at_the_same_step(
    server: Any, make_stopping_config: Callable, stopped_early: Path
) -> None:
    rng = random.Random(0)
    config = make_stopping_config("stopping-killed", trace=True)
    num_kills = 0
    while (code := server.run(config, kill_at_event=rng.randint(40, 160))) != 0:
        assert code == -signal.SIGKILL, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
        num_kills += 1
        assert num_kills < 100
    assert num_kills >= 4
    assert_same_best(Path(config["log_path"]), stopped_early)
    trace = Path(config["log_path"], "trace.json").read_text(encoding="utf-8")
    events = json.loads(
        trace.removesuffix("]\n") + "]"
    )  # a process killed at the very end has not closed the array
    assert len({event["pid"] for event in events}) > 1, "every life that had a model is in the trace"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_files", "event"),
    slow_except(
        [(".checkpoints.jsonl.writing", 33), ("000017", 13)],
        [
            *((".checkpoints.jsonl.writing", event) for event in (8, 33, 34)),  # saved and not recorded
            *(("metrics.jsonl", event) for event in (19, 20)),  # evaluated and not recorded; not logged
            *(("000017", event) for event in (1, 13)),  # evaluated and not saved; partly saved
            ("000016", 15),  # the former best is partly removed
            ("final", 1),  # out of patience, and not yet recorded
        ],
    ),
)
def test_a_run_killed_around_its_best_keeps_the_same_best_and_stops_at_the_same_step(
    server: Any, make_stopping_config: Callable, stopped_early: Path, on_files: str, event: int
) -> None:
    config = make_stopping_config(f"stopping-killed-{on_files}-{event}")
    assert server.run(config, event, on_files=on_files) == -signal.SIGKILL
    assert server.run(config) == 0, Path(config["log_path"] + ".out").read_text(encoding="utf-8")
    assert_same_best(Path(config["log_path"]), stopped_early)
