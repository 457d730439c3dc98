"""What pages look like at the width of a phone and of a screen, and what they say of a run's estimate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cookbook.report import compare, write_report

MakeRun = Callable[..., Path]

ESTIMATE = {"device": "a card", "num_steps": 400, "peak_bytes": 3 * 2**30, "seconds": 42.0}


def stopped(run: Path, estimate: dict[str, Any] | None = None) -> Path:
    """Makes a run of 200 steps one that was to take 400, with its memory in each row."""
    (run / "estimate.json").write_text(json.dumps({**ESTIMATE, **(estimate or {})}), encoding="utf-8")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[:-1]:
        row["perf/memory_peak_gib"] = 2.5 if row["step"] else 1.5
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return run


@pytest.mark.slow
def test_a_stopped_run_says_of_how_many_steps(make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    run = stopped(make_run())
    browser.open(write_report(run))
    assert browser.evaluate('document.querySelector(".facts dd").firstChild.data') == "200 of 400"
    browser.open(compare([run, make_run("whole")], tmp_path / "compare.html"))
    steps = "[...document.querySelectorAll('.runs tbody tr')].map(r => r.cells[r.cells.length - 3].innerText)"
    assert sorted(browser.evaluate(steps)) == ["200", "200 of 400"]


@pytest.mark.slow
def test_the_estimate_stands_beside_what_was_measured(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(stopped(make_run())))
    table = """[...document.querySelectorAll("#estimate tbody tr")].map(
                 row => [...row.cells].map(cell => cell.innerText))"""
    assert browser.evaluate(table) == [
        ["memory", "3.0 GiB", "2.5 GiB"],
        ["time of the training steps", "21 s", "14 s"],  # of 42 s for 400 steps; 200 times 0.06 + 0.01
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [{"peak_bytes": "x", "seconds": None}, {"num_steps": True, "peak_bytes": -1}]
)
def test_an_estimate_of_other_types_is_not_shown(
    wrong: dict[str, Any], make_run: MakeRun, browser: Any
) -> None:
    browser.open(write_report(stopped(make_run(), {"seconds": 0, **wrong})))
    assert browser.evaluate('document.querySelector("#estimate")') is None


@pytest.mark.slow
@pytest.mark.parametrize(("width", "num_lines"), [(390, 4), (800, 2), (1280, 1)])
def test_the_facts_stand_in_one_grid(width: int, num_lines: int, make_run: MakeRun, browser: Any) -> None:
    run = make_run(best_metric="train/nll")  # so that there is no eighth fact
    (run / "environment.json").write_text('{"device": "cpu"}', encoding="utf-8")
    browser.open(write_report(run), width=width)
    tops = browser.evaluate(
        '[...document.querySelectorAll("main > .facts > div")].map(div => div.getBoundingClientRect().top)'
    )
    num_facts = len(tops)
    assert num_facts in (6, 7)
    assert len(set(tops)) == (num_lines if num_facts == 7 else min(num_lines, 3))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_names_of_runs_do_not_break(width: int, make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    names = ["no-robots_qwen3-learning_rate=1e-4", "lora_rank=8,seed=0"]
    runs = [make_run(name, learning_rate=index) for index, name in enumerate(names)]
    browser.open(compare(runs, tmp_path / "compare.html"), width=width)
    lines = """[...document.querySelectorAll(".runs tbody button, .differences .name")].map(element => {
      const range = document.createRange();
      range.selectNodeContents(element);
      const tops = [...range.getClientRects()].filter(box => box.height > 8).map(box => Math.round(box.top));
      return new Set(tops).size;
    })"""
    assert set(browser.evaluate(lines)) == {1}
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_every_wide_table_of_a_phone_shows_that_it_scrolls(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    overflowing = """[...document.querySelectorAll("table")].filter(table => {
      const box = table.getBoundingClientRect();
      return box.right > document.documentElement.clientWidth;
    }).map(table => getComputedStyle(table.parentElement).backgroundAttachment)"""
    pages = [
        write_report(stopped(make_run())),
        compare([make_run("a"), make_run("b", lora_rank=8)], tmp_path / "c.html"),
    ]
    found = []
    for page in pages:
        browser.open(page, width=390)
        found += browser.evaluate(overflowing)
    assert set(found) == {"local, local, scroll, scroll"}
