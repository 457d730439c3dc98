"""Tests that damaged folders from elsewhere are either used, or refused by a line that says why.

A run, a sweep, an adapter, a merged model or the cache is damaged in one to three places (`damage.py`), and
then a command reads it. The command must keep within limits of time and memory, obey nothing in the folder,
and change nothing outside the folders that it owns.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pty
import re
import resource
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import Damage
from fuzzing import Hang, check_each, seeds, within

from cookbook import errors, models
from cookbook.config import cli
from cookbook.report import compare
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.sweeps import Plan, make_plan, run_sweep
from cookbook.sweeps.plan import PlannedRun
from cookbook.sweeps.run_process import Progress, RunProcess
from cookbook.utils import jsonl

WALL_SECONDS = 100.0
"""The wall-clock time of one command. It may use a tenth of this as processor time."""
MAX_GROWTH = 2**30
MAX_ALLOCATED = 3 * 2**30
"""The bytes of memory that one command may add to this process, both held at once and requested."""
KEPT = "notes.txt"
"""The user's own files in folders that commands own."""
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
REFUSALS = tuple(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
)
REFUSAL = re.compile(rf"^({'|'.join(REFUSALS)}): ", re.MULTILINE)
SIZES = ("test_size=2", "batch_size=2", "lora_rank=4", "eval_every=1", "save_every=1", "seed=1")


# -- the damaged folders ----------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A folder with everything that the commands read, damaged, and the undamaged original."""

    base: Path

    @property
    def work(self) -> Path:
        return self.base / "work"

    def __getattr__(self, name: str) -> Path:
        return self.work / name

    def argv(self, *argv: str, rank: str = "lora_rank=4") -> list[str]:
        sizes = [size for size in SIZES if not size.startswith("lora_rank")]
        return [f"model_name={self.model}", f"dataset={self.rows}.jsonl", *sizes, rank, *argv]

    def restore(self) -> None:
        models.get_tokenizer.cache_clear()  # as in a new process
        if self.work.exists():
            shutil.rmtree(self.work)
        shutil.copytree(self.base / "pristine", self.work, symlinks=True)


@pytest.fixture(scope="module")
def world(make_model_folder: Any) -> Iterator[World]:
    in_memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # thousands of copies of a hundred files
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=in_memory) as base:
        world = World(Path(base).resolve())
        (world.base / "cwd").mkdir()
        world.work.mkdir()
        patch.chdir(world.base / "cwd")
        patch.setenv("COOKBOOK_CACHE", str(world.cache))
        patch.setenv("COOKBOOK_HOME", str(world.home))
        patch.setenv("COLUMNS", "100")
        make_model_folder(world.model)
        _fill(world)
        world.work.rename(world.base / "pristine")
        yield world


def _fill(world: World) -> None:
    reply = {"role": "assistant", "content": "two"}
    chats = [[{"role": "user", "content": f"one {number}"}, reply] for number in range(10)]
    rows = world.work / "rows.jsonl"
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    rows.write_text("".join(lines), encoding="utf-8")
    os.utime(rows, (1_700_000_000,) * 2)  # old enough for its digest to be recorded
    checked(lambda: _recipe("sft", *world.argv(f"log_path={world.run}", "max_steps=2")))
    checked(lambda: _recipe("sft", *world.argv(f"log_path={world.run}", "max_steps=3")))
    checked(lambda: _recipe("sft", *world.argv(f"log_path={world.full}", "max_steps=1", rank="lora_rank=0")))
    shutil.copytree(world.run, world.other)
    checked(lambda: _recipe("export", f"checkpoint={world.run}", f"to={world.adapter}"))
    checked(lambda: _recipe("export", f"checkpoint={world.run}", f"to={world.merged}", "format=merged"))
    checked(lambda: _sweep(world))
    world.home.mkdir()
    head = {"address": "http://127.0.0.1:9", "pid": 2**22 + 1, "folder": str(world.outside)}
    (world.home / "ray-head.json").write_text(json.dumps(head), encoding="utf-8")
    world.outside.mkdir()
    (world.outside / "dear.txt").write_text("dear to its user\n", encoding="utf-8")
    shutil.copytree(world.run / "checkpoints" / "final", world.outside / "checkpoint")
    shutil.copytree(world.run, world.outside / "run")
    for folder in (world.run, world.run / "checkpoints" / "mine", world.sweep, world.cache / "rendered"):
        folder.mkdir(exist_ok=True)
        (folder / KEPT).write_text("mine\n", encoding="utf-8")


# -- the commands ---------------------------------------------------------------------------------


def _recipe(name: str, *argv: str, asked: str = "") -> None:
    before, sys.stdin = sys.stdin, io.StringIO(asked)
    try:
        importlib.import_module(f"recipes.{name}").main(list(argv))
    finally:
        sys.stdin = before


