"""Tries the renderer `chat_template` on templates as authors of models write them.

They are written after published ones, or for one oddity (`templates/`, with the tokens of each), so that
these kinds are tried where the published files are not at hand. The truth is what transformers prints, as for
docs/templates.md. `templates/cells.txt` has a line for each template and kind of cell, with the conversations
that have it. A template that refuses a conversation without a system message gets one.

    PYTHONPATH=tests/helpers python tests/renderers/written_templates.py    writes cells.txt again
"""

from __future__ import annotations

import copy
import json
from itertools import islice, product
from pathlib import Path
from typing import Any

import conftest
import parity
import templates_page
from tokenizers import AddedToken

from renderers import get_renderer
from renderers.jinja.modes import values_of_variables
from renderers.jinja.template import Template

FOLDER = Path(__file__).with_name("templates")
CELLS = FOLDER / "cells.txt"
TOKENS: dict[str, dict[str, Any]] = json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8"))
_MOST_SETTINGS = 400

_THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
CONVERSATIONS = {
    **{name: cases for name, cases in parity.FEATURES.items() if name not in ("parts", "scripts")},
    "thinking in the text": [parity.Case([parity.user("2 + 2?"), parity.reply(_THOUGHT)])],
    "thinking switched on": [
        parity.Case(
            [
                {"role": "system", "content": "detailed thinking on"},
                parity.user("2 + 2?"),
                parity.reply(_THOUGHT),
            ]
        )
    ],
    "thinking on some turns": [
        parity.Case(
            [
                parity.user("1 + 1?"),
                parity.reply("2", **first),
                parity.user("2 + 2?"),
                parity.reply("4", reasoning_content="Two."),
            ]
        )
        for first in ({"reasoning_content": "One and one."}, {})
    ],
}


def tokenizer_of(name: str, source: str) -> Any:
    tokens = TOKENS[name]
    special = {*tokens["special"], tokens["bos"], tokens["eos"]}
    made = copy.deepcopy(conftest.make_small_tokenizer(source, tuple(sorted(special))))
    made.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tokens["ordinary"]])
    made.bos_token, made.eos_token = tokens["bos"], tokens["eos"]
    return made


def behind(opening: list[dict[str, Any]], case: parity.Case) -> parity.Case:
    """Returns the conversation behind a system message if the template needs one and it has none."""
    has_opening = case.messages[0]["role"] == "system"
    return case if has_opening else parity.Case([*opening, *case.messages], case.tools)


def lines_of(name: str) -> list[str]:
    """Returns the kinds of cells of a template, each with its conversations."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_of(name, source)
    renderer = get_renderer("chat_template", tokenizer)
    truth = templates_page.Truth(source, tokenizer)
    values = values_of_variables(Template(tokenizer))
    settings = product(*([None, *values[variable]] for variable in values))
    truth.settings = [
        {variable: value for variable, value in zip(values, chosen, strict=True) if value is not None}
        for chosen in islice(settings, _MOST_SETTINGS)
    ]
    kinds: dict[str, list[str]] = {}
    opening = Template(tokenizer).opening
    for conversation, without_opening in CONVERSATIONS.items():
        cases = [behind(opening, case) for case in without_opening]
        reasons: dict[str, int] = {}
        kind = templates_page._cell(renderer, truth, cases, reasons)
        if reasons:
            kind = "refused: " + " ".join(reason.partition(". ")[0] for reason in reasons)
        kinds.setdefault(kind, []).append(conversation)
    return [name, *(f"  {kind}: {', '.join(names)}" for kind, names in kinds.items())]


if __name__ == "__main__":
    CELLS.write_text("\n\n".join("\n".join(lines_of(name)) for name in TOKENS) + "\n", encoding="utf-8")
