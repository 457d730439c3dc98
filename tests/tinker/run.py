"""Runs the programs of tinker-cookbook to their ends, and says which do and what their first steps computed.

    .venv-tinker/bin/python tests/tinker/run.py [name ... | quick] [workers=1]

Each program runs in a process of its own, with this project under the name `tinker`: a copy of this process,
which has imported the large packages, so that they are not imported for each program.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
ROOT = Path(__file__).parents[2]

import world  # noqa: E402
from programs import NLL_KEYS, PROGRAMS, Program  # noqa: E402

import cookbook  # noqa: E402

SECONDS = 900


@dataclass(frozen=True)
class Outcome:
    program: Program
    error: str
    """Empty for a program that ran to its end."""
    seconds: float
    first_step: float | None
    """What the first step computed, or None for a program without metrics."""


Launcher = Callable[[Sequence[str]], list[str]]
"""Returns the command line for a module or script with its arguments."""

_IMPORTED_ONCE = (
    "datasets",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "tinker_cookbook.preference.train_dpo",
    "tinker_cookbook.rl.train",
    "tinker_cookbook.supervised.train",
)


def in_process(command: Sequence[str], folder: Path, variables: Mapping[str, str], printed: IO[str]) -> int:
    """Does `python -m recipes.tinker` in a copy of this process, which has imported the large packages.

    Returns the exit status, or -1 after SECONDS.
    """
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    cookbook.install_as_tinker()
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            os.chdir(folder)
            os.environ.update(variables)
            importlib.import_module("recipes.tinker").main(command)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _command(command: Sequence[str], folder: Path, variables: Mapping[str, str], printed: IO[str]) -> int:
    """Runs a command. Returns its exit status, or -1 after SECONDS."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL, stdout=printed,
            stderr=subprocess.STDOUT, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def run(program: Program, folder: Path, launcher: Launcher | None, variables: Mapping[str, str]) -> Outcome:
    """Runs a program in a folder of `world.make`, in a copy of this process if there is no launcher."""
    log = folder / "logs" / program.name.replace(" ", "_").replace("=", "_")
    start = time.monotonic()
    error = ""
    for number, command in enumerate(program.commands):
        if program.resumes and number:
            _stop_before_last_step(log)
        filled = [argument.replace("{log}", str(log)) for argument in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.with_suffix(f".{number}.txt")
        with output.open("w", encoding="utf-8") as printed:
            if launcher is None:
                code = in_process(filled, folder, variables, printed)
            else:
                code = _command(launcher(filled), folder, variables, printed)
        if code:
            lines = [line for line in output.read_text(encoding="utf-8").splitlines() if line.strip()]
            error = f"exit {code}: {lines[-1] if lines else ''}"
            break
    seconds = time.monotonic() - start
    first_step = None
    if not error and program.has_metrics:
        first_step = _first_step(log / "metrics.jsonl")
        if program.resumes and not error:
            error = _check_resumed(log / "metrics.jsonl")
    return Outcome(program, error, seconds, first_step)


def _stop_before_last_step(log: Path) -> None:
    """Removes the record of the final checkpoint, as if the run had been stopped before it."""
    path = log / "checkpoints.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["name"] != "final"]
    assert kept, f"{path} has no checkpoint besides the final one"
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _check_resumed(metrics: Path) -> str:
    """Returns an error unless the steps that two commands logged are the same where both logged them."""
    seen: dict[int, float] = {}
    for row in _rows(metrics):
        value = _value(row)
        if value is None:
            continue
        earlier = seen.setdefault(row["step"], value)
        if not math.isclose(earlier, value, rel_tol=1e-6):
            return f"step {row['step']} computed {earlier}, and {value} after it was resumed"
    return "" if max(seen) >= 2 else "the resumed command took no step"


def _rows(metrics: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _value(row: Mapping[str, float]) -> float | None:
    return next((row[key] for key in NLL_KEYS if key in row), None)


def _first_step(metrics: Path) -> float | None:
    return next((value for row in _rows(metrics) if (value := _value(row)) is not None), None)


def _are_close(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-6)


def differing(outcomes: Sequence[Outcome], others: Sequence[Outcome] = ()) -> list[str]:
    """Returns a line for each program whose first step is not that of the program it should equal.

    `others` are the outcomes of the same programs over another way. They may differ by rounding: a server
    scores prompts with weights packed for lone replies, whose products round in another order.
    """
    first = {one.program.name: one.first_step for one in outcomes}
    pairs = [(one, one.program.equals) for one in outcomes if one.program.equals in first]
    lines = [
        f"{one.program.name}: its first step computed {one.first_step}, and {first[other]} as {other}"
        for one, other in pairs
        if other is not None and one.first_step != first[other]
    ]
    lines += [
        f"{one.program.name}: its first step computed {one.first_step}, and {first[one.program.name]}"
        for one in others
        if one.program.name in first and not _are_close(one.first_step, first[one.program.name])
    ]
    return lines


def run_all(
    programs: Sequence[Program],
    folder: Path,
    launcher: Launcher | None = None,
    variables: Mapping[str, str] | None = None,
    workers: int = 1,
) -> list[Outcome]:
    variables = variables or environment(folder)
    if launcher is None:
        os.environ.update(variables)  # before the packages are imported that read them

    def one(program: Program) -> Outcome:
        outcome = run(program, folder, launcher, variables)
        first = "" if outcome.first_step is None else f", first step {outcome.first_step:.9g}"
        ended = outcome.error or f"ran to its end{first}"
        print(f"{program.name:32s} {outcome.seconds:6.1f} s  {ended}", flush=True)
        return outcome

    with ThreadPoolExecutor(workers) as pool:
        return [*pool.map(one, programs)]


def main(argv: Sequence[str]) -> int:
    names = [name for name in argv if not name.startswith("workers=")]
    if names == ["quick"]:
        names = [program.name for program in PROGRAMS if program.is_quick]
    workers = next((int(one.partition("=")[2]) for one in argv if one.startswith("workers=")), 1)
    unknown = set(names) - {program.name for program in PROGRAMS}
    if unknown:
        print(
            f"Unknown: {', '.join(sorted(unknown))}. There are:", *(one.name for one in PROGRAMS), sep="\n  "
        )
        return 2
    programs = [program for program in PROGRAMS if not names or program.name in names]
    folder = Path(tempfile.mkdtemp(prefix="tinker-programs-"))
    outcomes = run_all(programs, world.make(folder), workers=workers)
    failed = [one for one in outcomes if one.error]
    different = differing(outcomes)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} programs ran to their ends.")
    print(*different, sep="\n")
    if failed or different:
        print(f"What they printed is in {folder / 'logs'}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
