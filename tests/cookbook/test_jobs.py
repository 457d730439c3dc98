"""A run as a job of a real Ray head: submitted, shown, cancelled, tried again, waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cookbook import jobs
from cookbook.checkpoints import CheckpointLog
from cookbook.errors import ClusterError, ConfigError
from recipes import jobs as jobs_recipe
from recipes import sft

REPOSITORY = Path(__file__).parents[2]
KEYS = ["max_steps=150", "test_size=16", "eval_every=0", "infrequent_eval_every=0", "save_every=0"]
PATIENCE_SECONDS = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the note of the head lies: these tests neither find nor stop one of the user's."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOKBOOK_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "80")
        yield home


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[jobs.Head]:
    head = jobs.start_head()
    yield head
    jobs.stop_head(head)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert head.folder not in processes
    assert not Path(head.folder).exists()
    assert jobs.find_head() is None


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.jobs", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        env=dict(os.environ),
    )


def test_without_a_head_there_are_no_jobs_and_the_error_says_how_to_have_one(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["list"])
    assert caught.value.code == 1
    assert (
        "No Ray head runs on this machine, so there are no jobs. `submit` starts one"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft", "learning_rat=1"], "There is no key 'learning_rat'. Did you mean learning_rate?"),
        (["sft", "--learning_rat=1"], "Did you mean learning_rate?"),
        (["sft", "max_steps=0"], "max_steps=0 is too small"),
        (["sft", "model_name=./nowhere"], "is neither a folder on this machine nor a hub id"),
        (["sfx"], "There is no recipe 'sfx'. Did you mean sft?"),
        (["sft", "--address=127.0.0.1:1"], "The Ray cluster at http://127.0.0.1:1 cannot be reached"),
        (["sft", "--address=a b:c"], "is no address"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_a_head_is_started(
    home: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["submit", *argv, f"log_path={tmp_path / 'run'}"])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err
    assert jobs.find_head() is None
    assert not (tmp_path / "run").exists()


COMMANDS = re.findall(
    r"^python -m recipes\.jobs ([^#\n]*)", (REPOSITORY / "cookbook/jobs/README.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_is_understood(line: str) -> None:
    arguments = jobs_recipe.parse(line.split())
    assert arguments.command == line.split()[0]


def test_importing_the_library_does_not_import_ray() -> None:
    program = "import sys, cookbook, cookbook.jobs, cookbook.sweeps; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_ray_that_is_not_installed_is_named_with_its_extra(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'sft-cookbook\[ray\]'"):
        jobs.submit("sft", [])


def test_a_job_that_is_cancelled_has_saved_and_its_retry_ends_as_if_nothing_had_been(
    head: jobs.Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    job = jobs.submit("sft", [*KEYS, "log_path=run", "if_log_path_exists=delete"])
    folder = tmp_path / "run"
    assert job.log_path == str(folder)

    # a second one waits for the devices that the first one has
    waiting = jobs.submit("sft", [*KEYS, "log_path=waiting"])
    _wait_for_steps(folder)
    assert jobs.get(job.id).status == "RUNNING"
    assert jobs.get(waiting.id).status == "PENDING"
    assert jobs.cancel(waiting.id).status == "PENDING"

    # shown, with what `auto` came to
    pinned = jobs.get(job.id).config
    assert pinned["learning_rate"] == 4e-3
    assert [one.id for one in jobs.list()] == [waiting.id, job.id]
    with pytest.raises(ClusterError, match=f"There is no job '{job.id}x'. Did you mean {job.id}"):
        jobs.get(job.id + "x")
    with pytest.raises(ClusterError, match="is RUNNING still. Wait for it, or cancel it first"):
        jobs.retry(job.id)

    # cancelled
    jobs_recipe.main(["cancel", job.id])
    assert f"Job {job.id}: STOPPED." in capsys.readouterr().out
    last = CheckpointLog(folder).last()
    assert last is not None
    assert 0 < last.step < 150
    assert f"Stopped after step {last.step} of 150" in "".join(jobs.logs(job.id))
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["wait", job.id])
    assert caught.value.code == 1

    # tried again, in the same folder and with the pinned config, whatever was asked for at first
    done = command("retry", job.id, "--wait", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"150 steps, {last.step} of them done" in done.stdout
    assert "SUCCEEDED" in done.stdout
    assert jobs.get(waiting.id).status == "STOPPED"
    assert not (tmp_path / "waiting" / "config.json").exists(), "it never ran"
    assert CheckpointLog(folder).is_finished

    # the truth: the same run in this process, never stopped
    sft.main([*KEYS, "log_path=plain"])
    ours = load_file(folder / "checkpoints" / "final" / "adapter_model.safetensors")
    plain = load_file(tmp_path / "plain" / "checkpoints" / "final" / "adapter_model.safetensors")
    assert ours.keys() == plain.keys()
    assert all(ours[name].equal(plain[name]) for name in plain)
    recorded = json.loads((folder / "config.json").read_text())
    assert {**recorded, "if_log_path_exists": "delete"} == pinned


def test_a_job_that_fails_says_so_by_its_exit_code(head: jobs.Head, tmp_path: Path) -> None:
    done = command("submit", "sft", "dataset=missing.jsonl", "log_path=bad", "--wait", cwd=tmp_path)
    assert done.returncode == 1
    assert "Dataset file missing.jsonl does not exist" in done.stdout
    assert "FAILED" in done.stdout


def _wait_for_steps(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, "the job takes no step"
        time.sleep(0.1)
