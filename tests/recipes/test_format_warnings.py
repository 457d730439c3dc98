"""recipes.chat and recipes.preview warn of a renderer that prints another format than the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import Programs
from slow import slow_after

MODEL = "model_name=cookbook/tiny-chat"
WARNING = "Renderer `role_colon` does not print the format of cookbook/tiny-chat: it prints "


@pytest.mark.slow
@pytest.mark.parametrize("renderer", slow_after(1, ["role_colon", "chat_template"]))
def test_chat_warns_of_another_format(renderer: str, programs: Programs) -> None:
    done = programs.run("recipes.chat", MODEL, f"renderer_name={renderer}", stdin=b"")
    assert done.returncode == 0, done.stderr
    assert (WARNING in " ".join(done.stderr.split())) == (renderer == "role_colon")


@pytest.mark.slow
@pytest.mark.parametrize("renderer", slow_after(1, ["role_colon", "chat_template"]))
def test_preview_warns_of_another_format(renderer: str, programs: Programs, tmp_path: Path) -> None:
    page = f"html={tmp_path / 'page.html'}"
    done = programs.run("recipes.preview", MODEL, f"renderer_name={renderer}", page, "num_examples=1")
    assert done.returncode == 0, done.stderr
    assert (WARNING in " ".join((done.stdout + done.stderr).split())) == (renderer == "role_colon")
