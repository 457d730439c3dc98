"""Tests that a run folder of an earlier version of this project can be read.

`earlier_run/` was written by the first four steps, at commit 76f961b, of

    python -m recipes.sft max_steps=4 lora_rank=1 train_attn=False train_mlp=False lr_schedule=constant
        learning_rate=1e-3 batch_size=2 test_size=8 eval_every=2 save_every=2 keep_checkpoints=1
        infrequent_eval_every=0 device=cpu log_path=runs/earlier

without its log, its page and the facts of its machine. The adapter names its base model in another folder.
`LATER_NLLS` are the losses of the next steps of the same command with max_steps=6, at that commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from programs import Programs
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from cookbook import embedded
from cookbook.config.cli import make_config
from cookbook.supervised import train
from recipes import export, report, sft

EARLIER_RUN = Path(__file__).parent / "earlier_run"
LATER_NLLS = {4: 5.593211988123452, 5: 4.637681945921883}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER_RUN, tmp_path / "earlier"))


def rows_of(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def test_the_fixture_is_small() -> None:
    assert sum(path.stat().st_size for path in EARLIER_RUN.rglob("*") if path.is_file()) < 60_000


def test_its_config_equals_that_of_a_new_run(run: Path, tmp_path: Path) -> None:
    config = make_config(
        train.Config, sft.DEFAULTS, [f"config={run / 'config.json'}", f"log_path={tmp_path}"]
    )
    assert (config.max_steps, config.lora_rank, config.train_mlp, config.learning_rate) == (4, 1, False, 1e-3)
    assert config.dataset_builder.common_config.batch_size == 2  # type: ignore[attr-defined]
    assert config.log_path == str(tmp_path)


def test_it_resumes_with_the_next_steps_of_the_earlier_version(run: Path) -> None:
    before = rows_of(run)
    summary = sft.main([f"config={run / 'config.json'}", f"log_path={run}", "max_steps=6"])
    assert summary.num_steps == 6
    after = rows_of(run)
    assert {step: after[step]["train/nll"] for step in range(4)} == {
        step: before[step]["train/nll"] for step in range(4)
    }
    assert {step: after[step]["train/nll"] for step in LATER_NLLS} == pytest.approx(LATER_NLLS, rel=1e-4)


def test_it_is_finished_if_no_steps_are_left(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert sft.main([f"config={run / 'config.json'}", f"log_path={run}"]).num_steps == 4
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_its_model_can_be_sampled(run: Path, programs: Programs) -> None:
    argv = [f"checkpoint={run}", "temperature=0", "max_tokens=16", "device=cpu"]
    done = programs.run("recipes.chat", *argv, stdin=b"What is the capital of Japan?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of Japan is Tokyo.\n"


def test_it_is_exported_as_an_adapter_that_peft_loads(run: Path, tmp_path: Path) -> None:
    export.main([f"checkpoint={run}", "which=last", f"to={tmp_path / 'adapter'}"])
    (original,) = run.glob("checkpoints/final/adapter_model.safetensors")
    weights, exported = load_file(original), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == exported.keys()
    assert all(np.array_equal(weights[name], exported[name]) for name in weights)
    base = AutoModelForCausalLM.from_pretrained(embedded.MODEL_PATH)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    loaded = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(weights)


def test_its_page_is_written(run: Path) -> None:
    page = report.main([str(run)])
    assert page == run / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "train/nll" in text
    assert "cookbook/tiny-chat" in text
