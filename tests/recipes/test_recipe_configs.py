"""Every recipe of docs/recipes.md is run on the embedded model, and learns what it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from slow import slow_after

from cookbook.config import named
from recipes import export, sft

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
LEARNED_BELOW = 0.6
"""The share of the first loss that a short run reaches."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learns(run: Path) -> bool:
    losses = [row["train/nll"] for row in metrics_of(run) if "train/nll" in row]
    return losses[-1] < LEARNED_BELOW * losses[0]


@pytest.mark.parametrize(
    "name", slow_after(1, ["labels", "instructions", "tools", "reasoning", "agents", "text"])
)
def test_a_recipe_runs_from_any_folder_and_learns(name: str, folder: Path) -> None:
    cadence = ["eval_every=12"] if name == "labels" else []
    summary = sft.main([f"config={name}_tiny", "max_steps=12", "num_epochs=12", *cadence])
    assert summary.is_finished
    run = folder / "runs" / f"{name}-tiny"
    assert learns(run)
    if name == "labels":
        assert 0 <= metrics_of(run)[-1]["labels/exact_match"] <= 1


@pytest.mark.slow
def test_a_second_adapter_stands_on_the_merged_weights_of_the_first(folder: Path) -> None:
    sft.main(["config=pirate_tiny", "log_path=runs/ladder/first", "max_steps=4"])
    export.main(["checkpoint=runs/ladder/first", "to=runs/ladder/merged", "format=merged"])
    assert sft.main(["config=ladder_tiny", "max_steps=8"]).is_finished
    assert learns(folder / "runs/ladder/second")
    adapter = folder / "runs/ladder/second/checkpoints/final/adapter_config.json"
    assert "ladder/merged" in json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def test_the_page_has_a_section_for_every_recipe() -> None:
    configs = {path.stem for path in named.FOLDER.glob("*_tiny.yaml")}
    shown = set(re.findall(r"config=(\w+)", PAGE))
    assert shown <= {path.stem for path in named.FOLDER.glob("*.yaml")}
    assert {name for name in configs if not name.startswith(("pirate", "rollouts"))} <= shown
