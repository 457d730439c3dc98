"""`make gpu` runs every part in its order and within its time, and writes each outcome at once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part, run_all
from benchmarks.gpu_expectations import compared, expected_launches


def python(name: str, code: str, seconds: float = 60.0, **options: object) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, **options)  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    began = time.monotonic()
    run_all(
        [
            python("fails", "print('{\"rate\": 7}'); print('why'); raise SystemExit(3)"),
            python("hangs", "print('{\"rate\": 8}', flush=True); import time; time.sleep(600)", seconds=3),
            Part("is not for here", ("false",), 1.0, lambda: "needs two CUDA devices"),
            python("passes", "print('{\"rate\": 9}')"),
        ],
        tmp_path,
        seconds=120,
    )
    assert time.monotonic() - began < 100
    fails, hangs, skipped, passes = read(tmp_path)
    assert (fails["status"], fails["exit_code"], fails["results"]) == ("failed", 3, [{"rate": 7}])
    assert fails["last_lines"][-1] == "why"  # type: ignore[index]
    assert (hangs["status"], hangs["results"]) == ("out of time", [{"rate": 8}])
    assert (skipped["status"], skipped["reason"]) == ("skipped", "needs two CUDA devices")
    assert (passes["status"], passes["results"]) == ("passed", [{"rate": 9}])
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    positions = [summary.index(name) for name in ("fails: failed", "hangs: out of time", "skipped", "rate 9")]
    assert positions == sorted(positions)


def test_the_outcome_of_a_part_is_written_before_the_next_part_begins(tmp_path: Path) -> None:
    count = f"print(len(open({str(tmp_path / 'results.jsonl')!r}).readlines()))"
    run_all([python("first", "pass"), python("second", count)], tmp_path, seconds=120)
    assert (tmp_path / "2-second.txt").read_text(encoding="utf-8").strip() == "1"


def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    run_all([python("first", "pass"), python("second", "pass")], tmp_path, seconds=0)
    assert [(each["status"], each["reason"]) for each in read(tmp_path)] == [
        ("skipped", "no time was left"),
        ("skipped", "no time was left"),
    ]


def test_the_limits_of_all_parts_are_known_and_their_order_is_tests_then_speed_then_several_devices() -> None:
    names = [part.name for part in gpu.parts()]
    assert names[:2] == ["tests", "expectations"]
    assert names[-3:] == ["sampling", "resume", "two processes"]
    assert all(0 < part.seconds <= 120 for part in gpu.parts())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--folder", str(tmp_path / "gpu")]) == 2
    assert "There is no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_launches_are_expected_from_the_text_of_the_roofline() -> None:
    text = (
        "qwen3-0.6b step, layers: 0 waits\n  matmul  5 launches 1 MB\n  norm  2 launches 1 MB\n"
        "qwen3-0.6b step, rest: 0 waits\n  matmul  -1 launches 1 MB\n  loss  10 launches 1 MB\n"
        "qwen3-0.6b step without kernels, layers: 0 waits\n  matmul  6 launches 1 MB\n"
        "qwen3-0.6b token, layers: 0 waits\n  matmul  100 launches 1 MB\n"
    )
    assert expected_launches(text, num_layers=4) == 4 * 7 + 9
    assert expected_launches(text, 4, "qwen3-0.6b step without kernels") == 4 * 6


def test_what_is_found_may_be_a_quarter_off() -> None:
    assert compared("launches", 100, 124, "kernels")["is_right"]
    wrong = compared("launches", 100, 60, "kernels")
    assert (wrong["is_right"], wrong["off_by"]) == (False, "-40%")
