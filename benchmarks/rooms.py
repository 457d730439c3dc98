"""Draws `docs/rooms.svg`: the rooms of the code base, each above all rooms that it imports.

    python -m benchmarks.rooms

The levels follow from `MAY_IMPORT` of `tests/test_import_direction.py`, and the text of a room from `PURPOSE`
below. `tests/test_house.py` fails if the picture differs from what this program draws.
"""

from __future__ import annotations

from html import escape

from benchmarks.import_graph import ROOT
from tests.test_import_direction import MAY_IMPORT, covers

PICTURE = ROOT / "docs" / "rooms.svg"

PURPOSE = {
    "errors": "all errors",
    "utils": "files, JSON, consoles",
    "types": "the types of the API",
    "embedded": "the model in the package",
    "models": "configs and tokenizers",
    "trace": "timed spans",
    "renderers": "messages to tokens and weights, and back",
    "engine": "model, training step, sampling, checkpoints",
    "clients": "the Tinker API in process",
    "config": "command line, files, keys",
    "data": "rows to examples",
    "runs": "the files of a run",
    "loggers": "metrics to files and trackers",
    "report": "HTML pages of runs",
    "eval": "evaluators",
    "chat": "chats in the terminal",
    "server": "the Tinker protocol and OpenAI's API",
    "export": "adapters, merged weights, GGUF",
    "supervised": "Config, main, the training loop",
    "sweeps": "many runs of a recipe",
    "jobs": "runs queued for devices",
    "recipes": "python -m recipes.<name> key=value ...",
}
COLOURS = {"engine": "#dbe9ff", "clients": "#dbe9ff", "renderers": "#e2f3e0", "data": "#e2f3e0"}
OTHER_COLOUR = "#f3f1ec"
SUPERVISED_COLOUR = "#ffe8cc"

WIDTH, HEIGHT, BOX_HEIGHT, BOX_WIDTH, GAP = 980, 60, 48, 308, 14
FONT = "font-family='system-ui, sans-serif'"


def levels() -> list[list[str]]:
    """Returns the rooms by level. Each is one level above the highest room that it may import."""
    level: dict[str, int] = {}
    for room, allowed in MAY_IMPORT.items():  # imported rooms come first in it
        below = [
            level[other] for other in level if other != room and any(covers(one, other) for one in allowed)
        ]
        level[room] = 1 + max(below, default=-1)
    rows: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for room, number in level.items():
        if room.removeprefix("cookbook.") in PURPOSE:
            rows[number].append(room.removeprefix("cookbook."))
    return [row for row in rows if row]


def drawn() -> str:
    """Returns the picture as SVG."""
    rows = levels()[::-1]
    height = len(rows) * HEIGHT + 44
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' "
        f"height='{height}'>",
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>",
    ]
    for number, row in enumerate(rows):
        left = (WIDTH - len(row) * BOX_WIDTH - (len(row) - 1) * GAP) // 2
        for place, room in enumerate(row):
            x, y = left + place * (BOX_WIDTH + GAP), 14 + number * HEIGHT
            colour = (
                SUPERVISED_COLOUR if room in ("supervised", "recipes") else COLOURS.get(room, OTHER_COLOUR)
            )
            middle = x + BOX_WIDTH // 2
            parts += [
                f"<rect x='{x}' y='{y}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='6' fill='{colour}' "
                f"stroke='#555'/>",
                f"<text x='{middle}' y='{y + 20}' text-anchor='middle' {FONT} font-size='16' "
                f"font-weight='600'>{escape(room)}</text>",
                f"<text x='{middle}' y='{y + 38}' text-anchor='middle' {FONT} font-size='12' "
                f"fill='#444'>{escape(PURPOSE[room])}</text>",
            ]
    parts += [
        f"<text x='{WIDTH // 2}' y='{height - 14}' text-anchor='middle' {FONT} font-size='13' fill='#444'>"
        "A room imports only rooms below it. Blue: works on tokens and weights. "
        "Green: turns conversations into tokens. Orange: a training run.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
    print(PICTURE)
