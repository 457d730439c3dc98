"""Runs commands in separate processes, forked from one that has imported the slow modules.

`python programs.py` is that process. It reads one JSON job per line from its standard input, forks, and
writes the child's process id. After {"wait": id} it writes the child's wait status. The child sets the
working folder, the environment and the standard streams of the job, and then runs the module as `python -m`
does (or the file whose path is given in place of a module's name), to the ordinary end of an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

PRELOADED = (
    "torch",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "cookbook.clients.service",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
    "pyarrow.dataset",
    "cookbook.data",
    "cookbook.report.run_page",
    "cookbook.supervised.train",
)
FEW = PRELOADED[:4]
"""What is imported where something is called before torch."""
AFTER_THE_START = ("PYTHONPATH", "PYTHONIOENCODING")
"""The variables of an interpreter that a child of the server applies after the fork."""


class Program:
    """A command that runs or has run."""

    def __init__(self, server: _Server, pid: int, files: Sequence[Path]) -> None:
        self.pid = pid
        self._server = server
        self._out, self._err = files

    def wait(self, text: bool = True) -> subprocess.CompletedProcess[Any]:
        """Waits for the command. Returns its exit code and output, as UTF-8 text or as bytes."""
        code = os.waitstatus_to_exitcode(int(self._server.ask({"wait": self.pid})))
        printed = [path.read_text("utf-8") if text else path.read_bytes() for path in (self._out, self._err)]
        return subprocess.CompletedProcess([], code, *printed)


class Programs:
    """Starts commands, with one server for each way in which an interpreter starts (encodings, locale)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[tuple[object, ...], _Server] = {}
        self._num_jobs = 0

    def start(
        self,
        module: str,
        *argv: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        terminal: str | None = None,
        before_torch: str = "",
    ) -> Program:
        """Starts `python -m module *argv` with these variables added to this process's environment.

        If the module is `-c`, the first argument is the text of a program. `terminal` is the path of a
        terminal that the program gets as its own, instead of files. `before_torch` (module:function) is
        called in the process before it imports torch.
        """
        given = dict(environment or {})
        self._num_jobs += 1
        files = [self._folder / f"{self._num_jobs}.{stream}" for stream in ("in", "out", "err")]
        for file in files:
            file.write_bytes(stdin if file == files[0] else b"")
        job = {
            "module": module,
            "argv": argv,
            "cwd": str(cwd or Path.cwd()),
            "environment": {**os.environ, **given},
            "files": [terminal] * 3 if terminal else [str(file) for file in files],
            "is_terminal": terminal is not None,
        }
        server = self._server(given, before_torch)
        return Program(server, int(server.ask(job)), files[1:])

    def start_script(self, script: Path) -> tuple[Program, TextIO, TextIO]:
        """Starts a Python file. Returns the program, and pipes to its standard input and from its output."""
        self._num_jobs += 1
        files = [self._folder / f"{self._num_jobs}.{stream}" for stream in ("in", "out", "err")]
        for file in files[:2]:
            os.mkfifo(file)
        files[2].touch()
        job = {
            "module": str(script),
            "argv": [],
            "cwd": str(Path.cwd()),
            "environment": dict(os.environ),
            "files": [str(file) for file in files],
            "is_terminal": False,
        }
        server = self._server({})
        pid = int(server.ask(job))
        to, back = files[0].open("w", encoding="utf-8"), files[1].open(encoding="utf-8")
        return Program(server, pid, [files[2], files[2]]), to, back

    def run(
        self, module: str, *argv: str, text: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Does `start`, and waits for the end."""
        return self.start(module, *argv, **options).wait(text)

    def _server(self, given: Mapping[str, str], before_torch: str = "") -> _Server:
        environment = {
            name: given[name]
            for name in sorted(given)
            if name.startswith(("PYTHON", "LC_", "LANG")) and name not in AFTER_THE_START
        }
        key = (before_torch, *environment.items())
        if key not in self._servers:
            self._servers[key] = _Server(environment, before_torch)
        return self._servers[key]

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class _Server:
    def __init__(self, environment: Mapping[str, str], before_torch: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, before_torch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def ask(self, job: Mapping[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().decode()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# -- the process that forks ---------------------------------------------------------------------


def _lines() -> Iterator[bytes]:
    """Yields the lines of standard input without reading ahead, because a child replaces standard input."""
    line = b""
    while byte := os.read(0, 1):
        line += byte
        if byte == b"\n":
            yield line
            line = b""


def _serve() -> dict[str, Any] | None:
    """Answers requests. Returns the job in each child, and None in the server at its end."""
    for line in _lines():
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        elif (answer := os.fork()) == 0:
            return dict(request)
        os.write(1, f"{answer}\n".encode())
    return None


def _as_given(text: str) -> str:
    """Returns the text as an interpreter of this locale reads it from its command line."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _become(job: Mapping[str, Any]) -> None:
    """Sets the folder, the environment, the arguments and the streams of a job."""
    os.chdir(_as_given(job["cwd"]))
    os.environ.clear()
    os.environ.update({name: _as_given(value) for name, value in job["environment"].items()})
    if job["is_terminal"]:
        os.setsid()  # the terminal that is opened next becomes the controlling terminal of this process
    for number, (path, mode) in enumerate(
        zip(job["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)
    ):
        opened = os.open(path, os.O_RDWR if job["is_terminal"] else mode)
        os.dup2(opened, number)
        os.close(opened)
    encoding, _, errors = job["environment"].get("PYTHONIOENCODING", "").partition(":")
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        stream = open(  # noqa: SIM115
            number,
            mode,
            encoding=encoding or old.encoding,
            errors=old.errors if name == "stderr" or not encoding else errors or "strict",
            closefd=False,
            buffering=1 if name == "stderr" or job["is_terminal"] else -1,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [job["module"], *map(_as_given, job["argv"])]
    paths = job["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [job["cwd"], *(path for path in paths if path)]


if __name__ == "__main__":
    import gc
    import importlib
    import runpy

    sys.path.pop(0)  # this file's folder, which `python -m` does not add
    if sys.argv[1]:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        name, _, function = sys.argv[1].partition(":")
        getattr(importlib.import_module(name), function)()
    gc.disable()  # importing creates many objects and discards few
    for module in FEW if sys.argv[1] else PRELOADED:
        importlib.import_module(module)
    gc.enable()
    gc.freeze()  # otherwise the last collection of each child traverses all of these modules, for two seconds
    if (job := _serve()) is not None:
        if (torch := sys.modules.get("torch")) is not None:
            # A forked process makes its pool of threads anew at the first use, which two threads must not
            # be at once ("Invalid thread pool!"), such as those that load weights.
            torch.set_num_threads(torch.get_num_threads())
        _become(job)
        if job["module"] == "-c":
            exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        elif job["module"].endswith(".py"):
            sys.path.insert(0, str(Path(job["module"]).parent))
            runpy.run_path(job["module"], run_name="__main__")
        else:
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
