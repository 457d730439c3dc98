"""Several processes give the same results as one, in order, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice

import pytest
from outside_world import let_use_cores
from waiting import wait_until

from cookbook.data.processes import map_in_order
from cookbook.errors import DataError


def test_results_come_in_order_for_any_number_of_processes():
    offset = 100  # a closure: processes are forked, so nothing but inputs and results is pickled
    for num_proc in (1, 2, 3):
        assert list(map_in_order(lambda x: x + offset, range(50), num_proc)) == list(range(100, 150))
    assert list(map_in_order(lambda x: x, [], 2)) == []


def test_other_processes_are_started_if_the_work_takes_long(monkeypatch):
    let_use_cores(monkeypatch, 2)
    pids = list(map_in_order(lambda x: os.getpid(), range(40), seconds_alone=0.0))
    assert pids[0] == os.getpid()
    assert os.getpid() not in pids[1:]


def test_inputs_are_not_read_far_ahead():
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for number in count():
            read = number
            yield number

    results = map_in_order(lambda x: x, numbers(), 2)
    assert list(islice(results, 3)) == [0, 1, 2]
    assert read < 20
    results.close()  # type: ignore[attr-defined]


def test_an_error_in_a_process_is_raised_in_the_parent():
    def fail(number: int) -> int:
        raise DataError(f"number {number}")

    with pytest.raises(DataError, match="number 0"):
        list(map_in_order(fail, range(5), 2))


def test_a_killed_process_raises_one_clear_error():
    def kill_itself(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="num_proc=1"):
        list(map_in_order(kill_itself, range(5), 2))


@pytest.mark.slow
def test_processes_end_with_their_parent(tmp_path):
    program = """
import os, sys
from cookbook.data.processes import map_in_order
def work(number):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
for _ in map_in_order(work, iter(int, 1), 2):
    pass
"""
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
    parent.kill()
    parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(_is_running(pid) for pid in pids))


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
