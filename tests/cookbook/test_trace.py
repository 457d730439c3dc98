"""Spans and the trace file."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cookbook.trace import TRACKS, Recorder, Span, TraceFile


def write(path: Path, *spans: Span) -> None:
    file = TraceFile(path)
    file.write(spans)
    file.close()


def as_a_viewer_reads(text: str) -> list[dict[str, Any]]:
    """Parses by the rules of the format: the array may be unclosed, and an incomplete event is dropped."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            events: list[dict[str, Any]] = json.loads("\n".join(lines[:end]).rstrip().removesuffix("]") + "]")
        except ValueError:
            continue
        return [event for event in events if event["ph"] == "X"]
    return []


def test_a_span_is_an_event_with_times_thread_and_step(tmp_path: Path) -> None:
    now, of_day = time.perf_counter(), time.time()
    write(tmp_path / "trace.json", Span("engine", "save", now, now + 0.25, 3), Span("loop", "log", now, now))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(named.values()) == set(TRACKS.values())
    save, log = (event for event in events if event["ph"] == "X")
    assert (save["name"], named[save["tid"]], save["args"], save["dur"]) == (
        "save", "engine thread", {"step": 3}, 250_000,
    )  # fmt: skip
    assert save["ts"] == pytest.approx(of_day * 1e6, abs=60e6)
    assert (log["name"], named[log["tid"]], "args" in log) == ("log", "loop", False)


def test_adjacent_spans_do_not_overlap_in_the_file(tmp_path: Path) -> None:
    times = [time.perf_counter() + i / 3e6 for i in range(50)]
    write(
        tmp_path / "trace.json",
        *(Span("engine", "x", a, b) for a, b in itertools.pairwise(times)),
    )
    events = as_a_viewer_reads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    for one, other in itertools.pairwise(events):
        assert one["ts"] + one["dur"] <= other["ts"]


@pytest.mark.slow
def test_a_trace_file_cut_at_any_byte_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write(path, *(Span("engine", f"job {i}", i, i + 1, i) for i in range(3)))
    whole = path.read_bytes()
    all_names = [event["name"] for event in as_a_viewer_reads(whole.decode())]
    assert all_names == ["job 0", "job 1", "job 2"]
    for length in range(len(whole) + 1):
        names = [event["name"] for event in as_a_viewer_reads(whole[:length].decode())]
        assert names == all_names[: len(names)]
        path.write_bytes(whole[:length])
        write(path, Span("engine", "resumed", 5, 6, 5))
        events = [
            event["name"] for event in json.loads(path.read_text(encoding="utf-8")) if event["ph"] == "X"
        ]
        assert events[-1] == "resumed"
        assert events[:-1] == all_names[: len(events) - 1]
        assert len(events) - 1 >= len(names) - 1, "a whole line is not lost"


def test_spans_up_to_a_step_are_taken_once() -> None:
    recorder = Recorder()
    for step in (0, 1, 2):
        with recorder.at_step(step), recorder.span("engine", "save"):
            pass
    recorder.add("engine", "load", 0.0, 1.0, None)
    assert [span.step for span in recorder.take(1)] == [0, 1, None]
    assert [span.step for span in recorder.take(1)] == []
    assert [span.step for span in recorder.take()] == [2]


def test_device_times_are_read_only_after_their_step_has_finished() -> None:
    recorder, asked = Recorder(), []

    def at(seconds: float) -> float:
        asked.append(seconds)
        return seconds

    recorder.add_later("device", "forward_backward", lambda: at(1.0), lambda: at(3.0), 4)
    assert recorder.take(3) == []
    assert asked == []
    assert recorder.take(4) == [Span("device", "forward_backward", 1.0, 3.0, 4)]
    assert asked == [1.0, 3.0]


def test_any_thread_may_add_spans_while_another_takes_them() -> None:
    recorder, taken = Recorder(), []

    def add() -> None:
        for step in range(2000):
            recorder.add("engine", "x", 0.0, 1.0, step)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += recorder.take(1000)
    taken += recorder.take()
    assert sorted(span.step for span in taken if span.step is not None) == sorted([*range(2000)] * 3)
