"""report.html, as shown by a browser."""

from __future__ import annotations

import html
import http.server
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cookbook.errors import CheckpointError, ConfigError, DataError
from cookbook.report import panels, write_report
from cookbook.runs.record import read_run

MakeRun = Callable[..., Path]

NOTE = "Columns not read: <id> (1,000 rows)"

CURVES_OF = """(() => {
  const found = {};
  for (const group of document.querySelectorAll("figure g[data-series]")) {
    const title = group.closest("figure").querySelector(".title").textContent;
    const kind = group.classList.contains("raw") ? " raw" : "";
    const points = group.querySelector("path").getAttribute("d").slice(1).split("L");
    found[title + ": " + group.dataset.series + kind] = points.map(point => point.split(" ").map(Number));
  }
  return found;
})()"""


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def is_drawn_to_scale(points: list[list[float]], steps: list[float], values: list[float]) -> bool:
    """Returns whether pixels are a linear function of the data, upwards and to the right."""
    assert len(points) == len(steps)
    x, y = np.asarray(points).T
    (right, x_offset), (up, y_offset) = np.polyfit(steps, x, 1), np.polyfit(values, y, 1)
    is_exact = np.allclose(x, right * np.asarray(steps) + x_offset, atol=0.02) and np.allclose(
        y, up * np.asarray(values) + y_offset, atol=0.02
    )
    return is_exact and right > 0 and up < 0


# -- contents ------------------------------------------------------------------------------------------


def test_the_curves_have_the_points_of_the_metrics(make_run: MakeRun, browser: Any) -> None:
    run = make_run()
    browser.open(write_report(run))
    assert browser.errors == []
    curves = browser.evaluate(CURVES_OF)
    rows = rows_of(run)

    def check(curve: str, metric: str, change: Callable[[float], float] = float) -> None:
        measured = [(row["step"], change(row[metric])) for row in rows if metric in row]
        steps, values = zip(*measured, strict=True)
        assert is_drawn_to_scale(curves[curve], steps, values), curve

    check("Loss, nats per trained token: train/nll raw", "train/nll")
    check("Loss, nats per trained token: test/nll", "test/nll")
    check("test/exact_match: test/exact_match", "test/exact_match")
    check("test/…/nll: test/turn_2/nll", "test/turn_2/nll")
    check("Learning rate: optim/learning_rate", "optim/learning_rate")
    check("Throughput, tokens per second: perf/tokens_per_second raw", "perf/tokens_per_second")
    browser.evaluate('[...document.querySelectorAll(".switch")].find(b => b.textContent == "log").click()')
    curves = browser.evaluate(CURVES_OF)
    check("Loss, nats per trained token: train/nll raw", "train/nll", math.log)
    assert browser.errors == []


@pytest.mark.slow
def test_times_are_stacked_to_the_height_of_their_sum(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(make_run()))
    tops = browser.evaluate(
        """Object.fromEntries([...document.querySelectorAll("path.layer")].map(path => [
             path.dataset.series,
             path.getAttribute("d").slice(1, -1).split("L").map(p => +p.split(" ")[1])]))"""
    )
    spans = ("forward_backward", "idle", "optim_step")  # without spans of other threads and seconds_left
    assert sorted(tops) == [f"perf/seconds_{span}" for span in spans]
    floor = max(max(heights) for heights in tops.values())
    second_step = [floor - tops[f"perf/seconds_{span}"][2] for span in spans]
    # From the largest total to the smallest: 12 s, 8 s, 2 s.
    assert np.divide(second_step, second_step[0]) == pytest.approx([1, 0.09 / 0.06, 0.1 / 0.06], rel=1e-3)
    # Two edges per step, forth and back.
    assert all(len(heights) == 2 * 2 * 200 for heights in tops.values())
    beside = browser.evaluate(CURVES_OF)
    assert "Seconds of a step: perf/seconds, waited for batch, beside it" in beside


@pytest.mark.slow
def test_a_very_slow_step_does_not_flatten_the_others(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(make_run()))
    highest = """[...document.querySelectorAll("figure")].find(f => f.innerText.startsWith("Seconds"))
                   .querySelector("path.curve").getBBox().y"""
    assert browser.evaluate(highest) < 0, "beyond the top"
    browser.evaluate('[...document.querySelectorAll(".switch")].find(b => b.textContent == "spikes").click()')
    assert browser.evaluate(highest) >= 0


