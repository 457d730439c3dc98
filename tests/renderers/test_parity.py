"""The parity table in renderers/README.md equals the result of the comparison."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_formats
import pytest

from renderers import get_renderer

README = Path(__file__).parents[2] / "renderers" / "README.md"


@pytest.fixture(scope="module")
def parity() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import parity

        yield parity


@pytest.mark.published
def test_the_table_equals_the_result_of_the_comparison(parity):
    table = parity.make_table()
    assert "WRONG" not in table
    assert table in README.read_text(encoding="utf-8"), "renderers/README.md is out of date: make parity"


@pytest.mark.slow
def test_conversations_with_a_system_message_are_exact_for_every_model_in_the_table(parity):
    for name, family in parity.FAMILIES.items():
        reference = parity.Reference(family, chat_formats.template, chat_formats.tokenizer)
        for renderer_name in family.renderers:
            renderer = get_renderer(renderer_name, reference.tokenizer)
            found = parity.cell(renderer, reference, "system")
            assert found == parity.EXACT, (name, renderer_name)


def test_the_comparison_finds_a_difference(parity, small_tokenizer):
    tokenizer = small_tokenizer("chatml")
    reference = parity.Reference(parity.Family("chatml", []), template=lambda name: tokenizer.chat_template)
    reference.tokenizer = tokenizer
    case = parity.FEATURES["1 to 6 turns"][1]
    renderer = get_renderer("chat_template", tokenizer)
    assert parity.check(renderer, reference, case, spells_tokens=False) == parity.EXACT

    def found_in(weights=lambda w: w, tokens=lambda i: i):
        class Spoiled(type(renderer)):
            def build_supervised_examples(self, *args, **options):
                examples = super().build_supervised_examples(*args, **options)
                return [(tokens(i), weights(w)) for i, w in examples]

        return parity.check(Spoiled(tokenizer), reference, case, spells_tokens=False)

    def without_ends(weights):
        weights = weights.copy()
        weights[(weights > 0).nonzero()[0][-1]] = 0
        return weights

    assert found_in(weights=without_ends) == "WRONG: mask"
    assert found_in(weights=lambda w: w * 0 + 1) != parity.EXACT
    assert found_in(tokens=lambda i: type(i).from_ints(i.to_ints()[:-1])) == "WRONG: text"
