"""Decodes the tokens that a model would be trained on, and shows them in a terminal.

Shape suffixes: T tokens of one example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from cookbook.data.types import SupervisedDataset
from cookbook.types import IGNORED_TARGET, Datum, TensorData
from cookbook.utils.control_characters import visible
from cookbook.utils.rich_console import plain_line
from renderers.encoder import any_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_TOKENS_OF_A_CHARACTER = 8
SHOWN_FIRST, SHOWN_LAST = 8000, 2000
"""The number of tokens of one example that are shown from its start, and from its end."""
_ASCII_BRACKETS = (("[[", "]]"), ("<!", "!>"))


@dataclass(frozen=True)
class TokenText:
    """The text of one token, or of several tokens that encode one character."""

    text: str
    ids: tuple[int, ...]
    weight: float
    is_spelled: bool = False
    """Whether this text spells a control token but is not one."""


@dataclass(frozen=True)
class DecodedExample:
    """An example as decoded tokens."""

    pieces: Sequence[TokenText]
    num_tokens: int
    num_trained_tokens: int

    @property
    def title(self) -> str:
        return f"{self.num_tokens:,} tokens, {self.num_trained_tokens:,} trained"


def decode_datum(datum: Datum, tokenizer: PreTrainedTokenizerBase) -> DecodedExample:
    """Returns the tokens of a Datum as text, each with its weight as a target."""
    targets, weights = (datum.loss_fn_inputs.get(name) for name in ("target_tokens", "weights"))
    assert isinstance(targets, TensorData)
    targets_T = targets.to_numpy()
    weights_T = weights.to_numpy() if isinstance(weights, TensorData) else np.ones(len(targets_T))
    weights_T = weights_T * (targets_T != IGNORED_TARGET)
    inputs = datum.model_input.to_ints()
    # The last target is the only token that is not also an input.
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
    """Returns the first `number` examples that a run would train on."""

    datums = (datum for batch in dataset.iter_batches() for datum in batch)
    return [decode_datum(datum, tokenizer) for datum in islice(datums, number)]


def _shown_pieces(
    tokens: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> list[TokenText]:
    """Returns the text of a short example, or the start and end of a long one with a note between them."""
    num_cut = len(tokens) - SHOWN_FIRST - SHOWN_LAST
    if num_cut <= 0:
        return _with_spelled_marked(list(_pieces(tokens, weights, tokenizer)), tokenizer)
    parts = [
        _with_spelled_marked(list(_pieces(tokens[part], weights[part], tokenizer)), tokenizer)
        for part in (slice(SHOWN_FIRST), slice(len(tokens) - SHOWN_LAST, None))
    ]
    return [*parts[0], TokenText(f"\n[{num_cut:,} tokens are not shown]\n", (), 0.0), *parts[1]]


def _pieces(
    tokens: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenText]:
    start = 0
    while start < len(tokens):
        end = start + 1
        text = _decode(tokens[start:end], tokenizer)
        # Several tokens may encode one character; they are shown together.
        while (
            text.endswith(_REPLACEMENT)
            and end < min(len(tokens), start + _MOST_TOKENS_OF_A_CHARACTER)
            and weights[end] == weights[start]
        ):
            end += 1
            text = _decode(tokens[start:end], tokenizer)
        yield TokenText(text, tuple(tokens[start:end]), weights[start])
        start = end


def _with_spelled_marked(pieces: list[TokenText], tokenizer: PreTrainedTokenizerBase) -> list[TokenText]:
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
    """Prints examples with trained text in colour; without colours between ⟦ and ⟧, or in ASCII [[ and ]].

    Text that spells a control token is red, or between ⁅ and ⁆ (<! and !>); the last line explains this.
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
