"""What a model would be trained on, made visible: for a terminal, and as one HTML page.

Shape suffixes: T tokens of one example.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from cookbook.data.report import DataReport
from cookbook.data.types import SupervisedDataset
from cookbook.types import IGNORED_TARGET, Datum, TensorData
from cookbook.utils.consoles import plain_line
from cookbook.utils.control_characters import visible
from renderers.encoder import any_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_TOKENS_OF_A_CHARACTER = 8
SHOWN_FIRST, SHOWN_LAST = 8000, 2000
"""Tokens of one example that are shown: so many from its beginning, and from its end."""
_ASCII_BRACKETS = (("[[", "]]"), ("<!", "!>"))


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of the few tokens that a character is spread over."""

    text: str
    ids: tuple[int, ...]
    weight: float
    is_spelled: bool = False
    """Whether this is text of a message that reads as a control token and is none."""


@dataclass(frozen=True)
class DecodedExample:
    """An example as its tokens read."""

    pieces: Sequence[Piece]
    num_tokens: int
    num_trained_tokens: int

    @property
    def title(self) -> str:
        return f"{self.num_tokens:,} tokens, {self.num_trained_tokens:,} trained"


def decode_datum(datum: Datum, tokenizer: PreTrainedTokenizerBase) -> DecodedExample:
    """A Datum's tokens as text, each with the weight it has as a target."""
    targets, weights = (datum.loss_fn_inputs.get(name) for name in ("target_tokens", "weights"))
    assert isinstance(targets, TensorData)
    targets_T = targets.to_numpy()
    weights_T = weights.to_numpy() if isinstance(weights, TensorData) else np.ones(len(targets_T))
    weights_T = weights_T * (targets_T != IGNORED_TARGET)
    inputs = datum.model_input.to_ints()
    # The last target is the only token that is not an input too.
    tokens = [*inputs, int(targets_T[-1])] if targets_T[-1] != IGNORED_TARGET else inputs
    weight_of_token = [0.0, *weights_T.tolist()][: len(tokens)]
    return DecodedExample(
        pieces=_shown_pieces(tokens, weight_of_token, tokenizer),
        num_tokens=len(tokens),
        num_trained_tokens=int(np.count_nonzero(weights_T)),
    )


def first_examples(
    dataset: SupervisedDataset, number: int, tokenizer: PreTrainedTokenizerBase
) -> list[DecodedExample]:
    """The first examples that a run would train on."""

    datums = (datum for batch in dataset.iter_batches() for datum in batch)
    return [decode_datum(datum, tokenizer) for datum in islice(datums, number)]


