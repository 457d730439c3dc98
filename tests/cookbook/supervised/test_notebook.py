"""Runs from a program and from a running event loop, as in a notebook, and what a notebook shows."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chz
import pytest

from cookbook.config import cli
from cookbook.eval.evaluators import EvaluatorBuilder, TrainingClientEvaluator
from cookbook.supervised import stop_signal, train
from cookbook.supervised.train import RunSummary
from recipes import sft

FEW = ["batch_size=2", "test_size=0", "lora_rank=2", "train_unembed=False", "infrequent_eval_every=0"]


def config_in(folder: Path, *keys: str) -> train.Config:
    return cli.make_config(train.Config, sft.DEFAULTS, [f"log_path={folder}", *FEW, *keys])


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["train/nll"] for row in rows if "train/nll" in row]


@pytest.mark.slow
def test_a_run_beside_a_running_loop_equals_one_without(tmp_path: Path) -> None:
    alone = train.run(config_in(tmp_path / "alone", "max_steps=2"))

    async def cell() -> RunSummary:
        return train.run(config_in(tmp_path / "beside", "max_steps=2"))

    async def awaiting_cell() -> RunSummary:
        return await train.main(config_in(tmp_path / "awaited", "max_steps=2"))

    beside, awaited = asyncio.run(cell()), asyncio.run(awaiting_cell())
    assert alone.num_steps == beside.num_steps == awaited.num_steps == 2
    assert losses(tmp_path / "alone") == losses(tmp_path / "beside") == losses(tmp_path / "awaited")


@pytest.mark.slow
def test_the_interrupt_of_a_notebook_stops_a_run_after_its_step(tmp_path: Path) -> None:
    found: list[RunSummary] = []
    thread = threading.Thread(
        target=lambda: found.append(asyncio.run(train.main(config_in(tmp_path, "max_steps=500"))))
    )
    thread.start()
    while not stop_signal.interrupt():
        assert thread.is_alive()
        thread.join(0.01)
    thread.join()
    assert not found[0].is_finished
    assert found[0].num_steps < 500
    assert not stop_signal.interrupt()


class NothingMeasured(TrainingClientEvaluator):
    async def __call__(self, training_client: Any) -> dict[str, float]:
        return {}


@chz.chz
class InterruptBuilder(EvaluatorBuilder):
    """Interrupts the main thread while the run is prepared."""

    def __call__(self) -> NothingMeasured:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return NothingMeasured()


def test_an_interrupt_before_the_first_step_ends_a_run_beside_a_loop(tmp_path: Path) -> None:
    async def cell() -> RunSummary:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook
        builder = f"evaluator_builders.0={__name__}:InterruptBuilder"
        return train.run(config_in(tmp_path, "max_steps=500", "eval_every=500", builder))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_notebook_shows_the_report_below_the_cell(tmp_path: Path) -> None:
    page = '<!doctype html><p title="a&amp;b">It\'s < done</p>'
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    summary = RunSummary(tmp_path, True, 1, tmp_path)
    sources: list[str | None] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.append(dict(attrs).get("srcdoc"))

    shown = summary._repr_html_()
    assert shown is not None
    Parser().feed(shown)
    assert sources == [page]
    assert RunSummary(tmp_path / "none", True, 1, tmp_path)._repr_html_() is None


def test_an_error_of_a_run_beside_a_loop_is_that_of_the_run(tmp_path: Path) -> None:
    async def cell() -> RunSummary:
        return train.run(config_in(tmp_path, f"dataset={tmp_path / 'missing.jsonl'}"))

    with pytest.raises(Exception, match=r"missing\.jsonl"):
        asyncio.run(cell())
