"""The page of a run in progress."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from waiting import wait_until

from cookbook.config import cli
from cookbook.report.live import ReportLogger
from cookbook.supervised import train
from cookbook.utils import jsonl
from recipes.sft import DEFAULTS


def test_a_run_writes_its_page_its_picture_and_its_environment(tmp_path: Path) -> None:
    argv = [f"log_path={tmp_path / 'run'}", "max_steps=3", "infrequent_eval_every=0", "test_size=8"]
    summary = asyncio.run(train.main(cli.make_config(train.Config, DEFAULTS, argv)))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "finished" in page
    assert f"{summary.metrics['test/nll']:.4f}" in page or f"{summary.metrics['test/nll']:.4g}" in page
    assert "Tokens of an example" in page, "the histogram of lengths"
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5_000
    machine = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert machine["device"] == "cpu"
    assert machine["torch"]
    assert machine["torch"] in page


def test_the_page_exists_before_the_run_ends(make_run: Callable[..., Path]) -> None:
    run = make_run()
    logger = ReportLogger(run)
    logger.log(0, {})
    wait_until((run / "report.html").exists)
    assert "<h1>run</h1>" in (run / "report.html").read_text(encoding="utf-8")
    logger.close()


def test_writing_pages_takes_at_most_one_percent_of_the_time(make_run: Callable[..., Path]) -> None:
    now = 0.0
    written = []

    def write(folder: Path, with_curves: bool, metrics: object) -> None:
        nonlocal now
        written.append(now)
        now += 1.0  # a page of a long run is slow

    logger = ReportLogger(make_run(), write, clock=lambda: now)
    for step in range(1_000):
        logger.log(step, {})
        assert logger._thread is not None
        logger._thread.join()
        now += 1.0
    assert 9 <= len(written) <= 11
    assert all(later - earlier >= 100 for earlier, later in pairwise(written))


def test_a_page_that_cannot_be_written_is_reported_in_one_warning(
    make_run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    (run / "data.json").write_text("{", encoding="utf-8")
    logger = ReportLogger(run)
    with caplog.at_level(logging.WARNING):
        logger._write()
        logger.close()
    assert len(caplog.records) == 1
    assert "report.html could not be written: DataError" in caplog.text


@pytest.mark.slow
def test_a_page_that_is_written_again_reads_only_new_metrics(
    make_run: Callable[..., Path], bytes_read: Callable[[], int]
) -> None:
    run = make_run(num_steps=5_000)
    (run / "tables.jsonl").unlink()
    logger = ReportLogger(run)
    logger._write()
    for step in range(5_001, 5_004):
        jsonl.append(run / "metrics.jsonl", {"step": step, "test/nll": 7.25})
    before = bytes_read()
    logger._write()
    assert bytes_read() - before < (run / "metrics.jsonl").stat().st_size / 5
    assert "7.25" in (run / "report.html").read_text(encoding="utf-8")