@pytest.mark.slow
def test_the_figures_at_the_top_describe_the_run(make_run: MakeRun, browser: Any) -> None:
    run = make_run()
    (run / "environment.json").write_text(
        '{"device": "NVIDIA H100", "dtype": "bfloat16", "torch": "2.13"}', encoding="utf-8"
    )
    browser.open(write_report(run))
    facts = browser.evaluate(
        """Object.fromEntries([...document.querySelectorAll("main > .facts > div")].map(
             div => [div.querySelector("dt").innerText, div.querySelector("dd").innerText.split("\\n")]))"""
    )
    last = rows_of(run)[-1]
    assert facts["Steps"] == ["200", "finished"]
    assert facts["test/nll"][0] == f"{last['test/nll']:.4f}"
    assert facts["Time"] == ["22 s", "36.4% of it with the device idle"]
    assert facts["Tokens"] == ["80,000", "36,000 of them trained"]
    assert facts["Tokens per second"][0] == f"{80_000 / 22:,.0f}"
    assert facts["Device"] == ["NVIDIA H100", "bfloat16"]
    text = browser.evaluate("document.body.innerText")
    for words in ("1,392", "757", "98", "chats.jsonl:7: no assistant message <b>", "torch", NOTE):
        assert words in text, words


@pytest.mark.slow
def test_checkpoints_are_links_and_the_best_is_marked(make_run: MakeRun, browser: Any) -> None:
    run = make_run()
    browser.open(write_report(run))
    rows = browser.evaluate(
        """[...document.querySelectorAll("#checkpoints tbody tr")].map(
             row => [row.innerText, row.querySelector("a")?.getAttribute("href") ?? null])"""
    )
    assert "is gone" in rows[0][0]
    assert rows[0][1] is None
    assert "best" in rows[1][0]
    assert "0.4" in rows[1][0]
    assert (run / rows[1][1]).is_dir()


@pytest.mark.slow
def test_changed_settings_come_before_defaults(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(make_run(lora_rank=8, num_epochs=1)))
    listed = """[...document.querySelectorAll("#config %s .settings dt")].map(key => key.textContent)"""
    changed = browser.evaluate(listed % "h2 ~")
    left = browser.evaluate(listed % "details")
    assert {"model_name", "lora_rank", "learning_rate"} <= set(changed) - set(left)
    assert "num_epochs" in left


@pytest.mark.slow
def test_selecting_a_prompt_shows_its_reply_at_each_evaluation(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(make_run()))
    picked = 'document.querySelector("#samples select").selectedOptions[0].label'
    shown = 'document.querySelector("#samples .group:not(.left-out)").innerText'
    assert browser.evaluate(picked) == "Who are you?"
    steps = browser.evaluate(
        """[...document.querySelectorAll("#samples .group:not(.left-out) td:first-child")]
             .map(cell => cell.innerText)"""
    )
    assert steps == ["0", "50", "100", "150", "200"]
    browser.evaluate("""document.querySelector("#samples .picker button:nth-of-type(2)").click()""")
    assert browser.evaluate(picked).startswith("</script>")
    assert browser.evaluate(shown).count("window.forged") > 10


