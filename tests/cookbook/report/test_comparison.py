"""The page that compares several runs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cookbook.errors import ConfigError
from cookbook.report import compare, panels, write_report
from cookbook.runs.downsampling import smooth, smoothing_span
from cookbook.utils import jsonl

MakeRun = Callable[..., Path]

TABLE = """[...document.querySelectorAll("%s tr")].map(row => [...row.cells].map(cell => cell.innerText))"""


@pytest.mark.slow
def test_runs_are_sorted_best_first_and_have_a_curve_each(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
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


@pytest.mark.slow
def test_only_settings_that_differ_are_listed(make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    runs = [make_run("a", lora_rank=8), make_run("b", lora_rank=16), make_run("c", lora_rank=8, seed=1)]
    browser.open(compare(runs, tmp_path / "compare.html"))
    assert browser.evaluate(TABLE % ".differences") == [
        ["setting", "a", "b", "c"],
        ["lora_rank", "8", "16", "8"],
        ["seed", "not there", "not there", "1"],
    ]


@pytest.mark.slow
def test_clicking_a_column_sorts_the_runs_and_clicking_a_name_hides_its_curves(
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


@pytest.mark.slow
def test_runs_of_the_same_name_are_distinguished_by_their_paths(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    browser.open(compare([make_run("x/sft"), make_run("y/sft")], tmp_path / "compare.html"))
    rows = browser.evaluate(TABLE % ".runs tbody")
    assert [row[0].split("\n")[0] for row in rows] == ["x/sft", "y/sft"]


@pytest.mark.slow
def test_more_runs_than_colours_differ_in_their_dash_patterns(
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


@pytest.mark.slow
def test_a_run_without_a_step_is_listed_without_curves(
    make_run: MakeRun, tmp_path: Path, browser: Any
) -> None:
    runs = [make_run("a"), make_run("b")]
    (runs[0] / "metrics.jsonl").write_text("", encoding="utf-8")
    browser.open(compare(runs, tmp_path / "compare.html"))
    rows = browser.evaluate(TABLE % ".runs tbody")
    assert rows[1][0] == "a\nno step logged yet"
    assert browser.errors == []


def charts_in(page: Path) -> list[dict[str, Any]]:
    text = page.read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(
        re.findall(r'id="charts"[^>]*>(.*?)</script>', text, re.DOTALL)[0]
    )
    return found


@pytest.mark.slow
def test_each_run_is_read_once(make_run: MakeRun, tmp_path: Path, bytes_read: Callable[[], int]) -> None:
    runs = [make_run(f"r{index}", num_steps=4_000) for index in range(3)]
    compare(runs, tmp_path / "compare.html")  # so that imports are not counted
    before = bytes_read()
    compare(runs, tmp_path / "compare.html")
    size = sum((run / "metrics.jsonl").stat().st_size for run in runs)
    assert bytes_read() - before < 1.2 * size


@pytest.mark.slow
def test_curves_of_many_long_runs_are_reduced_but_keep_their_extremes_and_ends(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(f"r{index:02d}", num_steps=3_000) for index in range(60)]
    spike = {"step": 1_234, "test/nll": 99.0, "train/nll": 50.0, "optim/learning_rate": 9.0}
    path = runs[7] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[1_234] |= spike
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = compare(runs, tmp_path / "compare.html")
    charts = {chart["title"]: chart for chart in charts_in(page)}
    assert sum(len(line["x"]) for chart in charts.values() for line in chart["series"]) <= 100_000
    assert page.stat().st_size < 2_500_000
    for title, name in {
        "test/nll": "test/nll",
        "train/nll": "train/nll",
        "Learning rate": "optim/learning_rate",
    }.items():
        (line,) = [line for line in charts[title]["series"] if line["name"] == "r07"]
        steps = np.array([row["step"] for row in rows if name in row])
        values = np.array([row[name] for row in rows if name in row])
        if name == "train/nll":
            values = smooth(values, smoothing_span(len(values)))
        ends = [(steps[index], values[index]) for index in (0, -1, values.argmin(), values.argmax())]
        drawn = dict(zip(line["x"], line["y"], strict=True))
        assert [drawn[step] for step, _ in ends] == pytest.approx([value for _, value in ends], rel=1e-5)


@pytest.mark.slow
def test_metrics_that_do_not_fit_the_page_are_counted(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name) for name in ("a", "b")]
    page = compare(runs, tmp_path / "compare.html")
    titles = [chart["title"] for chart in charts_in(page)]
    assert titles[:3] == ["test/nll", "train/nll", "test/exact_match"]
    assert len(titles) == 8
    assert "more metrics are not drawn" not in page.read_text(encoding="utf-8")
    room = panels.MAX_POINTS_OF_A_COMPARISON // (60 * len(runs))
    jsonl.append(runs[0] / "metrics.jsonl", {"step": 200} | {f"test/{i}/nll": 1.0 for i in range(room - 5)})
    page = compare(runs, tmp_path / "compare.html")
    assert [chart["title"] for chart in charts_in(page)][:2] == ["test/nll", "train/nll"]
    assert "3 more metrics are not drawn" in page.read_text(encoding="utf-8")


def test_a_long_setting_is_truncated_on_the_page_and_compared_in_full(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(name, system_prompt="x" * 10_000 + name) for name in ("a", "b")]
    text = compare(runs, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert text.count("x" * 300 + " … and 9,701 characters more") == 2
    assert "x" * 301 not in text


def test_invalid_folders_and_runs_without_a_step_are_errors(make_run: MakeRun, tmp_path: Path) -> None:
    run, page = make_run("a"), tmp_path / "compare.html"
    with pytest.raises(ConfigError, match=r"/a is given twice\. Give every run once"):
        compare([run, run / "."], page)
    with pytest.raises(ConfigError, match=r"There is no folder .*nowhere"):
        compare([run, tmp_path / "nowhere"], page)
    with pytest.raises(ConfigError, match=r"there is no folder .*missing"):
        compare([run], tmp_path / "missing" / "compare.html")
    for rows in ("", '{"step": 0, "perf/seconds": 1.5}\n'):
        (run / "metrics.jsonl").write_text(rows, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"Nothing to compare: no step was logged yet in .*/a"):
            compare([run], page)
    assert not page.exists()


def test_a_run_of_any_name_has_the_same_name_in_the_table_and_the_charts(
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