def _sweep(world: World) -> None:
    """Runs a sweep of three runs without starting processes: one finishes, one is stopped, one fails."""
    with cli.exiting_on_errors():
        plan = make_plan(world.argv(f"log_path={world.sweep}", "learning_rate=0.01,0.02,0.03", "max_steps=5"))
        run_sweep(plan, _run_or_watch, write_page=compare)


def _run_or_watch(
    plan: Plan,
    runs: Sequence[PlannedRun],
    over: Sequence[PlannedRun],
    on_end: Callable[[PlannedRun, Progress], None],
) -> bool:
    states = dict(zip([run.name for run in plan.runs], ("finished", "stopped", "failed"), strict=True))
    for run in (*over, *runs):
        state = states[run.name] if run in runs and not (run.folder / "metrics.jsonl").exists() else "failed"
        if state != "failed":
            jsonl.append(run.folder / "metrics.jsonl", {"step": 5, plan.config.metric: 1.0})
        if state == "finished":
            checkpoint = run.folder / "checkpoints" / "final"
            checkpoint.mkdir(parents=True, exist_ok=True)  # a run replaces an existing checkpoint
            (checkpoint / "state.json").write_text("{}", encoding="utf-8")
            CheckpointLog(run.folder).add("final", str(checkpoint), 5, 0, 5)
        watched = RunProcess("recipes.sft", run.folder, plan.config.metric, os.getcwd(), is_over=True)
        progress = watched.next_progress(0)
        watched.stop()
        if run in runs:
            error = "TrainingError: [/INST] \x1b]0;owned\x07" if state == "failed" else ""
            on_end(run, Progress(state, progress.step, progress.value, error))  # type: ignore[arg-type]
    return True


@dataclass(frozen=True)
class Command:
    """A command that reads a folder, which folder is damaged, and what it may change in `World.work`."""

    name: str
    damaged: str
    run: Callable[[World], None]
    owned: Sequence[str] = ()
    share: int = 10
    may_remove_kept: bool = False


def _export(world: World, checkpoint: str, form: str) -> None:
    base = [f"base_model={world.model}"] if checkpoint == "adapter" else []
    _recipe("export", f"checkpoint={world.work / checkpoint}", f"to={world.out}", f"format={form}", *base)


def _chat(world: World, checkpoint: str) -> None:
    base = [f"model_name={world.model}"] if checkpoint == "adapter" else []
    argv = [f"checkpoint={world.work / checkpoint}", "max_tokens=2", "temperature=0", *base]
    _recipe("chat", *argv, asked="one\n")


def _train(world: World, folder: str, *argv: str, rank: str = "lora_rank=4") -> None:
    _recipe("sft", *world.argv(f"log_path={world.work / folder}", *argv, rank=rank))


LONGER = ("max_steps=4", "keep_checkpoints=1", "early_stopping_patience=50")
COMMANDS = (
    Command("resume", "run", lambda w: _train(w, "run", *LONGER), ("run", "cache"), 25),
    Command("look at a finished run", "run", lambda w: _train(w, "run", "max_steps=3"), ("run", "cache"), 15),
    Command(
        *("start over", "run", lambda w: _train(w, "run", "max_steps=1", "if_log_path_exists=delete")),
        *(("run", "cache"), 4, True),
    ),
    Command(
        "resume all weights",
        "full",
        lambda w: _train(w, "full", "max_steps=2", rank="lora_rank=0"),
        ("full", "cache"),
        6,
    ),
    Command(
        *("start from an adapter", "adapter"),
        lambda w: _train(w, "new", "max_steps=1", f"load_checkpoint_path={w.adapter}"),
        *(("new", "cache"), 8),
    ),
    Command(
        *("start from a checkpoint", "run"),
        lambda w: _train(w, "new", "max_steps=1", f"load_checkpoint_path={w.run}/checkpoints/final"),
        *(("new", "cache"), 4),
    ),
    Command(
        "report", "run", lambda w: _recipe("report", str(w.run)), ("run/report.html", "run/curves.png"), 40
    ),
    Command(
        "report of a sweep's run",
        "sweep",
        lambda w: _recipe("report", f"{w.sweep}/learning_rate=0.01"),
        ("sweep/learning_rate=0.01",),
        8,
    ),
    Command(
        "compare", "run", lambda w: _recipe("report", str(w.run), str(w.other), f"to={w.page}"), ("page",), 25
    ),
    Command("export an adapter", "run", lambda w: _export(w, "run", "adapter"), ("out",), 25),
    Command("export a plain adapter", "adapter", lambda w: _export(w, "adapter", "adapter"), ("out",), 15),
    Command("export an adapter merged", "adapter", lambda w: _export(w, "adapter", "merged"), ("out",), 15),
    Command("export merged", "run", lambda w: _export(w, "run", "merged"), ("out",), 15),
    Command("export all weights", "full", lambda w: _export(w, "full", "merged"), ("out",), 8),
    Command("export gguf", "run", lambda w: _export(w, "run", "gguf"), ("out",), 8),
    Command("export to ollama", "adapter", lambda w: _export(w, "adapter", "ollama"), ("out",), 8),
    Command(
        *("export over an export", "adapter"),
        lambda w: _recipe("export", f"checkpoint={w.run}", f"to={w.adapter}", "overwrite=True"),
        *(("adapter",), 10),
    ),
    Command("chat", "run", lambda w: _chat(w, "run"), share=20),
    Command("chat with an adapter", "adapter", lambda w: _chat(w, "adapter"), share=20),
    Command("chat with a merged model", "merged", lambda w: _chat(w, "merged"), share=12),
    Command("chat with all weights", "full", lambda w: _chat(w, "full"), share=8),
    Command(
        "preview",
        "cache",
        lambda w: _recipe("preview", *w.argv(f"html={w.page}", "num_examples=2")),
        ("page", "cache"),
        25,
    ),
    Command("train from the cache", "cache", lambda w: _train(w, "new", "max_steps=1"), ("new", "cache"), 8),
    Command("sweep", "sweep", _sweep, ("sweep", "cache"), 30),
    Command("jobs", "home", lambda w: _recipe("jobs", "list"), share=5),
)