# -- interaction -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pointing_shows_values_dragging_zooms_and_a_double_click_resets(
    make_run: MakeRun, browser: Any
) -> None:
    run = make_run()
    browser.open(write_report(run))
    box = browser.evaluate(
        """(() => { const box = document.querySelector("figure svg").getBoundingClientRect();
                    return [box.x, box.y, box.width, box.height]; })()"""
    )
    x, y, width, height = box
    browser.mouse("mouseMoved", x + width / 2, y + height / 2)
    readout = browser.evaluate('document.querySelector("figure .readout").innerText')
    step = int(readout.split("\n")[0].removeprefix("step "))
    assert 90 < step < 110
    assert f"{rows_of(run)[step]['train/nll']:.4g}" in readout
    assert browser.evaluate('document.querySelectorAll("line.cursor").length') > 4, "in every chart"

    browser.mouse("mousePressed", x + width / 2, y + height / 2, held=True)
    browser.mouse("mouseMoved", x + width * 0.75, y + height / 2, held=True)
    browser.mouse("mouseReleased", x + width * 0.75, y + height / 2)
    ticks = """[...document.querySelectorAll("figure")].slice(0, 2).map(figure => Math.min(
                 ...[...figure.querySelectorAll(".grid text:not([text-anchor=end])")]
                   .map(text => +text.textContent)))"""
    assert min(browser.evaluate(ticks)) >= 90
    assert browser.evaluate('document.querySelector(".all-steps").hidden') is False
    for clicks in (1, 2):
        browser.mouse("mousePressed", x + width / 2, y + height / 2, held=True, clicks=clicks)
        browser.mouse("mouseReleased", x + width / 2, y + height / 2, clicks=clicks)
    assert browser.evaluate(ticks) == [0, 0]

    browser.evaluate('document.querySelector("figure svg").focus()')
    browser.press("Home")
    browser.press("ArrowRight")
    assert browser.evaluate('document.querySelector("figure [aria-live]").textContent').startswith("step 1 ")
    browser.evaluate("""document.querySelector('.legend [data-series="test/nll"]').click()""")
    assert not [curve for curve in browser.evaluate(CURVES_OF) if curve.endswith(": test/nll")]
    assert browser.errors == []


