"""Jobs are submitted, shown, cancelled, retried and awaited.

The slow tests do so on a real Ray head, which is 20 processes; the others on a server that answers like one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from outside_world import remove_package
from safetensors.torch import load_file
from waiting import wait_until

from cookbook import jobs
from cookbook.errors import ClusterError, ConfigError
from cookbook.runs.checkpoints import CheckpointLog
from recipes import jobs as jobs_recipe
from recipes import sft

REPOSITORY = Path(__file__).parents[3]
KEYS = ["max_steps=150", "test_size=16", "eval_every=0", "infrequent_eval_every=0", "save_every=0"]
PATIENCE_SECONDS = 600

pytestmark = pytest.mark.timeout(900)
"""A long timeout, since a Ray head and its runs are many processes, which are slow on busy cores."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the head's note, so that tests neither find nor stop the user's head."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOKBOOK_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "80")
        yield home


@pytest.fixture(scope="module")
def head(home: Path, one_ray_at_a_time: None) -> Iterator[jobs.RayHead]:
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
        timeout=800,
        env=dict(os.environ),
    )


def test_without_a_head_there_are_no_jobs_and_the_error_says_how_to_start_one(
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
        (["sft", "learning_rat=1"], "There is no key 'learning_rat'. Did you mean `learning_rate`?"),
        (["sft", "--learning_rat=1"], "Did you mean `learning_rate`?"),
        (["sft", "--learning_rat", "1"], "Did you mean `learning_rate`?"),
        (["sft", "--base-model", "x"], "There is no key 'base_model'. Use `model_name`."),
        (["sft", "--trace"], "--trace has no value. Write trace=True."),
        (["sft", "max_steps=0"], "Invalid max_steps=0: must be >= 1"),
        (["sft", "model_name=./nowhere"], "is neither a folder on this machine nor a hub id"),
        (["sfx"], "There is no recipe 'sfx'. Did you mean `sft`?"),
        (["sft", "--address=127.0.0.1:1"], "The Ray cluster at http://127.0.0.1:1 cannot be reached"),
        (["sft", "--address=a b:c"], "Invalid address="),
        (["sft", f"--address={'a' * 64}:1"], "Invalid address="),
    ],
)
def test_invalid_jobs_are_refused_before_a_head_is_started(
    home: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["submit", *argv, f"log_path={tmp_path / 'run'}"])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err
    assert jobs.find_head() is None
    assert not (tmp_path / "run").exists()


