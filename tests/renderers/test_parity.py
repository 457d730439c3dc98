"""The parity table in renderers/README.md is what the comparison finds."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("parity.py")
README = Path(__file__).parents[2] / "renderers" / "README.md"


@pytest.mark.slow
def test_the_table_is_what_the_comparison_finds(published_template, real_tokenizer):
    for name in ("qwen3", "llama3_1"):
        real_tokenizer(name)
    published_template("qwen3")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "WRONG" not in done.stdout
    assert done.stdout.strip() in README.read_text(encoding="utf-8"), (
        "renderers/README.md is out of date: make parity"
    )


def test_a_difference_is_found(monkeypatch, small_tokenizer):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import parity

    from renderers import get_renderer
    from renderers.base import Renderer

    class Reference(parity.Reference):
        def __init__(self):
            self._family = parity.Family("chatml", [])
            self.tokenizer = small_tokenizer("chatml")
            self._dated = self.tokenizer.chat_template

    renderer = get_renderer("chat_template", small_tokenizer("chatml"))
    case = parity.FEATURES["1 to 6 turns"][1]
    assert parity.check(renderer, Reference(), case, spells_tokens=False) == parity.EXACT

    def spoil(weights=None, tokens=None):
        original = Renderer.build_supervised_examples

        def build(self, messages, *args, **options):
            examples = original(self, messages, *args, **options)
            return [(tokens(i) if tokens else i, weights(w) if weights else w) for i, w in examples]

        monkeypatch.setattr(Renderer, "build_supervised_examples", build)
        found = parity.check(renderer, Reference(), case, spells_tokens=False)
        monkeypatch.setattr(Renderer, "build_supervised_examples", original)
        return found

    def without_ends(weights):
        weights = weights.copy()
        weights[(weights > 0).nonzero()[0][-1]] = 0
        return weights

    assert spoil(weights=without_ends) == "WRONG: mask"
    assert spoil(weights=lambda w: w * 0 + 1) != parity.EXACT
    assert spoil(tokens=lambda i: type(i).from_ints(i.to_ints()[:-1])) == "WRONG: text"


@pytest.mark.parametrize("name", ["Qwen3", "gpt-oss"])
def test_every_model_of_the_table_has_a_template_to_compare_with(published_template, monkeypatch, name):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import parity

    assert published_template(parity.FAMILIES[name].template)
