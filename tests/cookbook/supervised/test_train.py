"""Configs, the steps of a run, and the files it writes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch
from outside_world import remove_package
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from cookbook import ServiceClient
from cookbook.config import config_files
from cookbook.data import FromConversationFileBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset, SupervisedDatasetBuilder
from cookbook.engine.options import EngineOptions
from cookbook.errors import CheckpointError, ConfigError, DataError, TrainingError
from cookbook.eval.evaluators import (
    EvaluatorBuilder,
    SamplingClientEvaluator,
    TrainingClientEvaluator,
)
from cookbook.eval.samples import SamplesEvaluatorBuilder
from cookbook.supervised import train
from cookbook.types import Datum, ModelInput, SamplingParams
from cookbook.utils import jsonl
from cookbook.utils.tables import Table

MakeConfig = Callable[..., train.Config]


@pytest.fixture
def make_config(tmp_path: Path, tiny_qwen3: str, chats: list) -> MakeConfig:
    data = tmp_path / "chats.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8"
    )

    def make(**overrides: Any) -> train.Config:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=tiny_qwen3,
            batch_size=8,
            max_length=overrides.pop("max_length", 256),
            renderer_name=overrides.get("renderer_name"),
            system_prompt=overrides.get("system_prompt"),
        )
        builder = FromConversationFileBuilder(
            file_path=str(data),
            test_size=4,
            common_config=common,
            streaming=overrides.pop("streaming", False),
        )
        values: dict[str, Any] = {
            "log_path": str(tmp_path / "run"),
            "model_name": tiny_qwen3,
            "dataset_builder": builder,
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "max_steps": 2,
        }
        return train.Config(**(values | overrides))

    return make


def rows_of(config: train.Config) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in Path(config.log_path, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# -- config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "Invalid learning_rate=-1.0: must be finite and > 0"),
        ({"learning_rate": float("nan")}, "Invalid learning_rate=nan: must be finite and > 0"),
        ({"lora_rank": -1}, "Invalid lora_rank=-1: must be >= 0"),
        ({"lora_rank": 0, "train_mlp": False}, "lora_rank=0 trains every weight"),
        ({"lora_rank": 0, "quantization": "nf4"}, "quantization=nf4 needs frozen base weights"),
        ({"max_tokens_per_microbatch": 0}, "Invalid max_tokens_per_microbatch=0: must be >= 1"),
        ({"num_epochs": 0}, "Invalid num_epochs=0: must be >= 1"),
        ({"max_steps": 0}, "Invalid max_steps=0: must be >= 1"),
        ({"save_every": -1}, "Invalid save_every=-1: must be >= 0"),
        ({"keep_checkpoints": 0}, "Invalid keep_checkpoints=0: must be >= 1"),
        ({"adam_beta2": 1.0}, "Invalid adam_beta2=1.0: must be >= 0 and < 1"),
        ({"train_attn": False, "train_mlp": False, "train_unembed": False}, "Nothing to train"),
    ],
)
def test_invalid_values_are_errors_before_anything_is_loaded(
    make_config: MakeConfig, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(model_name="cookbook/tiny-chat", renderer_name="x", **values)


def test_a_value_of_the_wrong_type_or_an_unknown_key_is_an_error(make_config: MakeConfig) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        make_config(learning_rate="fast")
    with pytest.raises(TypeError, match="lr_schedule"):
        make_config(lr_schedule="sawtooth")
    with pytest.raises(TypeError, match="learning_rat"):
        make_config(learning_rat=1.0)


def test_the_home_directory_in_log_path_is_expanded(make_config: MakeConfig) -> None:
    assert make_config(log_path="~/runs/a").log_path == str(Path.home() / "runs" / "a")


def test_engine_options_come_from_the_config(make_config: MakeConfig) -> None:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_tokens_per_microbatch": 7, "gradient_checkpointing": "on",
        "compile": True, "shard": "none", "deterministic": True, "optimizer_bits": 8,
    }  # fmt: skip
    assert make_config(**values).engine_options() == EngineOptions(**values)


def test_a_config_is_recorded_under_the_path_that_users_import(make_config: MakeConfig) -> None:
    recorded = config_files.to_json(make_config())
    assert recorded["_type"] == "cookbook.supervised.train:Config"
    assert pickle.loads(pickle.dumps(train.Config)) is train.Config


# -- a run ------------------------------------------------------------------------------------


def test_the_call_in_the_documentation_works(
    tmp_path: Path, tiny_qwen3: str, make_config: MakeConfig
) -> None:
    dataset_builder = make_config().dataset_builder
    asyncio.run(
        train.main(
            train.Config(
                log_path=str(tmp_path / "documented"),
                model_name=tiny_qwen3,
                dataset_builder=dataset_builder,
                learning_rate=1e-4,
                lora_rank=32,
                num_epochs=1,
                save_every=20,
                eval_every=10,
            )
        )
    )
    assert (tmp_path / "documented" / "checkpoints" / "final").is_dir()


@pytest.mark.slow
def test_a_run_writes_the_files_that_the_documentation_lists(
    make_config: MakeConfig, tiny_qwen3: str
) -> None:
    config = make_config(save_every=1, max_steps=3)
    summary = asyncio.run(train.main(config))
    folder = Path(config.log_path)
    assert summary.is_finished
    assert summary.log_path == folder
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {
        "train/nll",
        "optim/learning_rate",
        "optim/grad_norm",
        "data/tokens",
        "data/trained_tokens",
    } <= set(rows[0])
    evaluated = ("test/nll", "test/bits_per_byte", "test/token_accuracy")
    assert {path: summary.metrics[path] for path in evaluated} == {path: rows[-1][path] for path in evaluated}
    assert rows[-1]["test/nll"] < rows[0]["test/nll"]
    checkpoints = [
        json.loads(line) for line in (folder / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["name"], row["step"]) for row in checkpoints] == [("000001", 1), ("000002", 2), ("final", 3)]
    assert "Finished after 3 steps" in (folder / "train.log").read_text(encoding="utf-8")
    assert (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["renderer_name"] == "chat_template"
    )
    assert not list((folder / "checkpoints").glob(".*"))

    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    loaded = PeftModel.from_pretrained(base, folder / checkpoints[-1]["path"])
    tokens = [5, 6, 7, 8, 9]
    expected = loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)
    sampler = ServiceClient().create_sampling_client(model_path=folder / checkpoints[-1]["path"])
    found = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()
    for position in range(1, len(tokens)):
        assert found[position] == pytest.approx(float(expected[position - 1, tokens[position]]), abs=1e-4)


def test_the_loss_of_a_step_is_the_token_mean_of_plain_torch(
    make_config: MakeConfig, tiny_qwen3: str
) -> None:
    """Step 0 sees the initial model, so its NLL is that of transformers on the same batch."""
    config = make_config(max_steps=1)
    asyncio.run(train.main(config))
    dataset, _ = config.dataset_builder()
    dataset.set_epoch(config.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    loss_sum = weight_sum = 0.0
    for datum in dataset.get_batch(0):
        logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()  # type: ignore[union-attr]
        weights = datum.loss_fn_inputs["weights"].to_torch()  # type: ignore[union-attr]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss_sum += float((weights * losses).sum())
        weight_sum += float(weights.sum())
    row = rows_of(config)[0]
    assert row["train/nll"] == pytest.approx(loss_sum / weight_sum, rel=1e-5)
    assert row["data/trained_tokens"] == weight_sum


@pytest.mark.slow
def test_learning_rates_follow_the_schedule(make_config: MakeConfig) -> None:
    config = make_config(max_steps=4, lr_schedule="linear", warmup_steps=2, num_epochs=2)
    asyncio.run(train.main(config))
    rates = [row["optim/learning_rate"] for row in rows_of(config)[:-1]]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_training_can_start_from_the_weights_of_a_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    first = asyncio.run(train.main(make_config(max_steps=3)))
    config = make_config(log_path=str(tmp_path / "second"), load_checkpoint_path=str(first.checkpoint_path))
    asyncio.run(train.main(config))
    assert rows_of(config)[0]["test/nll"] == pytest.approx(first.metrics["test/nll"], rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_one_error(make_config: MakeConfig, tmp_path: Path) -> None:
    first = asyncio.run(train.main(make_config()))
    config = make_config(
        log_path=str(tmp_path / "second"), load_checkpoint_path=str(first.checkpoint_path), lora_rank=8
    )
    with pytest.raises(CheckpointError, match="does not fit rank 8"):
        asyncio.run(train.main(config))


def test_a_missing_initial_checkpoint_is_an_error_before_a_model_is_loaded(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        model_name="owner/nowhere", renderer_name="x", load_checkpoint_path=str(tmp_path / "none")
    )
    with pytest.raises(CheckpointError, match="none does not exist"):
        asyncio.run(train.main(config))


def test_data_tokenized_for_another_model_are_refused(
    make_config: MakeConfig, make_model_folder: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.add_tokens(["<|other|>"])
    other = make_model_folder(tmp_path / "other", vocab_size=len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="whose vocabulary is not that of"):
        asyncio.run(train.main(make_config(model_name=str(other))))


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_step_can_be_corrected_in_the_same_folder(
    make_config: MakeConfig,
) -> None:
    with pytest.raises(DataError):
        asyncio.run(train.main(make_config(max_length=3)))
    assert asyncio.run(train.main(make_config(max_length=200))).is_finished


def test_a_damaged_checkpoint_is_one_error_that_names_it(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2, save_every=1)
    asyncio.run(train.main(config))
    folder = Path(config.log_path) / "checkpoints"
    (folder / "final").rename(folder / "gone")
    file = folder / "000001" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="000001 is damaged"):
        asyncio.run(train.main(config))


def test_a_max_length_that_leaves_nothing_to_train_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match="Nothing is left to train on"):
        asyncio.run(train.main(make_config(max_length=3)))


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_advice(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="Training diverged at step"):
        asyncio.run(
            train.main(make_config(learning_rate=1e30, max_steps=9, num_epochs=9, grad_clip_norm=0.0))
        )


@pytest.mark.slow
def test_a_run_whose_logits_become_and_stay_equal_has_diverged(make_config: MakeConfig) -> None:
    """Squares overflow, so norms yield zeros, and all checked numbers are finite."""
    with pytest.raises(
        TrainingError, match=r"diverged at step \d: train/nll stays at 5.9\d*, the logarithm of"
    ):
        asyncio.run(train.main(make_config(learning_rate=1e3, lora_rank=0, max_steps=9, num_epochs=9)))


@pytest.fixture
def without_a_head(tiny_qwen3: str, tmp_path: Path) -> str:
    """A model whose projection to the vocabulary is zero, as in some new models."""
    shutil.copytree(tiny_qwen3, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_whose_logits_are_equal_only_at_first_has_not_diverged(
    make_config: MakeConfig, without_a_head: str
) -> None:
    config = make_config(model_name=without_a_head, max_steps=3, num_epochs=9)
    assert asyncio.run(train.main(config)).is_finished
    first, *later = [row["train/nll"] for row in rows_of(config) if "train/nll" in row]
    num_logits = ServiceClient(device="cpu").create_lora_training_client(without_a_head, rank=1)
    uniform = np.log(num_logits.get_info().model_data.num_logits)
    assert first == pytest.approx(uniform, rel=1e-6)
    assert all(abs(nll - uniform) > 1e-3 for nll in later)


def test_a_model_whose_logits_stay_equal_has_diverged(make_config: MakeConfig, without_a_head: str) -> None:
    config = make_config(model_name=without_a_head, train_unembed=False, max_steps=9, num_epochs=9)
    with pytest.raises(TrainingError, match="Training diverged at step 1: train/nll stays at"):
        asyncio.run(train.main(config))


# -- custom datasets and evaluators -----------------------------------------------------------


class HoleyDataset(SupervisedDataset):
    """Batch 1 has no trained token."""

    def get_batch(self, index: int) -> list[Datum]:
        weight = 0.0 if index == 1 else 1.0
        return [Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weights": [0.0, weight]})]

    def __len__(self) -> int:
        return 3


class HoleyBuilder(SupervisedDatasetBuilder):
    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        return HoleyDataset(), None


@pytest.mark.slow
def test_a_batch_without_a_trained_token_is_skipped_with_a_warning(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(dataset_builder=HoleyBuilder(), max_steps=None)
    asyncio.run(train.main(config))
    rows = rows_of(config)
    assert ["train/nll" in row for row in rows] == [True, False, True, False]
    assert "Step 1 is skipped" in caplog.text


class StepCounter(TrainingClientEvaluator):
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls = calls
        self._name = name

    async def __call__(self, training_client: Any) -> dict[str, float]:
        self._calls.append(self._name)
        return {f"test/{self._name}": float(len(self._calls))}


class SnapshotKeeper(SamplingClientEvaluator):
    def __init__(self, clients: list[Any]) -> None:
        self._clients = clients

    async def __call__(self, sampling_client: Any) -> dict[str, float]:
        self._clients.append(sampling_client)
        sampled = await sampling_client.sample_async(
            ModelInput.from_ints([5, 6]), 1, SamplingParams(max_tokens=2, seed=0)
        )
        return {"test/num_tokens": float(len(sampled.sequences[0].tokens))}


def test_evaluators_run_at_the_start_at_their_cadence_and_at_the_end(make_config: MakeConfig) -> None:
    calls: list[str] = []
    clients: list[Any] = []
    config = make_config(
        max_steps=5,
        num_epochs=2,
        eval_every=2,
        infrequent_eval_every=3,
        evaluator_builders=[lambda: StepCounter(calls, "often")],
        infrequent_evaluator_builders=[
            lambda: StepCounter(calls, "seldom"),
            lambda: SnapshotKeeper(clients),
            lambda: SnapshotKeeper(clients),
        ],
    )
    asyncio.run(train.main(config))
    rows = rows_of(config)
    assert [row["step"] for row in rows if "test/often" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows if "test/seldom" in row] == [0, 3, 5]
    assert [row["step"] for row in rows if "test/nll" in row] == [0, 2, 4, 5]
    assert clients[0] is clients[1], "evaluators of one step share a snapshot"
    assert clients[0] is not clients[2]


@pytest.mark.slow
def test_a_cadence_of_zero_is_off(make_config: MakeConfig) -> None:
    config = make_config(eval_every=0)
    asyncio.run(train.main(config))
    assert not any("test/nll" in row for row in rows_of(config))


@pytest.mark.slow
def test_samples_are_shown_before_training_half_way_and_after_it(
    make_config: MakeConfig, tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    builder = SamplesEvaluatorBuilder(prompts=["How many legs?"], max_tokens=5)
    config = make_config(infrequent_evaluator_builders=[builder])
    with caplog.at_level(logging.INFO, "cookbook"):
        asyncio.run(train.main(config))
    assert caplog.text.count("user: How many legs?") == 3
    rows = jsonl.read(Path(config.log_path, "tables.jsonl"))
    assert [(row["step"], row["table"], row["row"]["prompt"]) for row in rows] == [
        (step, "samples", "How many legs?") for step in (0, 1, 2)
    ]
    assert rows[0]["row"].keys() == {"prompt", "reply", "stop_reason", "tokens"}


class Returning(TrainingClientEvaluator):
    def __init__(self, result: Any) -> None:
        self._result = result

    async def __call__(self, training_client: Any) -> Any:
        return self._result


@pytest.mark.slow
def test_an_evaluator_may_return_numpy_numbers_and_other_values_are_errors_that_name_it(
    make_config: MakeConfig,
) -> None:
    config = make_config(evaluator_builders=[lambda: Returning({"test/x": np.float32(1.5)})])
    assert asyncio.run(train.main(config)).metrics["test/x"] == 1.5
    for result in (None, {"test/x": "high"}):
        config = make_config(
            evaluator_builders=[lambda result=result: Returning(result)],
            if_log_path_exists="delete",
            on_evaluator_error="raise",
        )
        with pytest.raises(TrainingError, match="Returning returned"):
            asyncio.run(train.main(config))


class FailsAtTheEnd(TrainingClientEvaluator):
    num_calls = 0

    async def __call__(self, training_client: Any) -> dict[str, float]:
        FailsAtTheEnd.num_calls += 1
        if FailsAtTheEnd.num_calls == 2:
            raise ValueError("no such metric")
        return {}


@pytest.mark.slow
def test_a_final_evaluation_that_fails_costs_no_training(make_config: MakeConfig) -> None:
    FailsAtTheEnd.num_calls = 0
    config = make_config(evaluator_builders=[FailsAtTheEnd], on_evaluator_error="raise")
    with pytest.raises(ValueError, match="no such metric"):
        asyncio.run(train.main(config))
    assert Path(config.log_path, "checkpoints", "final").is_dir()
    summary = asyncio.run(train.main(config))
    assert summary.is_finished
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2]
    assert "test/nll" in summary.metrics


@pytest.mark.slow
def test_a_failing_evaluator_is_a_warning_and_the_run_continues(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    FailsAtTheEnd.num_calls = 0
    calls: list[str] = []
    config = make_config(evaluator_builders=[FailsAtTheEnd, lambda: StepCounter(calls, "after")])
    summary = asyncio.run(train.main(config))
    assert summary.is_finished
    first, *_, last = rows_of(config)
    assert "eval/failures" not in first
    assert last["eval/failures"] == summary.metrics["eval/failures"] == 1
    assert {"test/nll", "test/after"} <= last.keys(), "the others of the step still run"
    printed = capsys.readouterr().out
    assert "FailsAtTheEnd failed and is skipped in this step: ValueError: no such metric" in printed
    assert "Traceback" not in printed
    log = Path(config.log_path, "train.log").read_text(encoding="utf-8")
    assert "Traceback" in log.partition("FailsAtTheEnd failed")[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
def test_an_interruption_is_not_a_failure_of_the_evaluator(make_config: MakeConfig, error: Any) -> None:
    class Interrupted(TrainingClientEvaluator):
        async def __call__(self, training_client: Any) -> dict[str, float]:
            raise error

    with pytest.raises(error):
        asyncio.run(train.main(make_config(evaluator_builders=[Interrupted])))


@pytest.mark.slow
def test_on_evaluator_error_may_change_when_a_run_resumes(make_config: MakeConfig) -> None:
    FailsAtTheEnd.num_calls = 0
    with pytest.raises(ValueError, match="no such metric"):
        asyncio.run(train.main(make_config(evaluator_builders=[FailsAtTheEnd], on_evaluator_error="raise")))
    FailsAtTheEnd.num_calls = 1
    summary = asyncio.run(train.main(make_config(evaluator_builders=[FailsAtTheEnd])))
    assert summary.is_finished
    assert summary.metrics["eval/failures"] == 1


def test_two_evaluators_do_not_overwrite_each_other(make_config: MakeConfig) -> None:
    twice = [lambda: Returning({"test/x": 1.0}), lambda: Returning({"test/x": 2.0})]
    config = make_config(evaluator_builders=twice, on_evaluator_error="raise")
    with pytest.raises(TrainingError, match="`test/x`, which another evaluator"):
        asyncio.run(train.main(config))


@pytest.mark.slow
def test_tables_with_one_name_and_equal_columns_are_merged(make_config: MakeConfig) -> None:
    first, second, other = Table(["a"], [["1"]]), Table(["a"], [["2"]]), Table(["b"], [["3"]])
    config = make_config(
        evaluator_builders=[lambda: Returning({"x": first}), lambda: Returning({"x": second})], max_steps=1
    )
    asyncio.run(train.main(config))
    rows = jsonl.read(Path(config.log_path, "tables.jsonl"))
    assert [row["row"] for row in rows if row["step"] == 0] == [{"a": "1"}, {"a": "2"}]
    config = make_config(
        evaluator_builders=[lambda: Returning({"x": first}), lambda: Returning({"x": other})],
        if_log_path_exists="delete",
        on_evaluator_error="raise",
    )
    with pytest.raises(TrainingError, match="`x`, which another evaluator"):
        asyncio.run(train.main(config))


@pytest.mark.slow
def test_a_run_refuses_to_resume_on_data_of_changed_length(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2, save_every=1)
    asyncio.run(train.main(config))
    shutil.rmtree(Path(config.log_path, "checkpoints", "final"))
    data = Path(config.dataset_builder.file_path)  # type: ignore[attr-defined]
    data.write_text(
        "".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8"
    )
    with pytest.raises(DataError, match="The data have changed"):
        asyncio.run(train.main(config))


def test_a_run_refuses_to_resume_on_data_of_changed_content(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2, save_every=1)
    asyncio.run(train.main(config))
    shutil.rmtree(Path(config.log_path, "checkpoints", "final"))
    data = Path(config.dataset_builder.file_path)  # type: ignore[attr-defined]
    data.write_text(data.read_text(encoding="utf-8").replace("spider", "beetle"), encoding="utf-8")
    with pytest.raises(DataError, match="The data have changed"):
        asyncio.run(train.main(config))


@pytest.mark.slow
def test_truncated_and_dropped_rows_are_reported_before_training(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(max_length=40, max_steps=1)
    asyncio.run(train.main(config))
    before, training, _ = caplog.text.partition("Training on")
    assert "truncated to max_length=40" in before
    assert training
    report = json.loads(Path(config.log_path, "data.json").read_text(encoding="utf-8"))["sources"][0]
    assert report["name"] == "chats.jsonl"
    assert report["rows"] == 24
    assert report["truncated"] > 0


@pytest.mark.slow
def test_examples_longer_than_the_context_are_refused_before_training(make_config: MakeConfig) -> None:
    long = [{"role": "user", "content": "legs?"}, {"role": "assistant", "content": "eight " * 300}]
    config = make_config(max_length=None)
    data = Path(config.dataset_builder.file_path)  # type: ignore[attr-defined]
    data.write_text(
        data.read_text(encoding="utf-8") + json.dumps({"messages": long}) + "\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="reads 256 at most. Set max_length=256"):
        asyncio.run(train.main(config))
    assert asyncio.run(train.main(make_config(max_length=256))).is_finished


# -- streams ----------------------------------------------------------------------------------


def test_a_run_trains_on_a_stream_to_its_end(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        streaming=True, max_steps=None, num_epochs=2, lr_schedule="constant", max_length=40, save_every=4
    )
    summary = asyncio.run(train.main(config))
    assert (summary.num_steps, summary.is_finished) == (6, True)  # 20 rows in batches of 8, twice
    assert [row.get("epoch") for row in rows_of(config)] == [0, 0, 0, 1, 1, 1, None]
    records = jsonl.read(Path(config.log_path, "checkpoints.jsonl"))
    assert [(r["step"], r["epoch"], r["batch"]) for r in records] == [(4, 1, 1), (6, 1, 3)]
    assert "truncated examples" in caplog.text.partition("Training data:")[2]
    assert asyncio.run(train.main(config)).num_steps == 6


@pytest.mark.slow
def test_a_run_refuses_to_resume_on_a_changed_stream(make_config: MakeConfig) -> None:
    config = make_config(streaming=True, max_steps=2, save_every=1)
    asyncio.run(train.main(config))
    shutil.rmtree(Path(config.log_path, "checkpoints", "final"))
    data = Path(config.dataset_builder.file_path)  # type: ignore[attr-defined]
    data.write_text(data.read_text(encoding="utf-8").replace("spider", "beetle"), encoding="utf-8")
    with pytest.raises(DataError, match="The data have changed"):
        asyncio.run(train.main(config))


@pytest.mark.slow
def test_a_decaying_rate_requires_max_steps_on_a_stream(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="max_steps="):
        asyncio.run(train.main(make_config(streaming=True, max_steps=None)))
    summary = asyncio.run(train.main(make_config(streaming=True, max_steps=5)))
    assert summary.num_steps == 3
    assert "The data ended after 3 of 5 steps" in caplog.text


# -- loggers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"trackio_project": "pirates"}, "trackio")],
)
def test_a_logger_that_is_not_installed_names_its_extra_before_anything_is_loaded(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], package: str
) -> None:
    remove_package(monkeypatch, package)
    config = make_config(**values)
    Path(config.dataset_builder.file_path).unlink()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"pip install 'sft-cookbook\[{package}\]'"):
        asyncio.run(train.main(config))


@pytest.mark.slow
def test_tensorboard_has_the_metrics_of_a_run(make_config: MakeConfig) -> None:
    config = make_config(tensorboard=True)
    asyncio.run(train.main(config))
    events = EventAccumulator(str(Path(config.log_path, "tensorboard"))).Reload()
    for metric in ("train/nll", "test/nll"):
        logged = [(row["step"], row[metric]) for row in rows_of(config) if metric in row]
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(metric)]
        assert logged == shown


# -- the chat format --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_different_chat_format_than_that_of_the_initial_checkpoint_is_reported(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_config(log_path=str(tmp_path / "first"), system_prompt="Be brief.")
    saved = asyncio.run(train.main(first)).checkpoint_path
    again = {"load_checkpoint_path": str(saved), "max_steps": 1}
    asyncio.run(train.main(make_config(log_path=str(tmp_path / "same"), system_prompt="Be brief.", **again)))
    assert "was trained with" not in caplog.text
    other = make_config(log_path=str(tmp_path / "other"), renderer_name="role_colon", **again)
    asyncio.run(train.main(other))
    assert "was trained with renderer_name=chat_template, this run trains with role_colon" in caplog.text
    assert "was trained with system_prompt=Be brief., this run trains with None" in caplog.text


@pytest.mark.slow
def test_data_in_a_different_chat_format_than_the_recorded_one_are_reported(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    builder = make_config(renderer_name="role_colon").dataset_builder
    asyncio.run(train.main(make_config(dataset_builder=builder, max_steps=1)))
    assert "rendered with renderer_name=role_colon, but checkpoints will record chat_template" in caplog.text


@pytest.mark.slow
def test_an_evaluator_builder_may_be_a_chz_class(make_config: MakeConfig) -> None:
    calls: list[str] = []

    @chz.chz
    class CounterBuilder(EvaluatorBuilder):
        name: str = "counted"

        def __call__(self) -> StepCounter:
            return StepCounter(calls, self.name)

    asyncio.run(train.main(make_config(evaluator_builders=[CounterBuilder()])))
    assert calls == ["counted"] * 2


class FailingTerminal(io.StringIO):
    """Standard output on a disk that becomes full when a text is printed."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self._last = last

    def write(self, text: str) -> int:
        if self._last in text or self._last in self.getvalue():
            super().write(text)
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.cases(1)
@pytest.mark.parametrize("last", ["step 1/2", "After 2 steps", "Finished"])
def test_a_run_whose_end_cannot_be_printed_is_finished(make_config: MakeConfig, last: str) -> None:
    config = make_config(eval_every=1)
    with contextlib.redirect_stdout(FailingTerminal(last)):
        summary = asyncio.run(train.main(config))
    assert summary.is_finished
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2]
    assert summary.metrics["test/nll"] == rows_of(config)[-1]["test/nll"]
    log = Path(config.log_path, "train.log").read_text(encoding="utf-8")
    assert log.count("Finished after 2 steps") == 1
    assert Path(config.log_path, "report.html").exists()
    asyncio.run(train.main(config))  # logs that it is finished
    assert len(rows_of(config)) == 3
