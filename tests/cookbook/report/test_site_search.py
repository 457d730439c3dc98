"""The documentation's search runs on pages that are opened from the disk, where browsers allow no workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parents[3] / "docs"


def test_the_site_s_search_runs_in_a_frame_on_a_page_of_the_disk(browser: Any, tmp_path: Path) -> None:
    """The site's bundle talks to its worker as this page does. `terminate` ends it."""
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    extra = yaml.safe_load(settings[settings.index("\nextra:") : settings.index("\nextra_css:")])
    (name,) = extra["extra"]["polyfills"]
    shutil.copyfile(DOCS / name, tmp_path / name)
    worker = "self.onmessage = event => self.postMessage({found: event.data.query.toUpperCase()})"
    (tmp_path / "worker.js").write_text(worker, encoding="utf-8")
    page = f'<!doctype html><title>t</title><script src="{name}"></script><body></body>'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    answer = browser.evaluate(
        """new Promise(done => {
            const worker = new Worker("worker.js")
            worker.onmessage = event => {
                worker.terminate()
                done([event.data.found, document.querySelectorAll("iframe").length])
            }
            worker.postMessage({query: "packing"})
        })"""
    )
    assert answer == ["PACKING", 0]
    assert not browser.errors


def test_a_script_that_is_not_there_is_an_error_of_the_worker(browser: Any, tmp_path: Path) -> None:
    page = '<!doctype html><title>t</title><script src="iframe-worker.js"></script><body></body>'
    shutil.copyfile(DOCS / "iframe-worker.js", tmp_path / "iframe-worker.js")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    script = "new Promise(done => { new Worker('none.js').onerror = () => done('refused') })"
    assert browser.evaluate(script) == "refused"
