"""docs/templates.md is what the renderer gives for the published templates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import templates_page

        yield templates_page


@pytest.mark.published
def test_the_page_is_what_the_templates_give(page):
    if not page.chat_formats.PUBLISHED_TEMPLATES.is_dir():
        pytest.skip(f"needs {page.chat_formats.PUBLISHED_TEMPLATES}; set COOKBOOK_TOKENIZERS")
    made = page.make_page()
    assert page.WRONG not in made
    assert made == PAGE.read_text(encoding="utf-8"), "docs/templates.md is out of date: make parity"


def test_every_cell_of_the_page_is_of_a_known_kind_and_every_refusal_has_its_reason(page):
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0][1:]] == list(page.parity.FEATURES)
    assert len(rows) > 30
    reasons = {line.partition(". ")[0] for line in text.partition("## Reasons")[2].splitlines() if line}
    cited: set[str] = set()
    for row in rows[1:]:
        assert len(row) == len(rows[0])
        for cell in map(str.strip, row[1:]):
            kind, _, numbers = cell.partition(" (") if cell.startswith(page.REFUSED) else (cell, "", "")
            assert kind in (page.EXACT, page.AS_TEXT, page.ADDED, page.REFUSED, page.UNPRINTABLE), row
            cited |= set(numbers.rstrip(")").split(", ")) - {""}
            assert (kind == page.REFUSED) == bool(numbers)
    assert cited == reasons


def test_the_comparison_finds_a_difference(page):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = page.tokenizer_for(source)
    renderer = page.get_renderer("chat_template", tokenizer)
    truth = page.Truth(source, tokenizer)
    case = page.parity.FEATURES["1 to 6 turns"][1]
    assert page.check(renderer, truth, case) == (page.EXACT, "")

    class Spoiled(type(renderer)):
        def build_supervised_examples(self, *args, **options):
            examples = super().build_supervised_examples(*args, **options)
            return [(tokens, weights * 0 + 1) for tokens, weights in examples]

    assert page.check(Spoiled(tokenizer), truth, case)[0].startswith(page.WRONG)
    other = page.Truth(source.replace("im_end|>\n", "im_end|>"), tokenizer)
    other._tokenizer = page.tokenizer_for(source.replace("im_end|>\n", "im_end|>"))
    assert page.check(renderer, other, case)[0].startswith(page.WRONG)