# -- the checks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    code: Any
    out: str
    err: str

    def check(self) -> None:
        said = self.out + self.err
        assert "Traceback" not in said, said[-3000:]
        assert (unseen := UNSEEN.search(said)) is None, f"{unseen!r} in {said[-2000:]!a}"
        if self.code not in (None, 0):
            assert self.code == 1, f"exit code {self.code}"
            assert REFUSAL.search(self.err), f"no error of this project: {self.err!r}"


def outcome_of(run: Callable[[], None]) -> Outcome:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in "oe")
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
        out.flush()
        err.flush()
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def checked(run: Callable[[], None]) -> None:
    outcome = outcome_of(run)
    outcome.check()
    assert outcome.code in (None, 0), outcome.err


def watched_of(world: World, command: Command) -> dict[str, Any]:
    """Returns everything that the command may not change: paths, identities of files, and content."""
    owned = [world.work / name for name in command.owned]
    found: dict[str, Any] = {}
    for folder, names, files in os.walk(world.base):
        here = Path(folder)
        for path in [here, *(here / name for name in (*names, *files))]:
            is_owned = any(path == one or one in path.parents for one in owned)
            if is_owned and (path.name != KEPT or command.may_remove_kept):
                continue
            status = path.lstat()
            what: Any = [status.st_mode, status.st_ino]
            if not stat.S_ISDIR(status.st_mode) or not any(path in one.parents for one in owned):
                what += [status.st_size, status.st_mtime_ns]
            if path.is_symlink():
                what.append(os.readlink(path))
            elif stat.S_ISREG(status.st_mode) and status.st_size < 2**20 and world.work in path.parents:
                what.append(hashlib.sha256(path.read_bytes()).hexdigest())
            found[str(path.relative_to(world.base))] = what
    return found


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Fails if the body holds more memory than allowed. A request for far more memory raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allocated = int(re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0])
    resource.setrlimit(resource.RLIMIT_DATA, (allocated * 1024 + MAX_ALLOCATED, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    assert grown < MAX_GROWTH, f"{grown / 2**20:.0f} MiB more are held"


def damaged(world: World, seed: int) -> tuple[Command, Damage]:
    """Returns a command drawn by a seed, and damages what it reads."""
    world.restore()
    damage = Damage(seed, Path(), world.outside)
    command = damage.rng.choices(COMMANDS, [command.share for command in COMMANDS])[0]
    damage.folder = world.work / command.damaged
    damage.apply()
    return command, damage


def check_folder(world: World, seed: int) -> None:
    command, damage = damaged(world, seed)
    try:
        before = watched_of(world, command)
        with within(WALL_SECONDS), limited_memory():
            outcome = outcome_of(lambda: command.run(world))
        after = watched_of(world, command)
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        assert not changed, f"changed: {changed}"
        outcome.check()
    except AssertionError as error:
        raise AssertionError(f"{command.name}: {damage.done}: {error}") from error


NUM_FOLDERS, SLICE = 3_000, 250


@pytest.mark.slow
def test_every_command_reads_undamaged_folders(world: World) -> None:
    for command in COMMANDS:
        world.restore()
        before = watched_of(world, command)
        outcome = outcome_of(lambda command=command: command.run(world))  # type: ignore[misc]
        outcome.check()
        assert outcome.code == (1 if command.name == "jobs" else None), (command.name, outcome.err)
        assert watched_of(world, command) == before, command.name


@pytest.mark.slow
def test_a_few_damaged_folders_are_used_or_refused(world: World) -> None:
    check_each(lambda seed: check_folder(world, seed), seeds(0, 8))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_FOLDERS, SLICE))
