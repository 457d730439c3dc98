"""Metrics in a file, on a console, and with wandb's own client."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cookbook.loggers import ConsoleLogger, JsonlLogger, WandbLogger
from cookbook.tables import Cell, Table

STEP = {"train/nll": 1.25, "perf/tokens_per_second": 1234.0, "perf/seconds_left": 60.0}


def test_a_resumed_file_drops_the_rows_that_will_be_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a', encoding="utf-8"
    )
    JsonlLogger(tmp_path, first_step=2).log(2, {"a": 4})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 0, "a": 1},
        {"step": 1, "a": 2},
        {"step": 2, "a": 4},
    ]


def test_the_rows_of_tables_are_dropped_as_those_of_metrics_are(tmp_path: Path) -> None:
    for first_step in (0, 1):
        logger = JsonlLogger(tmp_path, first_step=first_step)
        for step in (0, 1):
            logger.log_table(step, "samples", Table(["prompt", "reply"], [["Hi", f"{first_step}"]]))
    assert [
        json.loads(line) for line in (tmp_path / "tables.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [
        {"step": 0, "table": "samples", "row": {"prompt": "Hi", "reply": "0"}},
        {"step": 0, "table": "samples", "row": {"prompt": "Hi", "reply": "1"}},
        {"step": 1, "table": "samples", "row": {"prompt": "Hi", "reply": "1"}},
    ]


def test_without_a_terminal_the_console_gets_about_twenty_plain_lines() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=80), total_steps=100, first_step=0)
    for step in range(100):
        logger.log(step, STEP)
    logger.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[-1] == "step 100/100  nll 1.250  1,234 tokens/s  60 s left"


def test_on_a_terminal_of_80_columns_the_progress_bar_fits_a_line() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, legacy_windows=False, color_system=None)
    logger = ConsoleLogger(console, total_steps=12_000, first_step=0)
    logger.log(11_000, STEP)
    logger.log(11_001, {**STEP, "test/nll": 0.5})
    logger.close()
    text = out.getvalue()
    assert "nll 1.250  1,234 tokens/s" in text
    assert "11002/12000" in text
    assert "step 11001: test/nll 0.5000" in text


def test_wandb_runs_offline_and_resumes_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        logger = WandbLogger(tmp_path, "project", "name", {"learning_rate": 1.0})
        logger.log(0, {"train/nll": 1.0})
        logger.close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text(encoding="utf-8")
    written = {path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert written == {f"run-{run_id}.wandb"}


def test_wandb_gets_tables_with_all_their_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(tmp_path, "project", None, {})
    rows: list[list[Cell]] = [["What?", "That.", None], ["Who?", "He.", 0.5]]
    logger.log_table(3, "samples", Table(["prompt", "reply", "score"], rows))
    logger.log(3, {"test/nll": 1.0})
    logger.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["columns"] == ["prompt", "reply", "score"]
    assert content["data"] == rows