COMMANDS = re.findall(
    r"^python -m recipes\.jobs ([^#\n]*)",
    (REPOSITORY / "cookbook/jobs/README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_is_understood(line: str) -> None:
    arguments = jobs_recipe.parse(line.split())
    assert arguments.command == line.split()[0]


JOB = {
    "type": "SUBMISSION",
    "submission_id": "[/INST]\x1b[2J\nsft-1",
    "status": "FAILED",
    "entrypoint": "sft",
    "message": "It ended.\nlast lines: \x1b]0;owned\x07",
    "metadata": {
        "recipe": "recipes.sft\u202e",
        "config": json.dumps({"dataset": "a\u202eb\x1b", "log_path": "runs/[b]\x9b2J:smile:"}),
    },
    "start_time": 0,
    "end_time": 1000,
}


class Dashboard(BaseHTTPRequestHandler):
    """The HTTP API of a cluster with one job. It loses the first answer to a submission."""

    accepted: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        job_id = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"]
        if job_id not in self.accepted:
            self.accepted.append(job_id)
            self.close_connection = True  # without an answer
            return
        content = f"ValueError: Job with submission_id {job_id} already exists.".encode()
        self.send_response(500)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        answer: object = [JOB]
        if self.path.endswith("/version"):
            answer = {"version": "4", "ray_version": "2.50.0", "ray_commit": "0", "session_name": "session"}
        elif self.path.endswith("/logs"):
            answer = {"logs": "a line\n\x1b[2J\u202esecond\n"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a `Dashboard`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_names_and_output_of_a_job_are_shown_as_visible_text(
    cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Anyone can submit to a cluster, so ids, configs and logs are foreign text."""
    monkeypatch.setenv("COLUMNS", "200")
    there, job_id = ["--address", cluster], str(JOB["submission_id"])
    jobs_recipe.main(["list", *there])
    table = capsys.readouterr().out
    assert "[/INST]␛[2J␊sft-1  FAILED" in table
    assert "runs/[b]<U+009B>2J:smile:" in table
    jobs_recipe.main(["get", job_id, *there])
    shown = capsys.readouterr().out
    assert "It ended.\nlast lines: ␛]0;owned␇\n" in shown
    assert "python -m recipes.sft<U+202E>, submitted" in shown
    jobs_recipe.main(["logs", job_id, *there])
    logs = capsys.readouterr().out
    assert logs == "a line\n␛[2J<U+202E>second\n"
    assert not set("\x1b\x9b\x07\u202e") & set(table + shown + logs)
    with pytest.raises(SystemExit):
        jobs_recipe.main(["get", "x", "\x1b[2J\u202e"])
    assert "unrecognized arguments: ␛[2J<U+202E>\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_whose_answer_was_lost_is_submitted_once(cluster: str, tmp_path: Path) -> None:
    Dashboard.accepted.clear()
    with pytest.raises(ClusterError, match="There is no job 'sft-"):  # the fake lists only its own job
        jobs.submit("sft", [*KEYS, f"log_path={tmp_path / 'run'}"], address=cluster, num_gpus=0, num_cpus=1)
    (job_id,) = Dashboard.accepted
    assert (tmp_path / "run" / "jobs" / f"{job_id}.json").exists()


BROKEN_RAY = """
import os, sys
with open(os.environ["STARTS"], "a") as file:
    file.write("started\\n")
sys.exit("bind: address already in use")
"""


@pytest.mark.slow
def test_a_head_that_ends_while_it_starts_is_started_again_and_its_last_words_are_the_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / "packages" / "ray" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "scripts.py").write_text(BROKEN_RAY, encoding="utf-8")
    (scripts.parent / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    with pytest.raises(ClusterError, match=r"cannot be started .*: bind: address already in use") as caught:
        jobs.start_head()
    (folder,) = re.findall(r"all of it: (.*)\)", str(caught.value))
    shutil.rmtree(folder)
    assert (tmp_path / "starts").read_text(encoding="utf-8") == "started\n" * 3
    assert jobs.find_head() is None


@pytest.mark.slow
def test_a_head_that_has_ended_accepts_no_job_and_the_error_says_what_it_printed(
    cluster: str, home: Path, tmp_path: Path
) -> None:
    """The dashboard here drops the connection, as one does whose head is ending."""
    with subprocess.Popen(["true"]) as process:
        pass
    (tmp_path / "start.log").write_text("Some Ray subprocesses exited unexpectedly:\n", encoding="utf-8")
    note = home / "ray-head.json"
    note.write_text(json.dumps({"address": cluster, "pid": process.pid, "folder": str(tmp_path)}), "utf-8")
    Dashboard.accepted.clear()
    with pytest.raises(ClusterError, match="has ended: Some Ray subprocesses exited unexpectedly"):
        jobs.submit("sft", [*KEYS, f"log_path={tmp_path / 'run'}"], address=cluster, num_gpus=0, num_cpus=1)
    note.unlink()


def test_importing_the_library_does_not_import_ray() -> None:
    program = "import sys, cookbook, cookbook.jobs, cookbook.sweeps; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_missing_ray_is_an_error_that_names_its_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_package(monkeypatch, "ray")
    with pytest.raises(ConfigError, match=r"pip install 'sft-cookbook\[ray\]'"):
        jobs.submit("sft", [])


@dataclass(frozen=True)
class Cancelled:
    """A job that was cancelled while it trained, and a pending one that was cancelled too."""

    job: jobs.Job
    waiting: jobs.Job
    step: int
    """The step at which the job stopped."""


@pytest.fixture(scope="module")
def cancelled(head: jobs.RayHead, tmp_path_factory: pytest.TempPathFactory) -> Cancelled:
    folder = tmp_path_factory.mktemp("runs")
    job = jobs.submit("sft", [*KEYS, f"log_path={folder / 'run'}", "if_log_path_exists=delete"])
    waiting = jobs.submit("sft", [*KEYS, f"log_path={folder / 'waiting'}"])
    wait_until(lambda: jobs.get(job.id).status == "RUNNING", PATIENCE_SECONDS, every=0.1)
    assert jobs.get(waiting.id).status == "PENDING", "the devices are taken"
    assert jobs.cancel(waiting.id).status == "PENDING"
    with pytest.raises(ClusterError, match="is still RUNNING. Wait for it, or cancel it first"):
        jobs.retry(job.id)
    metrics = folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, PATIENCE_SECONDS)
    assert jobs.cancel(job.id).status == "STOPPED"
    last = CheckpointLog(folder / "run").last()
    assert last is not None, "it has saved"
    assert 0 < last.step < 150
    return Cancelled(job, waiting, last.step)


@pytest.mark.slow
def test_a_head_listens_only_on_loopback_and_requires_a_token(
    head: jobs.RayHead, cancelled: Cancelled, listeners: Callable[[int], dict[tuple[str, int], str]]
) -> None:
    found = listeners(head.pid)
    for part in (
        "gcs_server",
        "raylet",
        "dashboard.py",
        "DashboardAgent",
        "RuntimeEnvAgent",
        "client.server",
    ):
        assert any(part in who for who in found.values()), part
    assert {address: who for address, who in found.items() if address[0] != "127.0.0.1"} == {}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/")


@pytest.mark.slow
def test_other_users_cannot_enter_the_folder_of_a_head_or_read_its_token(head: jobs.RayHead) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (Path(head.folder), token.parent, token)]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.slow
def test_a_job_is_found_by_its_id_with_its_resolved_config(cancelled: Cancelled) -> None:
    job = jobs.get(cancelled.job.id)
    assert job.config["learning_rate"] == 4e-3
    assert [one.id for one in jobs.list()] == [cancelled.waiting.id, job.id]
    with pytest.raises(ClusterError, match=f"There is no job '{job.id}x'. Did you mean `{job.id}`"):
        jobs.get(job.id + "x")


@pytest.mark.slow
def test_a_cancelled_job_has_not_succeeded_and_logs_where_it_stopped(
    cancelled: Cancelled, capsys: pytest.CaptureFixture
) -> None:
    assert f"Stopped after step {cancelled.step} of 150" in "".join(jobs.logs(cancelled.job.id))
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["wait", cancelled.job.id])
    assert caught.value.code == 1
    jobs_recipe.main(["cancel", cancelled.job.id])
    assert "had ended already: STOPPED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_retried_job_equals_one_that_never_stopped(cancelled: Cancelled, tmp_path: Path) -> None:
    """A retry runs the recorded config in the same folder, whatever its if_log_path_exists was."""
    done = command("retry", cancelled.job.id, "--wait", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"150 steps, {cancelled.step} of them done" in done.stdout
    assert "SUCCEEDED" in done.stdout
    assert jobs.wait(cancelled.waiting.id).status == "STOPPED"
    assert not (Path(cancelled.waiting.log_path) / "config.json").exists(), "it never ran"

    # the reference: the same run in this process, never stopped
    sft.main([*KEYS, f"log_path={tmp_path / 'plain'}"])
    folder = Path(cancelled.job.log_path)
    ours = load_file(folder / "checkpoints" / "final" / "adapter_model.safetensors")
    plain = load_file(tmp_path / "plain" / "checkpoints" / "final" / "adapter_model.safetensors")
    assert ours.keys() == plain.keys()
    assert all(ours[name].equal(plain[name]) for name in plain)
    recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {**recorded, "if_log_path_exists": "delete"} == cancelled.job.config


@pytest.mark.slow
def test_a_failed_job_has_a_nonzero_exit_code(
    head: jobs.RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        jobs_recipe.main(["submit", "sft", "dataset=missing.jsonl", "log_path=bad", "--wait"])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "Dataset file missing.jsonl does not exist" in printed
    assert "FAILED" in printed