@pytest.mark.cases(2)
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_and_text_has_contrast(
    width: int, dark: bool, make_run: MakeRun, browser: Any
) -> None:
    browser.open(write_report(make_run()), width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return light(colour);
    }
    return 1;
  };
  const ratios = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!hasText || !element.checkVisibility() || element.disabled) continue;
    const style = getComputedStyle(element);
    const text = light(element instanceof SVGElement ? style.fill : style.color), paper = behind(element);
    ratios.push((Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05));
  }
  return Math.min(...ratios);
})()"""


@pytest.mark.slow
def test_controls_and_charts_have_accessible_names(make_run: MakeRun, browser: Any) -> None:
    browser.open(write_report(make_run()))
    nameless = browser.evaluate(
        """[...document.querySelectorAll("button, select, svg")].filter(element => !(
             element.innerText || element.getAttribute("aria-label") || element.closest("label"))).length"""
    )
    assert nameless == 0
    label = browser.evaluate('document.querySelector("figure svg").getAttribute("aria-label")')
    assert label.startswith("Loss, nats per trained token: train/nll")
    assert "step 200" in label


# -- security -------------------------------------------------------------------------------------------


def test_hostile_text_is_shown_as_text(make_run: MakeRun, browser: Any) -> None:
    hostile = "</title></script><script>window.forged=1</script><img src=x onerror='window.forged=2'>"
    run = make_run(model_name=hostile, system_prompt=hostile)
    rows = rows_of(run)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, f"test/{hostile}": 1.5}) + "\n" for row in rows), encoding="utf-8"
    )
    browser.open(write_report(run))
    assert browser.evaluate("window.forged ?? null") is None
    assert browser.evaluate('document.querySelectorAll("img").length') == 0
    assert browser.evaluate("document.body.innerText").count(hostile) >= 3
    assert browser.errors == []


def test_no_text_changes_the_direction_of_the_text_around_it(make_run: MakeRun) -> None:
    turned = "\u202eevil\u2066\u200f\x1b\x9b\u200b שלום"
    shown = "&lt;U+202E&gt;evil&lt;U+2066&gt;&lt;U+200F&gt;␛&lt;U+009B&gt;&lt;U+200B&gt; שלום"
    in_chart = "\\u003cU+202E>evil\\u003cU+2066>\\u003cU+200F>␛\\u003cU+009B>\\u003cU+200B> שלום"
    run = make_run(model_name=turned, system_prompt=turned)
    for name, key in (("metrics.jsonl", f"test/{turned}"), ("tables.jsonl", "table")):
        rows = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        more = 1.5 if name == "metrics.jsonl" else turned
        (run / name).write_text(
            "".join(json.dumps({**row, key: more}) + "\n" for row in rows), encoding="utf-8"
        )
    page = write_report(run, with_curves=False).read_text(encoding="utf-8")
    assert page.count(shown) >= 4, "the model, the prompt, the metric and the name of the table"
    assert in_chart in page
    assert not set("\u202e\u2066\u200f\x1b\x9b\u200b") & set(page)
    assert "\\u001b" not in page


def test_a_page_sends_no_network_request_even_with_injected_markup(make_run: MakeRun, browser: Any) -> None:
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        page = write_report(make_run())
        browser.open(page)
        assert browser.requests == [page.as_uri()]
        # If escaping failed, the page's content security policy would still block it.
        forged = f"<img src='{address}/img'><script>fetch('{address}/fetch'); window.forged = 1</script>"
        text = page.read_text(encoding="utf-8")
        assert address not in text
        page.write_text(text.replace("<h1>", f"{forged}<h1>"), encoding="utf-8")
        browser.open(page)
        assert browser.evaluate("window.forged ?? null") is None
        server.shutdown()
    assert asked == []


def test_a_page_needs_no_other_file() -> None:
    page_dir = Path(write_report.__code__.co_filename).parent / "page"
    for file in page_dir.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for outside in ("http:", "https:", "//cdn", "@import", "src=", 'rel="stylesheet"'):
            assert outside not in text, (file.name, outside)


# -- runs of every size -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_100_000_steps_has_a_small_page_that_keeps_its_spike(
    make_run: MakeRun, browser: Any
) -> None:
    run = make_run(num_steps=2)
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(100_000):
            row: dict[str, float] = {f"optim/norm_{i}": rng.random() for i in range(12)}
            row |= {
                "step": step,
                "train/nll": 1 + rng.random(),
                "optim/learning_rate": 1e-4,
                "perf/seconds": 0.1,
            }
            if step == 70_707:
                row["train/nll"] = 50.0
            if step % 100 == 0:
                row |= {f"test/source_{i}/nll": rng.random() for i in range(40)}
            file.write(json.dumps(row) + "\n")
    with (run / "tables.jsonl").open("w", encoding="utf-8") as file:
        for step in range(0, 100_000, 500):
            for prompt in range(20):
                row = {"prompt": f"prompt {prompt}", "reply": f"{step} " + "word " * 2_000}
                file.write(json.dumps({"step": step, "table": "samples", "row": row}) + "\n")
    page = write_report(run)
    assert page.stat().st_size < 3_000_000
    browser.open(page)
    assert browser.errors == []
    highest, lowest = browser.evaluate(
        """(() => {
             const points = document.querySelector("figure .raw path").getAttribute("d").slice(1).split("L");
             const heights = points.map(point => +point.split(" ")[1]);
             return [Math.min(...heights), Math.max(...heights)];
           })()"""
    )
    assert lowest - highest > 250, "the spike spans the chart"
    assert "evaluations are shown" in browser.evaluate("document.body.innerText")


def test_the_page_shows_counts_from_reading_the_rows(make_run: MakeRun) -> None:
    assert html.escape(NOTE) in write_report(make_run(), with_curves=False).read_text(encoding="utf-8")


def test_a_run_without_a_step_says_so(make_run: MakeRun, browser: Any) -> None:
    run = make_run()
    for name in ("metrics.jsonl", "tables.jsonl", "checkpoints.jsonl", "data.json"):
        (run / name).unlink()
    browser.open(write_report(run))
    assert browser.errors == []
    assert "No step has been logged yet" in browser.evaluate("document.body.innerText")
    assert not (run / "curves.png").exists()


def test_a_run_of_one_step_is_drawn(make_run: MakeRun, browser: Any) -> None:
    run = make_run(num_steps=1)
    (run / "metrics.jsonl").write_text(json.dumps(rows_of(run)[0]) + "\n", encoding="utf-8")
    browser.open(write_report(run))
    assert browser.errors == []
    assert browser.evaluate('document.querySelectorAll("figure circle.dot").length') >= 2
    assert "NaN" not in browser.evaluate('document.querySelector("main").innerHTML')


@pytest.mark.parametrize("name", ["accuracy", "", "/", "a/b/c/d"])
def test_an_evaluator_s_metric_has_a_chart_whatever_its_name(make_run: MakeRun, name: str) -> None:
    run = make_run(num_steps=1)
    rows = [{**row, name: 0.5} for row in rows_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    titles = [chart["title"] for chart in panels.eval_charts(read_run(run), most=100)]
    assert ("a/…/d" if name == "a/b/c/d" else name) in titles


@pytest.mark.slow
def test_nan_values_are_skipped_and_counted(make_run: MakeRun, browser: Any) -> None:
    run = make_run()
    rows = rows_of(run)
    rows[50]["test/exact_match"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    browser.open(write_report(run))
    assert browser.errors == []
    assert len(browser.evaluate(CURVES_OF)["test/exact_match: test/exact_match"]) == 4
    assert "1 values that are not numbers are not drawn" in browser.evaluate("document.body.innerText")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"There is no folder .*nowhere\. Give the folder of a run"):
        write_report(tmp_path / "nowhere")
    run = make_run("a")
    with pytest.raises(ConfigError, match=r"is not the folder of a run.*Runs in it: .*/a"):
        write_report(tmp_path)
    (run / "data.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.json is damaged"):
        write_report(run)


def test_a_page_shows_when_it_was_written(make_run: MakeRun) -> None:
    page = write_report(make_run(), with_curves=False)
    assert time.strftime("%Y") in page.read_text(encoding="utf-8")
    assert not (page.parent / "curves.png").exists()


@pytest.mark.slow
def test_a_page_of_very_many_metrics_and_checkpoints_shows_some_and_says_so(make_run: MakeRun) -> None:
    run = make_run(num_steps=3)
    many = {"step": 3, **{f"test/source_{index}/nll": 1.0 + index for index in range(1_500)}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(many) + "\n")
    record = {"epoch": 0, "batch": 0}
    records = [
        {"name": f"{step:06d}", "path": f"checkpoints/{step:06d}", "step": step, **record}
        | ({"metric": "test/nll", "value": 0.5} if step == 7 else {})
        for step in range(2_000)
    ]
    (run / "checkpoints.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in records), encoding="utf-8"
    )
    (run / "checkpoints" / "001999").mkdir()
    text = write_report(run, with_curves=False).read_text(encoding="utf-8")
    num_metrics = len({name for row in rows_of(run) for name in row} - {"step"})
    assert f"{num_metrics - 1_000:,} more metrics are not drawn" in text
    assert "1,799 earlier ones are in" in text
    assert [name in text for name in ("checkpoints/000007", "checkpoints/001799", "checkpoints/001800")] == [
        True, False, True,
    ]  # fmt: skip
    assert len(text) < 1_500_000


WRITER = """
import sys
from cookbook.report import write_report
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    write_report(sys.argv[1], with_curves=False)
"""


@pytest.mark.slow
def test_two_processes_may_write_the_page_at_once(make_run: MakeRun) -> None:
    """A run and `recipes.report` may write at once: 80 pages, none of which fails or is incomplete."""
    run = make_run(num_steps=5)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(run)], text=True, **pipes)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        if (run / "report.html").exists():
            assert (run / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    for writer in writers:
        assert writer.wait() == 0, writer.stderr.read()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_writing_a_page_follows_no_link(make_run: MakeRun, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear to its user", encoding="utf-8")
    run = make_run(num_steps=5)
    names = ("report.html", "curves.png", ".report.html.writing", ".curves.png.writing")
    for name in names:
        (run / name).symlink_to(victim)
    write_report(run)
    assert victim.read_text(encoding="utf-8") == "dear to its user"
    assert [(run / name).is_symlink() for name in names] == [False, False, True, True]


def test_a_page_reads_no_checkpoints_outside_the_folder(make_run: MakeRun) -> None:
    run = make_run(num_steps=5)
    record = {"name": "final", "path": "../../other", "step": 5, "epoch": 0, "batch": 5}
    (run / "checkpoints.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r'line 1 of .*checkpoints.jsonl is damaged: `path` is "../../other"'
    ):
        write_report(run)


def test_rows_in_any_order_are_drawn_in_order_of_steps(make_run: MakeRun) -> None:
    """Metrics of two machines may have been concatenated."""
    run, other = make_run("run"), make_run("other")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[100:], *lines[:100]]))
    found, expected = (read_run(folder).metrics for folder in (run, other))
    for name, series in expected.items():
        assert found[name].steps.tolist() == series.steps.tolist()
        assert found[name].values.tolist() == series.values.tolist()
    assert write_report(run).is_file()
