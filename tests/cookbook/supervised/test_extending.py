"""A run is extended by more steps, more epochs or another batch size."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from waiting import wait_until

from cookbook.report import write_report
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.supervised.schedules import learning_rate_at
from cookbook.utils import jsonl

RATE = 1e-2
NUM_ROWS = 20  # in an epoch


class Runs:
    """Runs one folder after the other, each in a separate process."""

    def __init__(self, server: Any, folder: Path, model: str, data: Path) -> None:
        self._server = server
        self.folder = folder
        self._model = model
        self._data = data

    def config(
        self, name: str, batch_size: int = 4, data: dict[str, Any] | None = None, **values: Any
    ) -> dict:
        return {
            "log_path": str(self.folder / name),
            "model_name": self._model,
            "dataset_builder": {
                "_type": "cookbook.data:NamedChatDatasetBuilder",
                "dataset": str(self._data),
                "test_size": 4,
                "common_config": {"model_name_for_tokenizer": self._model, "batch_size": batch_size},
                **(data or {}),
            },
            "learning_rate": RATE,
            "lora_rank": 4,
            "num_epochs": 4,
            "save_every": 2,
            "eval_every": 3,
            **values,
        }

    def __call__(self, name: str, killed_after_rows: int | None = None, **values: Any) -> Path:
        """Returns the folder of a run that succeeded, or was killed after it had logged so many rows."""
        config = self.config(name, **values)
        folder = Path(config["log_path"])
        if killed_after_rows is None:
            assert self._server.run(config) == 0, self.printed(name)
        else:
            code = self._server.run(config, meanwhile=lambda child: _kill(child, folder, killed_after_rows))
            assert code == -signal.SIGKILL
        return folder

    def refused(self, name: str, **values: Any) -> str:
        """Returns the last lines of a run that fails."""
        assert self._server.run(self.config(name, **values)) == 1, self.printed(name)
        return self.printed(name).splitlines()[-1]

    def printed(self, name: str) -> str:
        return Path(f"{self.folder / name}.out").read_text(encoding="utf-8")


def _kill(child: int, folder: Path, num_rows: int) -> None:
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= num_rows)
    os.kill(child, signal.SIGKILL)


@pytest.fixture
def runs(server: Any, tmp_path: Path, tiny_qwen3: str, chats: list) -> Runs:
    data = tmp_path / "chats.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8"
    )
    return Runs(server, tmp_path, tiny_qwen3, data)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in jsonl.read(folder / "metrics.jsonl")
    ]


def assert_same_end(folder: Path, other: Path) -> None:
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors, others = (load_file(run / "checkpoints" / "final" / file) for run in (folder, other))
        assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
            name: tensor.tobytes() for name, tensor in others.items()
        }, file


# -- more steps -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_extended_by_more_steps_equals_one_that_never_stopped(runs: Runs) -> None:
    whole = runs("whole", max_steps=8, lr_schedule="constant")
    runs("extended", max_steps=3, lr_schedule="constant")
    runs("extended", max_steps=6, lr_schedule="constant")
    extended = runs("extended", max_steps=8, lr_schedule="constant")
    assert_same_end(extended, whole)
    assert rows_of(extended) == rows_of(whole)
    assert (
        "Continuing from step 3 of a finished run to step 6; the learning rate stays at 0.01."
        in runs.printed("extended")
    )


@pytest.mark.slow
def test_the_schedule_ends_at_the_new_last_step_and_earlier_rows_stay(runs: Runs) -> None:
    """The final evaluation of the first run, not due by its cadence, stays in the row of its step."""
    folder = runs("run", max_steps=4)
    before = rows_of(folder)
    runs("run", max_steps=7)
    after = rows_of(folder)
    assert [row["step"] for row in after] == list(range(8))
    assert after[:4] == before[:4]
    assert after[4].items() >= before[4].items()
    assert {"test/nll", "train/nll"} <= after[4].keys()
    rates = [learning_rate_at(step, 4 if step < 4 else 7, RATE, "linear") for step in range(7)]
    assert [row["optim/learning_rate"] for row in after[:-1]] == pytest.approx(rates)
    assert (
        "Continuing from step 4 of a finished run to step 7; the linear schedule now ends at 7: the learning "
        "rate goes from 0 to 0.00429." in runs.printed("run")
    )
    (change,) = jsonl.read(folder / "config_changes.jsonl")
    assert (change["step"], change["changes"]) == (4, {"max_steps": {"was": 4, "now": 7}})
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_steps"] == 7
    assert {row["name"] for row in jsonl.read(folder / "checkpoints.jsonl")} >= {"000004", "final"}
    runs("run", max_steps=7)
    assert rows_of(folder) == after
    assert "This run is finished after 7 steps" in runs.printed("run")
    assert write_report(folder).is_file()


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_another_length(runs: Runs) -> None:
    folder = runs("run", killed_after_rows=5, max_steps=9)
    last = CheckpointLog(folder).last()
    assert last is not None
    runs("run", max_steps=6)
    assert f"Continuing from step {last.step} of an unfinished run to step 6" in runs.printed("run")
    assert [row["step"] for row in rows_of(folder)] == list(range(7))


# -- another batch size, more epochs ----------------------------------------------------------

STAGES: list[dict[str, Any]] = [
    {"max_steps": 3},  # 12 rows
    {"max_steps": 6, "batch_size": 3},  # in the second epoch; the last batch of the first one has 2 rows
    {"max_steps": 9, "batch_size": 8},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["rendered", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixed", "streamed"))]
)
def test_a_run_that_is_extended_several_times_and_killed_equals_one_that_was_not_killed(
    runs: Runs, chats: list, kind: str
) -> None:
    data: dict[str, Any] = {}
    if kind == "streamed":
        data = {"streaming": True, "buffer_size": 7}
    elif kind == "mixed":
        other = runs.folder / "others.jsonl"
        lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
        other.write_text("".join(lines[:9]), encoding="utf-8")
        data = {"dataset": f"{runs.folder / 'chats.jsonl'},{other}", "weights": [2, 1]}
    for stage in STAGES:
        whole = runs("whole", data=data, **stage)
    for number, stage in enumerate(STAGES):
        if number:
            runs("killed", killed_after_rows=3 * number + 2, data=data, **stage)
        killed = runs("killed", data=data, **stage)
    assert_same_end(killed, whole)
    assert rows_of(killed) == rows_of(whole)
    sequences = [row["data/sequences"] for row in rows_of(whole)[:-1]]
    assert sequences[3:6] == ([3, 3, 3] if kind == "mixed" else [3, 3, 2])
    positions = [(row["epoch"], row["row"]) for row in jsonl.read(whole / "checkpoints.jsonl")]
    if kind == "rendered":
        assert positions == [(0, 8), (0, 12), (0, 15), (1, 0), (1, 16), (2, 0)]
    assert "Batches have 3 rows from here on, 4 before: the next is row 13" in runs.printed("whole")


@pytest.mark.slow
def test_more_epochs_extend_a_run_and_its_end_is_counted_in_rows(runs: Runs) -> None:
    """Two steps of 4 rows are followed by 12 rows in steps of 8, and by three epochs of 3 steps."""
    folder = runs("run", num_epochs=1, max_steps=2)
    runs("run", num_epochs=4, batch_size=8)
    assert [row["step"] for row in rows_of(folder)] == list(range(2 + 2 + 3 * 3 + 1))
    assert [row["data/sequences"] for row in rows_of(folder)[2:7]] == [8, 4, 8, 8, 4]
    assert rows_of(folder)[-2]["epoch"] == 3


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_can_be_extended(runs: Runs) -> None:
    """Earlier versions recorded batches, but no number of rows."""
    for name in ("old", "new"):
        folder = runs(name, max_steps=3)
    old = runs.folder / "old"
    records = jsonl.read(old / "checkpoints.jsonl")
    assert all(record.pop("row") == 4 * record["batch"] for record in records)
    jsonl.rewrite(old / "checkpoints.jsonl", records)
    report = json.loads((old / "data.json").read_text(encoding="utf-8"))
    assert report.pop("rows") == NUM_ROWS
    (old / "data.json").write_text(json.dumps(report), encoding="utf-8")
    runs("old", killed_after_rows=4, max_steps=9, batch_size=3, save_every=0)
    for name in ("old", "new"):
        folder = runs(name, max_steps=9, batch_size=3, save_every=0)
    assert_same_end(old, folder)


@pytest.mark.slow
def test_a_run_begun_when_its_model_had_no_renderer_of_its_own_continues_with_its_chat_template(
    server: Any, runs: Runs, tiny_qwen3: str
) -> None:
    model = runs.folder / "Qwen" / "Qwen3-0.6B"  # a name with the default renderer `qwen3`
    shutil.copytree(tiny_qwen3, model)
    renamed = Runs(server, runs.folder, str(model), runs.folder / "chats.jsonl")
    begun: dict[str, Any] = {"renderer_name": "chat_template", "data": {"common_config": {
        "model_name_for_tokenizer": str(model), "batch_size": 4, "renderer_name": "chat_template",
    }}}  # fmt: skip
    renamed("old", max_steps=3, **begun)
    message = renamed.refused("old", max_steps=6, renderer_name="qwen3")
    assert "renderer_name" in renamed.printed("old"), message
    folder = renamed("old", max_steps=6)
    assert [row["step"] for row in rows_of(folder)] == list(range(7))
    recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert recorded["renderer_name"] == "chat_template"
    assert recorded["dataset_builder"]["common_config"]["renderer_name"] == "chat_template"
    begun_now = json.loads((renamed("now", max_steps=1) / "config.json").read_text(encoding="utf-8"))
    assert begun_now["renderer_name"] == "qwen3"


# -- the best, and patience -------------------------------------------------------------------

STOPPING = {
    "learning_rate": 3e-2,
    "lr_schedule": "constant",
    "num_epochs": 6,
    "eval_every": 1,
    "save_every": 3,
    "keep_checkpoints": 2,
}


@pytest.mark.slow
def test_extending_a_run_that_is_out_of_patience_restarts_patience_and_keeps_the_best(runs: Runs) -> None:
    values = {**STOPPING, "early_stopping_patience": 2}
    folder = runs("run", **values)
    stopped = len(rows_of(folder)) - 1
    nlls = {row["step"]: row["test/nll"] for row in rows_of(folder)}
    best = min((step for step in nlls if step), key=nlls.__getitem__)
    assert best == stopped - 2
    refused = runs.refused("run", **values | {"early_stopping_patience": 1})
    assert "stopped early after" in refused
    assert "early_stopping_patience=1" in refused
    whole = shutil.copytree(folder, runs.folder / "whole")
    longer = {**values, "num_epochs": 12}
    runs("whole", **longer)
    runs("run", killed_after_rows=stopped + 2, **longer)
    runs("run", **longer)
    assert_same_end(folder, whole)
    assert rows_of(folder) == rows_of(whole)
    nlls = {row["step"]: row["test/nll"] for row in rows_of(folder)}
    new_best = min((step for step in nlls if step), key=nlls.__getitem__)
    counted_from = max(new_best, stopped)
    assert max(nlls) == counted_from + 2
    record = CheckpointLog(folder).best()
    assert record is not None
    assert (record.step, record.value) == (new_best, nlls[new_best])


@pytest.mark.slow
def test_a_run_that_is_out_of_patience_resumes_with_a_larger_patience(runs: Runs) -> None:
    folder = runs("run", **STOPPING, early_stopping_patience=2)
    stopped = len(rows_of(folder)) - 1
    runs("run", **STOPPING, early_stopping_patience=3)
    assert len(rows_of(folder)) - 1 > stopped
    never_stopped = runs("never-stopped", **STOPPING, early_stopping_patience=3)
    assert rows_of(folder) == rows_of(never_stopped)
    assert_same_end(folder, never_stopped)


# -- what may change, and what may not ----------------------------------------------------------


@pytest.mark.slow
def test_settings_without_effect_on_weights_may_change_and_those_that_affect_rounding_are_reported(
    runs: Runs,
) -> None:
    runs("run", killed_after_rows=4, max_steps=6)
    samples = {"_type": "cookbook.eval.samples:SamplesEvaluatorBuilder", "max_tokens": 2}
    folder = runs(
        "run",
        max_steps=6,
        save_every=5,
        eval_every=2,
        keep_checkpoints=1,
        infrequent_evaluator_builders=[samples],
        submit_ahead=0,
        max_tokens_per_microbatch=64,
        trace=True,
    )
    assert (
        "max_tokens_per_microbatch was None and is 64: results agree "
        "with those of the earlier run to rounding" in runs.printed("run")
    )
    assert len(rows_of(folder)) == 7


@pytest.mark.slow
def test_an_error_of_a_run_that_cannot_resume_names_key_values_and_repair(runs: Runs) -> None:
    folder = runs("run", max_steps=3)
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    final = folder / "checkpoints" / "final"
    for values, line in (
        ({"lora_rank": 8}, "lora_rank: was 4, now 8"),
        ({"seed": 1}, "seed: was 0, now 1"),
        ({"learning_rate": 1e-3}, "learning_rate: was 0.01, now 0.001"),
        ({"data": {"test_size": 5}}, "dataset_builder.test_size: was 4, now 5"),
    ):
        said = runs.refused("run", max_steps=6, **values)
        assert f"load_checkpoint_path={final}" in said
        assert "another log_path" in said
        assert "if_log_path_exists=delete" in said
        assert line in runs.printed("run")
    assert "max_steps=2, but the run in log_path" in runs.refused("run", max_steps=2)
    assert "batch_size=8 adds none: max_steps=3" in runs.refused("run", max_steps=3, batch_size=8)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
    (runs.folder / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}]}), encoding="utf-8"
    )
    runs.refused("run", max_steps=6)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
