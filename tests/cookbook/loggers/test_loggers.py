"""Loggers to files, the console and wandb, with wandb's own client."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console
from waiting import wait_until

from cookbook.loggers import ConsoleLogger, JsonlLogger, WandbLogger, logging_to
from cookbook.loggers.console import MAX_SECONDS_OF_SILENCE, _Heartbeat, _TimeLeft, has_bar
from cookbook.utils.consoles import VisibleFormatter
from cookbook.utils.rich_console import PlainConsole
from cookbook.utils.tables import Cell, Table

STEP = {"train/nll": 1.25, "perf/tokens_per_second": 1234.0, "perf/seconds_left": 60.0}


def test_a_resumed_logger_removes_the_rows_that_will_be_measured_again(tmp_path: Path) -> None:
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


def test_a_resumed_logger_removes_rows_of_tables_too(tmp_path: Path) -> None:
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


def test_without_a_terminal_the_console_prints_about_twenty_plain_lines() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=80), total_steps=100, first_step=0)
    for step in range(100):
        logger.log(step, STEP)
    logger.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[-1] == "step 100/100  nll 1.250  1,234 tokens/s  60 s left"


def test_the_loss_of_another_objective_is_printed_first() -> None:
    out = io.StringIO()
    of_pairs = {"train/dpo_loss": 0.64, "train/dpo_accuracy": 1.0, "train/nll": 2.5}
    ConsoleLogger(Console(file=out, width=80), total_steps=1, first_step=0).log(0, {**of_pairs, **STEP})
    assert out.getvalue() == "step 1/1  dpo_loss 0.640  nll 1.250  1,234 tokens/s  60 s left\n"


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


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_metric_of_any_name_is_printed_literally(is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=is_terminal, color_system=None)
    logger = ConsoleLogger(console, total_steps=10, first_step=0)
    logger.log(0, {**STEP, "[/INST]/[red]x :smile:": 0.5, "bleu\x1b[2J\nstep 9: test/nll 0.0/a": 0.25})
    logger.close()
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", out.getvalue()).splitlines()]
    assert "step 0: [/INST]/[red]x :smile: 0.5000" in lines
    assert "step 0: bleu␛[2J␊step 9: test/nll 0.0/a 0.2500" in lines


MESSAGES = [
    ("%s rows", ("[/INST] [red]five[/red] :smile:",), "[/INST] [red]five[/red] :smile: rows"),
    ("row %s", ("\x1b]0;owned\x07\x9b2J\u202e",), "row ␛]0;owned␇<U+009B>2J<U+202E>"),
    (
        "role %s",
        ("a\n2026-01-01 00:00:00,000 ERROR x: forged\r\nFinished",),
        "role a\n  2026-01-01 00:00:00,000 ERROR x: forged␍\n  Finished",
    ),
    ("  user: a\n  assistant: b", (), "  user: a\n  assistant: b"),
    ("שלום %s", ("می\u200cخواهم",), "שלום می\u200cخواهم"),
]


@pytest.mark.parametrize(("message", "values", "shown"), MESSAGES)
def test_a_message_is_one_visible_entry_on_the_console_and_in_the_file(
    message: str, values: tuple[str, ...], shown: str, tmp_path: Path
) -> None:
    out, path = io.StringIO(), tmp_path / "train.log"
    console = Console(file=out, width=200, force_terminal=True, color_system="standard")
    logger = logging.getLogger("cookbook.test")
    with logging_to(console, path):
        logger.info(message, *values)
        logger.warning(message, *values)
    plain, coloured = out.getvalue().split("\x1b[33m", 1)
    assert plain == f"{shown}\n"
    assert coloured.replace("\x1b[33m", "").replace("\x1b[0m", "") == f"{shown}\n"
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    written = path.read_bytes().decode()
    assert re.fullmatch(
        "".join(f"{stamp} {level} cookbook.test: {re.escape(shown)}\n" for level in ("INFO", "WARNING")),
        written,
    )


def test_a_lone_surrogate_is_shown_by_its_code_point() -> None:
    record = logging.LogRecord("cookbook.test", logging.INFO, "", 0, "lone \ud800", (), None)
    assert VisibleFormatter("%(message)s").format(record) == "lone <U+D800>"


def test_a_traceback_belongs_to_its_log_entry(tmp_path: Path) -> None:
    with logging_to(Console(file=io.StringIO()), tmp_path / "train.log"):
        try:
            raise ValueError("bad\x1b[2J\n2026-01-01 00:00:00,000 ERROR x: forged")
        except ValueError:
            logging.getLogger("cookbook.test").exception("It failed.")
    first, *others = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith("ERROR cookbook.test: It failed.")
    assert others[0] == "  Traceback (most recent call last):"
    assert others[-2:] == ["  ValueError: bad␛[2J", "  2026-01-01 00:00:00,000 ERROR x: forged"]
    assert all(line.startswith("  ") for line in others)


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


def test_the_time_left_stays_on_the_bar_during_a_slow_step() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    bar = ConsoleLogger(console, total_steps=10, first_step=0)
    bar.log(0, {**STEP, "perf/seconds_left": 900.0, "perf/memory_peak_gib": 1.5})
    assert bar._progress is not None
    (task,) = bar._progress.tasks
    task.fields["since"] -= 3600.0  # the next step runs for an hour already
    assert str(_TimeLeft().render(task)) == "0:13:20"  # 900 s without the 100 s of that step
    bar.close()
    assert "1.5 GiB" in out.getvalue()


def test_a_dumb_terminal_gets_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=80, force_terminal=True), total_steps=2, first_step=0)
    for step in range(2):
        logger.log(step, STEP)
    assert len(out.getvalue().splitlines()) == 2


def test_steps_that_are_slower_than_a_minute_are_printed_each() -> None:
    out = io.StringIO()
    logger = ConsoleLogger(Console(file=out, width=80), total_steps=1000, first_step=0)
    logger.log(0, STEP)
    assert out.getvalue() == ""
    logger._printed_at -= MAX_SECONDS_OF_SILENCE
    logger.log(1, STEP)
    assert out.getvalue().startswith("step 2/1000  nll")


def test_a_silent_console_says_what_still_runs() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=80)
    ConsoleLogger(console, total_steps=4, first_step=2)
    with _Heartbeat(console, max_seconds=0.1):
        assert wait_until(lambda: out.getvalue().count("\n") >= 2)
    assert re.fullmatch(r"(still running: step 3 of 4, \d+ s so far\n)+", out.getvalue())


def test_a_notebook_has_a_bar_where_it_can_be_drawn() -> None:
    console = Console(file=io.StringIO(), force_jupyter=True)
    assert has_bar(console) == (importlib.util.find_spec("ipywidgets") is not None)
    assert not has_bar(Console(file=io.StringIO()))
