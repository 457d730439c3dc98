"""Tests that every file a run writes is a known one, which `if_log_path_exists=delete` removes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cookbook.runs import folder
from cookbook.runs.folder import LOCK_FILE, RUN_FILES
from recipes import sft

WRITTEN_BY_ANY_RUN = {
    "checkpoints", "checkpoints.jsonl", "config.json", "curves.png", "data.json", "environment.json",
    "estimate.json", "metrics.jsonl", "report.html", "train.log",
}  # fmt: skip
KEYS = [
    "max_steps=2", "batch_size=2", "test_size=2", "lora_rank=1", "train_mlp=False", "train_unembed=False",
    "eval_every=1", "infrequent_eval_every=2", "prompts=Hello", "max_tokens=2", "trace=True",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "sft"
    sft.main([f"log_path={path}", "tensorboard=True", *KEYS])
    return path


def names_in(path: Path) -> set[str]:
    return {found.name for found in path.iterdir()} - {LOCK_FILE}


def test_every_path_that_a_run_writes_is_in_run_files(run: Path) -> None:
    names = names_in(run)
    assert names >= {*WRITTEN_BY_ANY_RUN, "tables.jsonl", "tensorboard", "trace.json"}
    assert names - set(RUN_FILES) == set()


@pytest.mark.slow
def test_a_run_that_starts_over_removes_all_files_of_the_earlier_one(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "sft"
    shutil.copytree(run, path)
    (path / "mine.txt").write_text("kept", encoding="utf-8")
    sft.main([f"log_path={path}", "if_log_path_exists=delete", *KEYS, "max_steps=1", "trace=False"])
    assert names_in(path) == {*WRITTEN_BY_ANY_RUN, "mine.txt"} | (names_in(path) & {"tables.jsonl"})


def test_the_documented_list_of_files_is_complete() -> None:
    assert folder.__doc__ is not None
    documented = {line.split("  ")[0].split("/")[0].rstrip("/") for line in folder.__doc__.splitlines()[2:]}
    assert documented - {""} == set(RUN_FILES) - {"curves.png"}
