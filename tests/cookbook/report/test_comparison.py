"""Several runs on one page."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cookbook.errors import ConfigError
from cookbook.report import compare, write_report

MakeRun = Callable[..., Path]

TABLE = """[...document.querySelectorAll("%s tr")].map(row => [...row.cells].map(cell => cell.innerText))"""


def test_runs_come_best_first_with_a_curve_each(make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    runs = [make_run(f"q{quality}", quality=quality, learning_rate=quality) for quality in (2, 8, 4)]
    write_report(runs[1])
    page = compare(runs, tmp_path / "compare.html", title="Learning rates", notes="best: <8>")
    assert page == tmp_path / "compare.html"
    browser.open(page)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
    assert browser.evaluate("document.title") == "Learning rates"
    assert browser.evaluate('document.querySelector(".notes").innerText') == "best: <8>"
    rows = browser.evaluate(TABLE % ".runs tbody")
    assert [row[0].split("\n")[0] for row in rows] == ["q8", "q4", "q2"]
    best = [
        min(
            json.loads(line).get("test/nll", 9)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        )
        for run in runs
    ]
    assert [float(row[1].split("\n")[0]) for row in rows] == pytest.approx(
        [best[1], best[2], best[0]], abs=1e-4
    )
    assert browser.evaluate('document.querySelector(".runs a").getAttribute("href")') == "./q8/report.html"
    drawn = browser.evaluate(
        """[...document.querySelectorAll("figure")].map(figure => [figure.querySelector(".title").textContent,
             [...figure.querySelectorAll("g[data-series]")].map(group => group.dataset.series)])"""
    )
    assert all(names == ["q8", "q4", "q2"] for _, names in drawn)
    assert [title for title, _ in drawn][:3] == ["test/nll", "train/nll", "test/exact_match"]


def test_only_the_settings_that_differ_are_listed(make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    runs = [make_run("a", lora_rank=8), make_run("b", lora_rank=16), make_run("c", lora_rank=8, seed=1)]
    browser.open(compare(runs, tmp_path / "compare.html"))
    assert browser.evaluate(TABLE % ".differences") == [
        ["setting", "a", "b", "c"],
        ["lora_rank", "8", "16", "8"],
        ["seed", "not there", "not there", "1"],
    ]


def test_a_column_sorts_the_runs_and_a_name_hides_its_curves(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    runs = [make_run(f"q{quality}", quality=quality, num_steps=40 * quality) for quality in (1, 2, 3)]
    browser.open(compare(runs, tmp_path / "compare.html"))
    names = """[...document.querySelectorAll(".runs tbody th button")].map(button => button.innerText)"""
    head = '[...document.querySelectorAll(".runs thead button")].find(b => b.innerText == "steps").click()'
    browser.evaluate(head)
    assert browser.evaluate(names) == ["q1", "q2", "q3"]
    browser.evaluate(head)
    assert browser.evaluate(names) == ["q3", "q2", "q1"]
    curves = """document.querySelectorAll('figure g[data-series="q2"]').length"""
    assert browser.evaluate(curves) > 3
    browser.evaluate("""document.querySelector('.runs [data-series="q2"]').click()""")
    assert browser.evaluate(curves) == 0
    assert browser.errors == []


def test_runs_of_one_name_are_told_apart_by_their_paths(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    browser.open(compare([make_run("x/sft"), make_run("y/sft")], tmp_path / "compare.html"))
    rows = browser.evaluate(TABLE % ".runs tbody")
    assert [row[0].split("\n")[0] for row in rows] == ["x/sft", "y/sft"]


def test_more_runs_than_colours_differ_in_their_strokes(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    runs = [make_run(f"run{index:02d}", num_steps=5) for index in range(12)]
    browser.open(compare(runs, tmp_path / "compare.html"))
    looks = browser.evaluate(
        """[...document.querySelector("figure").querySelectorAll("g[data-series]")].map(group => {
             const style = getComputedStyle(group.querySelector("path"));
             return style.stroke + style.strokeDasharray; })"""
    )
    assert len(looks) == len(set(looks)) == 12
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1400


def test_a_run_that_took_no_step_is_listed_without_curves(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    runs = [make_run("a"), make_run("b")]
    (runs[0] / "metrics.jsonl").write_text("", encoding="utf-8")
    browser.open(compare(runs, tmp_path / "compare.html"))
    rows = browser.evaluate(TABLE % ".runs tbody")
    assert rows[1][0] == "a\nno step logged yet"
    assert browser.errors == []


def test_what_cannot_be_compared_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    run, page = make_run("a"), tmp_path / "compare.html"
    with pytest.raises(ConfigError, match=r"/a is given twice\. Give every run once"):
        compare([run, run / "."], page)
    with pytest.raises(ConfigError, match=r"There is no folder .*nowhere"):
        compare([run, tmp_path / "nowhere"], page)
    with pytest.raises(ConfigError, match=r"there is no folder .*missing"):
        compare([run], tmp_path / "missing" / "compare.html")
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Nothing to compare: no step was logged yet in .*/a"):
        compare([run], page)
    assert not page.exists()


def test_a_run_of_any_name_is_called_the_same_in_the_table_and_in_the_charts(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run("a\u202eb\x1b"), make_run("c")]
    page = compare(runs, tmp_path / "compare.html", title="t\u2067").read_text(encoding="utf-8")
    charts = json.loads(page.split('<script type="application/json" id="charts">')[1].split("</script>")[0])
    names = {series["name"] for chart in charts for series in chart["series"]}
    buttons = {html.unescape(name) for name in re.findall(r'data-series="([^"]*)"', page)}
    assert buttons == {"a<U+202E>b␛", "c"}
    assert buttons <= names
    assert not set("\u202e\u2067\x1b") & set(page)
