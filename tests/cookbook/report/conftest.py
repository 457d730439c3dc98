"""Synthetic runs, of which every point is known, and a headless Chromium to view pages.

Chromium is controlled through a pipe, without a driver or a socket.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One tab. It keeps the errors and network requests since `open`."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, writer: int) -> None:
        self._process = process
        self._reader, self._writer = reader, writer
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path | str, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.errors, self.requests, self._is_loaded = [], [], False
        self.call("Page.navigate", url=path if isinstance(path, str) else path.absolute().as_uri())
        while not self._is_loaded:
            self._next()
        # Wait two frames, until the page is laid out and drawn.
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def evaluate(self, script: str) -> Any:
        """Returns the value of a script as JSON."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, held: bool = False, clicks: int = 1) -> None:
        """Sends a mouse event. `kind` is mouseMoved, mousePressed or mouseReleased."""
        button = "none" if kind == "mouseMoved" and not held else "left"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            buttons=int(held),
            clickCount=clicks,
        )

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path: Path) -> None:
        """Saves a picture of the complete page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = os.read(self._reader, 1 << 20)
            assert read, "Chromium ended."
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message.get("method"):
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            case "Log.entryAdded":
                self.errors.append(message["params"]["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        return message


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a Chromium with a new profile, and ends it."""
    assert CHROMIUM is not None
    to_browser, from_us = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
    to_us, from_browser = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())

    def at_the_ends_it_expects() -> None:
        os.dup2(to_browser, 3)
        os.dup2(from_browser, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=at_the_ends_it_expects,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            browser = Browser(process, to_us, from_us)
            yield browser
            os.write(from_us, b'{"id": 0, "method": "Browser.close"}\0')
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            os.close(to_us)
            os.close(from_us)


# -- runs -----------------------------------------------------------------------------------------

HOSTILE = "</script><script>window.forged = 1</script><img src=x onerror='window.forged = 2'>&amp;"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium to open the page; install it, for example with: apt-get install chromium")
    with chromium() as found:
        yield found


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", num_steps: int = 200, **settings: Any) -> Path:
        return write_run(tmp_path / name, num_steps, **settings)

    return make


def write_run(folder: Path, num_steps: int, quality: float = 1.0, **settings: Any) -> Path:
    """Writes a finished run of `num_steps` steps, with an evaluation and two samples every 50 steps."""
    folder.mkdir(parents=True)
    config = {
        "_type": "cookbook.supervised.train:Config", "log_path": str(folder),
        "model_name": "cookbook/tiny-chat", "learning_rate": 0.004, "lora_rank": 32, "num_epochs": 1,
        **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "data.json").write_text(json.dumps({"fingerprint": "f", "sources": [SOURCE]}), encoding="utf-8")
    rng = np.random.default_rng(0)
    rows, tables = [], []
    for step in range(num_steps + 1):
        row: dict[str, Any] = {"step": step}
        if step % 50 == 0 or step == num_steps:
            row |= {
                "test/nll": 2 / quality / (1 + step / 20) + 0.3,
                "test/exact_match": step / (num_steps + 1),
            }
            row |= {f"test/turn_{turn}/nll": 1 / turn + 1 / (1 + step) for turn in (1, 2)}
            for prompt in ("Who are you?", HOSTILE):
                tables.append(
                    {
                        "step": step,
                        "table": "samples",
                        "row": {"prompt": prompt, "reply": f"{step} {HOSTILE}"},
                    }
                )
        if step < num_steps:
            row |= {
                "epoch": 0, "train/nll": 2 / (1 + step / 20) + 0.3 + 0.1 * rng.random(),
                "optim/learning_rate": 0.004 * (1 - step / num_steps), "optim/grad_norm": 1 + rng.random(),
                "data/tokens": 400, "data/trained_tokens": 180, "perf/seconds": 0.1 + (step == 0) * 2,
                "perf/seconds_waited_for_batch": 0.02, "perf/seconds_forward_backward": 0.06,
                "perf/seconds_optim_step": 0.01, "perf/seconds_idle": 0.03 + (step == 0) * 2,
                "perf/seconds_left": 1.0, "perf/tokens_per_second": 4000 + 100 * rng.random(),
            }  # fmt: skip
        rows.append(row)
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "tables.jsonl", tables)
    (folder / "checkpoints" / "final").mkdir(parents=True)
    checkpoints = [
        {"name": "000100", "path": "checkpoints/000100", "step": 100, "epoch": 0, "batch": 100},
        {"name": "final", "path": "checkpoints/final", "step": num_steps, "epoch": 1, "batch": 0,
         "metric": "test/nll", "value": 0.4},
    ]  # fmt: skip
    write_lines(folder / "checkpoints.jsonl", checkpoints)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SOURCE = {
    "name": "chats.jsonl", "max_length": 64, "rows": 1_000, "bad": 2, "filtered": 0, "examples": 900,
    "tokens": 52_000, "trained_tokens": 20_800, "longest": 1_392, "truncated": 757, "too_long": 0,
    "untrained": 98, "bad_rows": [{"place": "chats.jsonl:7", "reason": "no assistant message <b>"}],
    "length_histogram": {"edges": [3, 7, 11, 15], "counts": [100, 700, 100]},
    "notes": [{"noun": "row", "what": "Columns not read", "item": "<id>", "count": 1_000}],
}  # fmt: skip
