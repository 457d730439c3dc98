"""Runs of several processes equal those of one, stop and resume together, and report an error once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from slow import slow_after, slow_except
from waiting import wait_until

NUM_STEPS = 8

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def make_config(tiny_qwen3: str, chats: list, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
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
                "common_config": {"model_name_for_tokenizer": tiny_qwen3, "batch_size": 5},
            },
            "learning_rate": 1e-2,
            "adam_eps": 1e-3,
            "num_epochs": 2,
            "lora_rank": 4,
            "save_every": 3,
            "eval_every": 4,
            "evaluator_builders": [
                {"_type": "cookbook.eval.samples:SamplesEvaluatorBuilder", "model_name": tiny_qwen3}
            ],
            "infrequent_evaluator_builders": [{"_type": "runs:PauseBuilder"}],
            "infrequent_eval_every": 5,
            **overrides,
        }

    return config


@pytest.fixture(scope="module")
def of_two(ranks: Any, make_config: MakeConfig, work_in: str) -> Path:
    """An uninterrupted run of two processes."""
    config = make_config("of-two")
    ended = ranks.run("runs:run", 2, config=config, work_in=work_in)
    assert ended.codes == [0, 0], "\n".join(ended.printed)
    assert ended.results[0] == ended.results[1]
    assert ended.results[0]["is_finished"]
    assert ended.printed[1] == ""
    assert f"Finished after {NUM_STEPS} steps" in ended.printed[0]
    return Path(config["log_path"])


@pytest.fixture(scope="module")
def work_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("work"))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def assert_same_run(folder: Path, other: Path) -> None:
    """Asserts that two runs are bit-identical."""
    assert metrics_of(folder) == metrics_of(other)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors, others = (load_file(run / "checkpoints" / "final" / file) for run in (folder, other))
        assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
            name: tensor.tobytes() for name, tensor in others.items()
        }


def assert_nearly_same_run(folder: Path, other: Path) -> None:
    rows, others = metrics_of(folder), metrics_of(other)
    assert len(rows) == len(others) == NUM_STEPS + 1
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def wait_for_rows(folder: Path, num_rows: int) -> None:
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= num_rows, seconds=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "shard"), slow_except([(2, "full")], [(1, "auto"), (2, "full"), (4, "auto")])
)
def test_a_run_is_the_same_run_in_any_number_of_processes(
    ranks: Any, make_config: MakeConfig, of_two: Path, work_in: str, size: int, shard: str
) -> None:
    config = make_config(f"of-{size}-{shard}", shard=shard)
    ended = ranks.run("runs:run", size, config=config, work_in=work_in)
    assert_nearly_same_run(Path(config["log_path"]), of_two)
    assert (f"{size} processes train together" in ended.printed[0]) == (size > 1)
    assert ("each holds a part of the base weights" in ended.printed[0]) == (shard == "full")


def disturbed(ranks: Any, config: dict[str, Any], work_in: str, disturb: Callable[[list[int]], None]) -> Any:
    """Interrupts a run of two processes while it evaluates the state after five steps."""
    folder = Path(config["log_path"])
    go_on = folder.with_name(f"{folder.name}.go-on")

    def meanwhile(processes: list[int]) -> None:
        wait_for_rows(folder, 4)
        disturb(processes)
        go_on.touch()

    return ranks.run("runs:run", 2, meanwhile, {"PAUSE_UNTIL": str(go_on)}, config=config, work_in=work_in)


def send(number: signal.Signals, rank: int, folder: Path) -> Callable[[list[int]], None]:
    """Sends a signal to one process, and waits until the process logs it."""

    def disturb(processes: list[int]) -> None:
        os.kill(processes[rank], number)
        log = folder / f"ranks/{rank}.log" if rank else folder / "train.log"
        wait_until(lambda: f"{number.name}: stopping" in log.read_text(encoding="utf-8"))

    return disturb


@pytest.mark.slow
@pytest.mark.parametrize("victim", slow_after(1, [1, 0]))
def test_a_process_that_is_killed_ends_the_others_and_the_same_command_resumes(
    ranks: Any, make_config: MakeConfig, of_two: Path, work_in: str, victim: int
) -> None:
    config = make_config(f"killed-{victim}")
    ended = disturbed(ranks, config, work_in, lambda processes: os.kill(processes[victim], signal.SIGKILL))
    assert ended.codes[victim] == -signal.SIGKILL
    assert ended.codes[1 - victim] == 1
    message = ended.printed[1 - victim]
    assert message.count("TrainingError") == 1, message
    assert "The 2 processes of this run have lost each other: one was killed" in message
    assert "Run the same command again to resume" in message
    ranks.results("runs:run", 2, config=config, work_in=work_in)
    assert_same_run(Path(config["log_path"]), of_two)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    ranks: Any, make_config: MakeConfig, of_two: Path, work_in: str
) -> None:
    config = make_config("stopped")
    folder = Path(config["log_path"])
    ended = disturbed(ranks, config, work_in, send(signal.SIGTERM, 1, folder))
    assert ended.codes == [0, 0], "\n".join(ended.printed)
    assert ended.results[0] == ended.results[1]
    assert ended.results[0]["stopped_by"] == signal.SIGTERM
    assert ended.results[0]["num_steps"] in (5, 6)  # depends on the step of the other process
    assert "Run the same command again to resume" in ended.printed[0]
    ranks.results("runs:run", 2, config=config, work_in=work_in)
    assert_same_run(folder, of_two)


@pytest.mark.slow
def test_a_run_resumes_in_another_number_of_processes_and_says_so(
    ranks: Any, make_config: MakeConfig, of_two: Path, work_in: str
) -> None:
    config = make_config("moved")
    folder = Path(config["log_path"])
    disturbed(ranks, config, work_in, send(signal.SIGINT, 0, folder))
    ended = ranks.run("runs:run", 1, config=config, work_in=work_in)
    assert "was saved by a run of 2 processes; this one has 1" in ended.printed[0]
    assert_nearly_same_run(folder, of_two)


def told(ended: Any) -> str:
    """Returns the error, which only one process printed."""
    assert ended.codes == [1] * len(ended.codes)
    said = [printed for printed in ended.printed if "Error" in printed]
    assert len(said) == 1, ended.printed
    return str(said[0])


def test_a_process_with_another_config_is_named_and_so_is_the_key(
    ranks: Any, make_config: MakeConfig, work_in: str
) -> None:
    config = make_config("other-config")
    ended = ranks.run("runs:run", 2, config=config, of_rank={"1": {"learning_rate": 0.5}}, work_in=work_in)
    message = told(ended)
    assert re.search(r"ConfigError: Process 1 of 2, on \S+, has another config than process 0", message)
    assert "learning_rate: process 0 has 0.01, process 1 0.5" in message
    assert not Path(config["log_path"]).exists()


@pytest.mark.slow
def test_a_process_with_other_data_is_named(ranks: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("other-data")
    lines = Path(config["dataset_builder"]["file_path"]).read_text(encoding="utf-8").splitlines(keepends=True)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "data.jsonl").write_text("".join(lines[rank:]), encoding="utf-8")
    config["dataset_builder"]["file_path"] = "data.jsonl"
    message = told(ranks.run("runs:run", 2, config=config, work_in=str(tmp_path / "{rank}")))
    assert re.search(r"DataError: Process 1 of 2, on \S+, sees other data than process 0", message)
    assert "training data.fingerprint" in message


@pytest.mark.slow
def test_a_folder_that_not_all_processes_see_is_refused(
    ranks: Any, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("elsewhere", log_path="run")
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    message = told(ranks.run("runs:run", 2, config=config, work_in=str(tmp_path / "{rank}")))
    assert "ConfigError: log_path=run is not shared by all processes" in message


@pytest.mark.slow
def test_a_failure_of_one_process_is_printed_once_with_its_reason(
    ranks: Any, make_config: MakeConfig, work_in: str, tmp_path: Path
) -> None:
    config = make_config("no-data")
    config["dataset_builder"]["file_path"] = str(tmp_path / "nowhere.jsonl")
    message = told(ranks.run("runs:run", 2, config=config, work_in=work_in))
    assert "nowhere.jsonl" in message


@contextlib.contextmanager
def torchrun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    launcher = "torch.distributed.run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            launcher,
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "recipes.sft",
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its processes first
        process.wait(60)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    listed = ["ps", "--ppid", str(process.pid), "-o", "pid="]
    return [
        int(pid) for pid in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    ]


@pytest.mark.slow
def test_the_recipe_under_torchrun_ends_when_a_process_is_killed_and_resumes(tmp_path: Path) -> None:
    arguments = [f"log_path={tmp_path / 'run'}", "max_steps=20", "save_every=2", "infrequent_eval_every=0"]
    with torchrun(*arguments) as first:
        wait_for_rows(tmp_path / "run", 4)
        os.kill(children_of(first)[-1], signal.SIGKILL)
        printed, _ = first.communicate(timeout=60)
    assert first.returncode == 1
    assert printed.count("have lost each other") == 1, printed
    with torchrun(*arguments) as again:
        printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert "of them done" in printed
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(21))