def test_damaged_folders_are_used_or_refused(world: World, first: int) -> None:
    check_each(lambda seed: check_folder(world, seed), seeds(first, SLICE))


# -- pipes ----------------------------------------------------------------------------------------


def _with_data(world: World) -> None:
    """Creates a published data set in each layout that is read from a folder."""
    import datasets

    rows = [{"prompt": f"{number}?", "completion": "yes"} for number in range(8)]
    hub = world.work / "hub"
    (hub / "data").mkdir(parents=True)
    files_of = "  data_files:\n  - split: train\n    path: data/*.parquet\n"
    card = f"---\nconfigs:\n- config_name: default\n{files_of}---\n"
    (hub / "README.md").write_text(card, encoding="utf-8")
    (hub / "dataset_infos.json").write_text("{}", encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(hub / "data" / "train-0.parquet")
    both = datasets.Dataset.from_list(rows).train_test_split(4, seed=0)
    both.save_to_disk(world.work / "saved")
    both["train"].save_to_disk(world.work / "split")
    lines = world.work / "lines"
    lines.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (lines / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _train_on(world: World, data: str) -> None:
    argv = [
        argument for argument in world.argv(f"log_path={world.new}") if not argument.startswith("dataset=")
    ]
    _recipe("sft", *argv, f"dataset={world.work / data}", "max_steps=1")


PIPED = (
    *COMMANDS,
    *(
        Command(f"train on {data}", data, lambda w, data=data: _train_on(w, data), ("new", "cache"))  # type: ignore[misc]
        for data in ("hub", "saved", "split", "lines")
    ),
    Command("train a model", "model", lambda w: _train(w, "new", "max_steps=1"), ("new", "cache")),
    Command("resume with a model", "model", lambda w: _train(w, "run", *LONGER), ("run", "cache")),
    Command("chat on a model", "model", lambda w: _chat(w, "adapter")),
    Command("merge into a model", "model", lambda w: _export(w, "adapter", "merged"), ("out",)),
)


def check_pipe(world: World, command: Command, name: str) -> None:
    """Checks that no command waits for a pipe in place of a file."""
    world.restore()
    _with_data(world)
    path = world.work / command.damaged / name
    path.unlink()
    os.mkfifo(path)
    try:
        with within(WALL_SECONDS / 5):
            outcome = outcome_of(lambda: command.run(world))
        outcome.check()
    except (AssertionError, Hang) as error:
        raise AssertionError(f"{command.name}: {name} is a pipe: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("command", PIPED, ids=lambda command: command.name)
def test_no_command_waits_for_a_pipe(world: World, command: Command) -> None:
    world.restore()
    _with_data(world)
    folder = world.work / command.damaged
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names
    failures = []
    for name in names:
        try:
            check_pipe(world, command, name)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


# -- in a terminal --------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_folders import COMMANDS, World
next(one for one in COMMANDS if one.name == sys.argv[4]).run(World(Path(sys.argv[3])))
"""
OURS = re.compile(r"\r?\x1b\[([0-9;]*m|2K|[0-9]+A|\?25[lh])")
"""Colours, and the sequences with which Rich redraws lines of progress."""
IN_A_TERMINAL = 16


def in_a_terminal(world: World, command: Command) -> Outcome:
    """Returns what a command prints to a terminal, run in a process of its own."""
    here = Path(__file__).parent
    argv = [sys.executable, "-c", PROGRAM, str(here), str(here.parents[1]), str(world.base), command.name]
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=its_end, stderr=its_end, start_new_session=True
    )
    os.close(its_end)
    printed, deadline = b"", time.monotonic() + WALL_SECONDS
    while True:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no end after {WALL_SECONDS:g} seconds: {printed!r}")
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            read = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        printed += read
        if not read:
            break
    os.close(terminal)
    text = OURS.sub("", printed.decode().replace("\r\n", "\n"))
    return Outcome(process.wait(), "", text)


def check_in_a_terminal(world: World, seed: int) -> None:
    command, damage = damaged(world, seed)
    before = watched_of(world, command)
    outcome = in_a_terminal(world, command)
    assert watched_of(world, command) == before, (command.name, damage.done)
    try:
        outcome.check()
    except AssertionError as error:
        raise AssertionError(f"{command.name}: {damage.done}: {error}") from error


@pytest.mark.slow
def test_damaged_folders_are_used_or_refused_in_a_terminal(world: World) -> None:
    check_each(lambda seed: check_in_a_terminal(world, seed), seeds(NUM_FOLDERS, IN_A_TERMINAL))
