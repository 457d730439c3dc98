"""Copies the pages of docs/, and pages from outside it, into build/docs; `make docs` makes the site of them.

README.md is the site's first page; the other pages of `OUTSIDE` are under project/. A link to a file that is
no page, such as a source file, becomes its text. A link to nothing stays, and the strict build refuses it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cookbook.utils import files

REPOSITORY = Path(__file__).parents[1]
TARGET = REPOSITORY / "build" / "docs"
OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/LOG.md",
    "cookbook/engine/DISTRIBUTED.md",
    "cookbook/eval/README.md",
    "cookbook/export/README.md",
    "cookbook/jobs/README.md",
    "cookbook/sweeps/README.md",
    "renderers/README.md",
    "renderers/jinja/README.md",
]
ASSETS = {".svg", ".png", ".css", ".js"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    for source, page in pages().items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        (TARGET / page).parent.mkdir(parents=True, exist_ok=True)
        files.write(TARGET / page, with_links_of_the_site(text, source, pages()))
    for path in (REPOSITORY / "docs").rglob("*"):
        if path.suffix in ASSETS:
            copy = TARGET / path.relative_to(REPOSITORY / "docs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def pages() -> dict[str, str]:
    """Returns the page of the site that shows each Markdown file, both as paths."""
    inside = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("**/*.md"))
    return {source: _page_of(source) for source in [*inside, *OUTSIDE]}


def _page_of(path: str) -> str:
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"


def with_links_of_the_site(text: str, source: str, shown: dict[str, str]) -> str:
    """Returns the text with its links, which lead from `source` to files of the repository, between pages."""

    def rewrite(match: re.Match[str]) -> str:
        is_image, label, target = match.groups()
        path, _, anchor = target.partition("#")
        named = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not path or ":" in target or not (REPOSITORY / named).exists():
            return match[0]
        is_asset = named.startswith("docs/") and Path(named).suffix in ASSETS
        if named not in shown and not is_asset:
            return label
        relative = os.path.relpath(_page_of(named), os.path.dirname(_page_of(source)))
        return f"{is_image}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, text)


if __name__ == "__main__":
    main()
