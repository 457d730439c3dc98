"""Tests of the estimate of a run: its sentences, its files, and the sizes of what a run then writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cookbook.config import cli
from cookbook.engine.cards import CARDS
from cookbook.runs.record import read_run
from cookbook.runs.summary import forecasts_of
from cookbook.supervised import estimate, memory_table
from cookbook.supervised.config import Config
from recipes import estimate as recipe
from recipes import sft

KEYS = ["max_steps=2", "batch_size=2", "test_size=2", "lora_rank=4", "infrequent_eval_every=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate") / "run"
    sft.main([f"log_path={folder}", *KEYS])
    return folder


def test_the_estimate_is_logged_before_the_model_is_loaded(run: Path) -> None:
    lines = (run / "train.log").read_text(encoding="utf-8").splitlines()
    (place,) = (i for i, line in enumerate(lines) if "before the model is loaded" in line)
    (loaded,) = (i for i, line in enumerate(lines) if "LoRA rank 4" in line)
    assert place < loaded


def test_trained_weights_and_the_size_of_a_checkpoint_are_as_estimated(run: Path) -> None:
    made = json.loads((run / "estimate.json").read_text(encoding="utf-8"))
    machine = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert f"{made['trained_weights']:,}" == machine["trained parameters"]
    tensors = (run / "checkpoints" / "final").rglob("*.safetensors")
    assert sum(path.stat().st_size for path in tensors) == pytest.approx(made["checkpoint_bytes"], rel=0.05)


def test_memory_and_time_of_a_run_are_compared_with_its_estimate(run: Path) -> None:
    found = [forecast.what for forecast in forecasts_of(read_run(run))]
    assert found == ["memory", "time of the training steps"]


@pytest.mark.slow
def test_the_recipe_estimates_for_a_card_that_is_not_here(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main([f"log_path={run}", *KEYS, "card=h100"])
    printed = capsys.readouterr().out
    assert "Estimate for H100 80 GB, 79.1 GiB" in printed
    assert "bfloat16" in printed
    assert "40% of its peak of 989 TFLOP/s" in " ".join(printed.split())
    assert [line for line in printed.splitlines() if len(line) > 80 and str(run) not in line] == []


def test_an_unknown_card_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["card=h10"])
    assert "card=h10 is not known. Did you mean `h100`" in capsys.readouterr().err


def test_a_failing_estimate_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = cli.make_config(Config, sft.DEFAULTS, [f"log_path={tmp_path}", *KEYS, "device=cuda:99"])
    assert estimate.log_estimate(config, config.data_builder()[0], 2) is None
    assert "No estimate of memory and time: device='cuda:99'" in caplog.text


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_shapes_have_the_published_number_of_weights(name: str, number: int) -> None:
    from cookbook.utils.pretrained import empty_causal_lm

    model = empty_causal_lm(memory_table.config_of(memory_table.SHAPES[name]))
    assert sum(weight.numel() for weight in model.parameters()) == number


@pytest.mark.slow
def test_the_table_has_a_row_for_each_method() -> None:
    shape = {**memory_table.SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"], "num_hidden_layers": 20}
    found = list(memory_table.rows({"owner/small": shape}, ["t4"]))
    assert [row.method for row in found] == ["LoRA", "fp8", "nf4", "full", "full, 8 bits"]
    lora, fp8, nf4, full, full_in_8_bits = (row.least for row in found)
    assert nf4 < fp8 < lora < full_in_8_bits < full
    assert CARDS["t4"].name in memory_table.markdown(found, ["t4"])
    assert all(row.longest == dict.fromkeys(memory_table.SIZES, row.context) for row in found)
    assert memory_table.longest_markdown(found).count("8,192+") == len(found) * len(memory_table.SIZES)


def test_the_largest_model_is_the_one_of_most_weights_whose_sequences_fit() -> None:
    def row(model: str, num_weights: int, *longest: int) -> memory_table.TableRow:
        lengths = dict(zip(memory_table.SIZES, longest, strict=True))
        return memory_table.TableRow(model, "LoRA", num_weights, 4096, 0.0, {}, lengths)

    found = [row("a/small", 1, 0, 2048, 4096, 4096, 4096), row("a/large", 2, 0, 0, 2047, 2048, 4096)]
    lines = memory_table.largest_markdown(found).splitlines()
    assert lines[2] == "| LoRA | - | small | small | large | large |"
    assert lines[4] == "| nf4 | - | - | - | - | - |"


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.2, "7 s"), (119, "2 min"), (3 * 3600 + 61, "3 h 01 min"), (200_000, "2 d 7 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert estimate.in_words(seconds) == words
