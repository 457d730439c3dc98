"""Runs everything that needs a GPU, in ten minutes at most: `make gpu`.

    python -m benchmarks.gpu [--folder runs/gpu] [--minutes 10] [--only NAME ...]

The parts run one after another, each in a process of its own and within its own time. A part that fails or
runs out of time does not stop the next. What a part prints goes to a file of its own while it runs, and its
outcome, with every line of JSON that it printed, to `results.jsonl` as soon as it ends. `summary.txt` has all
of it in words. The exit code is 0 if no part failed, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """A command with its time limit."""

    name: str
    command: tuple[str, ...]
    seconds: float
    why_not: Callable[[], str | None] = lambda: None
    """Returns why the part cannot run on this machine, or None."""


def parts() -> list[Part]:
    """Returns the parts in their order: whether it is right, what it costs, what several GPUs add."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=100")
    tests = "tests/cookbook/engine/test_cuda.py"
    step = (python, "-m", "benchmarks.gpu_step", "--json", "--real", "--trl-if-installed", "--steps", "10")
    return [
        Part("tests", (*pytest, tests, "-k", "not resume and not two_devices"), 120),
        Part("expectations", (python, "-m", "benchmarks.gpu_expectations"), 60),
        *(
            Part(f"speed of {size}", (*step, "--models", size), seconds)
            for size, seconds in (("0.6B", 60), ("1.7B", 60), ("4B", 80), ("8B", 110))
        ),
        Part("sampling", (python, "-m", "benchmarks.gpu_sampling"), 60),
        Part("resume", (*pytest, tests, "-k", "resume"), 60),
        Part("two processes", (*pytest, tests, "-k", "two_devices"), 60, _why_not_two_devices),
    ]


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why_not_two_devices() -> str | None:
    return None if _num_devices() >= 2 else "needs two CUDA devices"


def run_all(chosen: Sequence[Part], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs the parts within so many seconds altogether. Returns and writes the outcome of each."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = []
    with (
        (folder / "results.jsonl").open("w", encoding="utf-8") as results,
        (folder / "summary.txt").open("w", encoding="utf-8") as summary,
    ):
        for number, part in enumerate(chosen, 1):
            left = deadline - time.monotonic()
            reason = part.why_not() if left > 0 else "no time was left"
            if reason is not None:
                outcome = {"part": part.name, "status": "skipped", "reason": reason}
            else:
                file = folder / f"{number}-{part.name.replace(' ', '-')}.txt"
                outcome = run(part, file, min(part.seconds, left))
            outcomes.append(outcome)
            results.write(json.dumps(outcome) + "\n")
            results.flush()
            summary.write(in_words(outcome))
            summary.flush()
            print(in_words(outcome), end="", flush=True)
    return outcomes


def run(part: Part, file: Path, seconds: float) -> dict[str, Any]:
    """Runs a part. Its output goes to `file`. Returns its outcome."""
    began = time.monotonic()
    with file.open("wb") as out:
        process = subprocess.Popen(
            part.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a part that is out of time ends with all processes that it started
        )
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    text = file.read_text(encoding="utf-8", errors="replace")
    outcome: dict[str, Any] = {
        "part": part.name,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "results": _json_lines(text),
    }
    if status != "passed":
        outcome |= {"exit_code": code, "last_lines": text.splitlines()[-8:]}
    return outcome


def _json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def in_words(outcome: dict[str, Any]) -> str:
    """Returns the outcome of a part as text that ends with a newline."""
    first = f"{outcome['part']}: {outcome['status']}"
    first += f" ({outcome['reason']})" if "reason" in outcome else f" in {outcome['seconds']:g} s"
    lines = [first]
    for result in outcome.get("results", []):
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in result.items()))
    lines += [f"  | {line}" for line in outcome.get("last_lines", [])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="*", choices=[part.name for part in parts()], metavar="NAME")
    arguments = parser.parse_args(argv)
    if not _num_devices():
        print(
            "There is no CUDA device here: torch finds none. `make gpu` measures this project on a GPU; what "
            "is known without one is in docs/rehearsal.md, and `make roofline` derives it again.",
            file=sys.stderr,
        )
        return 2
    chosen = [part for part in parts() if not arguments.only or part.name in arguments.only]
    outcomes = run_all(chosen, arguments.folder, 60 * arguments.minutes)
    print(f"Written to {arguments.folder}.")
    return int(any(outcome["status"] not in ("passed", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