def _shown_pieces(
    tokens: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """All of a short example; of a long one its beginning and its end, with a note between them."""
    num_cut = len(tokens) - SHOWN_FIRST - SHOWN_LAST
    if num_cut <= 0:
        return _with_spelled_marked(list(_pieces(tokens, weights, tokenizer)), tokenizer)
    parts = [
        _with_spelled_marked(list(_pieces(tokens[part], weights[part], tokenizer)), tokenizer)
        for part in (slice(SHOWN_FIRST), slice(len(tokens) - SHOWN_LAST, None))
    ]
    return [*parts[0], Piece(f"\n[{num_cut:,} tokens are not shown]\n", (), 0.0), *parts[1]]


def _pieces(
    tokens: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    start = 0
    while start < len(tokens):
        end = start + 1
        text = _decode(tokens[start:end], tokenizer)
        # Bytes of one character in several tokens: take them together, if they make one at all.
        while (
            text.endswith(_REPLACEMENT)
            and end < min(len(tokens), start + _MOST_TOKENS_OF_A_CHARACTER)
            and weights[end] == weights[start]
        ):
            end += 1
            text = _decode(tokens[start:end], tokenizer)
        yield Piece(text, tuple(tokens[start:end]), weights[start])
        start = end


def _with_spelled_marked(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    special = {
        token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    starts = np.cumsum([0, *(len(piece.text) for piece in pieces)])
    for match in any_of(special).finditer("".join(piece.text for piece in pieces)):
        first = int(np.searchsorted(starts, match.start(), side="right")) - 1
        last = int(np.searchsorted(starts, match.end(), side="left"))
        if pieces[first].ids != (special[match[0]],):
            pieces[first:last] = [replace(piece, is_spelled=True) for piece in pieces[first:last]]
    return pieces


def _decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -- the terminal -----------------------------------------------------------------------------


def print_examples(examples: Sequence[DecodedExample], console: Console) -> None:
    """Trained text in colour; between ⟦ and ⟧ where there are no colours, or [[ and ]] in ASCII.

    Text that spells a control token is red, or between ⁅ and ⁆ (<! and !>), and the last line says so.
    """
    has_colour = console.color_system is not None
    brackets, spelled = (("⟦", "⟧"), ("⁅", "⁆")) if console.encoding.startswith("utf") else _ASCII_BRACKETS
    for number, example in enumerate(examples, 1):
        console.print(_panel(number, example, has_colour, brackets, spelled))
    if any(piece.is_spelled for example in examples for piece in example.pieces):
        mark = "Red text" if has_colour else f"What stands between {spelled[0]} and {spelled[1]}"
        text = f"{mark} spells a control token and is plain text to the model."
        console.print(plain_line(text))


def _panel(
    number: int,
    example: DecodedExample,
    has_colour: bool,
    brackets: tuple[str, str],
    spelled: tuple[str, str],
) -> RenderableType:
    text = Text()
    for (weight, is_spelled), run in groupby(
        example.pieces, key=lambda piece: (piece.weight, piece.is_spelled)
    ):
        said = visible("".join(piece.text for piece in run))
        if is_spelled:
            said = said if has_colour else f"{spelled[0]}{said}{spelled[1]}"
        if is_spelled and has_colour:
            text.append(said, style="bold red" if weight else "red")
        elif not weight:
            text.append(said, style="dim")
        elif has_colour:
            text.append(said, style="bold green" if weight == 1 else "bold yellow")
        else:
            text.append(said.join(brackets))
    title = plain_line(f"Example {number}: {example.title}")
    return Panel(text, title=title, title_align="left") if has_colour else Group(title, text, Text(""))


# -- the page ---------------------------------------------------------------------------------


def make_page(
    title: str, facts: Sequence[str], reports: Sequence[DataReport], examples: Sequence[DecodedExample]
) -> str:
    """One HTML page with nothing outside of it: the report, the length histogram and the examples."""
    lengths = np.concatenate([np.zeros(0, np.int64), *(report.lengths for report in reports)])
    if not len(lengths):
        lengths = np.asarray([example.num_tokens for example in examples])
    report_text = "\n".join(line for report in reports for line in report.lines())
    sections = "\n".join(_section(number, example) for number, example in enumerate(examples, 1))
    return _PAGE.format(
        title=_escaped(title),
        style=_STYLE,
        facts="".join(f"<li>{_escaped(fact)}</li>" for fact in facts),
        report=_escaped(report_text),
        histogram=_histogram(lengths, max((report.max_length or 0 for report in reports), default=0)),
        examples=sections,
    )


def _escaped(text: str) -> str:
    """Text as HTML. What turns the direction of the text around it, or is not seen, is shown."""
    return html.escape(visible(text))


def _section(number: int, example: DecodedExample) -> str:
    tokens = "".join(_span(piece) for piece in example.pieces)
    return f"<section><h2>Example {number} <small>{example.title}</small></h2><pre>{tokens}</pre></section>"


def _span(piece: Piece) -> str:
    ids = ", ".join(map(str, piece.ids))
    said = "  plain text that spells a control token" if piece.is_spelled else ""
    hint = html.escape(f"{piece.text!r}  id {ids}  weight {piece.weight:g}{said}", quote=True)
    text = _escaped(piece.text)
    if not piece.weight:
        mark = ' class="s"' if piece.is_spelled else ""
        return f'<span{mark} title="{hint}">{text}</span>'
    # A trained line break is a token like any other: it is shown, and still breaks the line.
    text = text.replace("\n", "<i>↵</i>\n")
    kind = ("t" if piece.weight == 1 else "t w") + (" s" if piece.is_spelled else "")
    return f'<span class="{kind}" title="{hint}">{text}</span>'


def _histogram(lengths: np.ndarray, max_length: int) -> str:
    """Bars of equal width over the token counts of all examples, with the cut where it lies among them."""
    width, height, bottom, left = 720, 160, 24, 48
    longest = int(lengths.max(initial=1))
    num_bars = min(60, max(1, longest))
    counts, edges = np.histogram(lengths, bins=num_bars, range=(0, longest))
    most = max(1, int(counts.max(initial=1)))
    step = (width - left) / num_bars
    parts = [
        f'<rect x="{left + i * step + 0.5:.1f}" y="{height - count / most * height:.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{count / most * height:.1f}">'
        f"<title>{count:,} examples of {edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens</title></rect>"
        for i, count in enumerate(counts.tolist())
        if count
    ]
    parts.append(f'<line x1="{left}" y1="{height}" x2="{width}" y2="{height}"/>')
    if 0 < max_length <= longest:
        x = left + (width - left) * max_length / longest
        parts.append(f'<line class="cut" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="12" text-anchor="end">max_length {max_length:,}</text>')
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        x = left + (width - left) * fraction
        anchor = "start" if fraction == 0 else "end" if fraction == 1 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{height + 16}" text-anchor="{anchor}">{longest * fraction:,.0f}</text>'
        )
    parts.append(f'<text x="{left - 6}" y="12" text-anchor="end">{most:,}</text>')
    parts.append(f'<text x="{left - 6}" y="{height}" text-anchor="end">0</text>')
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99]) if len(lengths) else np.zeros(3)
    caption = (
        "Tokens of an example: median {:,.0f}, 90% up to {:,.0f}, 99% up to {:,.0f}, longest {:,}.".format(
            *quantiles, longest
        )
    )
    return (
        f'<svg viewBox="0 0 {width} {height + bottom}" role="img" aria-label="Histogram of example lengths">'
        f"{''.join(parts)}</svg><p>{caption}</p>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #666; --paper: #fff; --box: #f5f5f3; --line: #ddd;
  --t: #d3f0d9; --t-ink: #0b4a1c; --w: #fbe7b8; --bar: #4b8a5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e2; --soft: #9a9a98; --paper: #17181a;
  --box: #202225; --line: #3a3c40; --t: #17401f; --t-ink: #b9f2c6; --w: #4d3c0d; --bar: #6fae82; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
small, .soft, figure p { color: var(--soft); font-weight: normal; }
ul { padding-left: 1.2rem; margin: .3rem 0; }
pre { font: 13px/1.55 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; margin: 0; }
section pre { color: var(--soft); }
.t { background: var(--t); color: var(--t-ink); } .w { background: var(--w); }
.s { text-decoration: underline wavy #c0392b; text-underline-offset: 3px; }
.t i { font-style: normal; opacity: .45; }
section span:hover { outline: 1px solid currentColor; }
figure { margin: 1.2rem 0; } svg { width: 100%; height: auto; } rect { fill: var(--bar); }
line { stroke: var(--soft); } .cut { stroke: #c0392b; stroke-dasharray: 4 3; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
<ul>{facts}</ul>
<pre>{report}</pre>
<figure>{histogram}</figure>
<p class="soft"><span class="t">Trained text</span> counts in the loss (<span class="t w">so</span> with a
weight other than 1); the rest is what the model reads. <span class="s">Underlined</span> text spells a
control token and is plain text to the model. Point at a token to see its id.</p>
{examples}
</body>
</html>
"""
