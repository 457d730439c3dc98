"""Sweeps: search spaces, errors before anything starts, and four runs on a real Ray."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from outside_world import remove_package
from waiting import wait_until

from cookbook.errors import ConfigError, FileError
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.sweeps import Plan, execution, make_plan, run_sweep, space
from cookbook.sweeps.plan import PlannedRun
from cookbook.sweeps.run_process import Progress, RunProcess
from cookbook.utils import clusters, jsonl
from recipes import sft

REPOSITORY = Path(__file__).parents[3]
SHIPPED = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))
KEYS_OF_NUMBERS = ("lora_rank", "max_steps", "batch_size", "eval_every")
QUICK = ["test_size=16", "infrequent_eval_every=0"]


def plan_of(tmp_path: Path, text: str, *argv: str) -> Plan:
    file = tmp_path / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    return make_plan([f"sweep={file}", f"log_path={tmp_path / 'out'}", *argv])


# -- search spaces and errors -----------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    plan = make_plan(
        [f"log_path={tmp_path}", "learning_rate=1e-3,4e-3", "lora_rank=8,32", "seed=0,1", "max_steps=9"]
    )
    assert [run.name for run in plan.runs] == [
        f"learning_rate={rate},lora_rank={rank},seed={seed}"
        for rate in ("0.001", "0.004")
        for rank in (8, 32)
        for seed in (0, 1)
    ]
    settings = {(run.config.learning_rate, run.config.lora_rank, run.config.seed) for run in plan.runs}
    assert settings == {(rate, rank, seed) for rate in (1e-3, 4e-3) for rank in (8, 32) for seed in (0, 1)}
    assert {run.config.max_steps for run in plan.runs} == {9}
    assert [run.folder for run in plan.runs] == [tmp_path / run.name for run in plan.runs]


def test_a_run_of_a_sweep_does_not_follow_a_link_in_its_folder(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path / 'sweep'}", "lora_rank=1,2"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "lora_rank=2").symlink_to(tmp_path / "mine")
    with pytest.raises(FileError, match="lora_rank=2 is a link to"):
        run_sweep(plan, lambda *_: True)
    assert list((tmp_path / "mine").iterdir()) == []


def test_more_draws_than_points_yield_all_points(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=8,16,32", "num_samples=999999999"])
    assert sorted(run.config.lora_rank for run in plan.runs) == [8, 16, 32]


@pytest.mark.parametrize(
    ("runs", "argv", "asked"),
    [
        (
            "{learning_rate: {uniform: [1, 2]}}",
            ["num_samples=2000000"],
            "num_samples=2000000 asks for 2,000,000",
        ),
        (
            f"{{seed: [0, 1], {', '.join(f'{key}: {list(range(1, 31))}' for key in KEYS_OF_NUMBERS)}}}",
            [],
            "810,000",
        ),
    ],
)
def test_too_many_runs_are_refused_at_once(tmp_path: Path, runs: str, argv: list[str], asked: str) -> None:
    with pytest.raises(ConfigError, match=f"{asked} runs, and a sweep has at most 10,000"):
        plan_of(tmp_path, f"runs: {runs}", *argv)


def test_a_config_below_runs_must_name_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep.yaml line 1: config: \['a', 'b'\] is not the name of a file"
    ):
        plan_of(tmp_path, "runs: {config: [a, b], lora_rank: [8, 16]}")


@pytest.mark.slow
def test_draws_are_reproducible_within_their_bounds_and_have_every_seed(tmp_path: Path) -> None:
    text = """
    num_samples: 20
    runs:
      learning_rate: {loguniform: [1e-5, 1e-3]}
      warmup_steps: {uniform: [0, 10]}
      lora_rank: [8, 16]
      seed: [0, 1]
    """
    plan = plan_of(tmp_path, text)
    assert plan == plan_of(tmp_path, text)
    assert [run.point for run in plan.runs] != [
        run.point for run in plan_of(tmp_path, text, "sample_seed=1").runs
    ]
    assert len(plan.runs) == 40
    rates = np.array([float(run.point["learning_rate"]) for run in plan.runs])
    assert ((rates >= 1e-5) & (rates <= 1e-3)).all()
    assert 0.2 < (rates < 1e-4).mean() < 0.8, "half of the logarithms, a tenth of the numbers"
    assert {run.point["lora_rank"] for run in plan.runs} == {"8", "16"}
    assert all(0 <= run.config.warmup_steps <= 10 for run in plan.runs)
    assert len({run.name for run in plan.runs}) == 40


def test_draws_from_a_small_space_are_distinct(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=8,16,32", "num_samples=50"])
    assert sorted(run.point["lora_rank"] for run in plan.runs) == ["16", "32", "8"]


def test_a_comma_separates_alternatives_unless_it_is_escaped_or_the_key_takes_a_list(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", r"system_prompt=Well\, hello,Bye", "prompts=a,b"])
    assert [run.config.system_prompt for run in plan.runs] == ["Well, hello", "Bye"]
    builder = plan.runs[0].config.infrequent_evaluator_builders[0]
    assert builder.prompts == ["a", "b"]  # type: ignore[attr-defined]


def test_variables_of_a_chat_template_are_varied_one_by_one_or_given_whole(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "template_kwargs.enable_thinking=True,False", "lora_rank=1,2"])
    found = [run.config.template_kwargs for run in plan.runs]
    assert found == [{"enable_thinking": mode} for mode in (True, False, True, False)]
    plan = make_plan([f"log_path={tmp_path}", 'template_kwargs={"a": 1, "b": 2}', "lora_rank=1,2"])
    assert [run.config.template_kwargs for run in plan.runs] == [{"a": 1, "b": 2}] * 2


def test_a_list_key_is_varied_by_a_list_of_lists(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "runs: {prompts: [[a, b], [c]]}")
    prompts = [run.config.infrequent_evaluator_builders[0].prompts for run in plan.runs]  # type: ignore[attr-defined]
    assert prompts == [["a", "b"], ["c"]]
    assert len(plan_of(tmp_path, "runs: {prompts: [a, b], lora_rank: [1, 2]}").runs) == 2


def test_the_command_line_replaces_the_file(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, "metric: train/nll\nruns: {lora_rank: [8, 16], seed: [0, 1]}", "lora_rank=4", "mode=max"
    )
    assert [run.name for run in plan.runs] == ["seed=0", "seed=1"]
    assert {run.config.lora_rank for run in plan.runs} == {4}
    assert (plan.config.metric, plan.config.mode) == ("train/nll", "max")


def test_names_are_stable_and_suit_folders() -> None:
    keys = ["a.learning_rate", "b.path"]
    name = space.name_of({"a.learning_rate": "1e-4", "b.path": "/data/my chats.jsonl"}, keys)
    assert name == space.name_of({"a.learning_rate": "0.0001", "b.path": "/data/my chats.jsonl"}, keys)
    assert name == "learning_rate=0.0001,path=data-my-chats.jsonl"


COMMANDS = re.findall(
    r"^python -m recipes\.sweep ([^#\n]*)",
    (REPOSITORY / "cookbook/sweeps/README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_can_be_planned(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert len(make_plan([*line.split(), f"log_path={tmp_path}"]).runs) > 1


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_planned(path: Path, tmp_path: Path, tiny_qwen3: str) -> None:
    plan = make_plan([f"sweep={path}", f"log_path={tmp_path}", f"model_name={tiny_qwen3}"])
    assert len(plan.runs) > 1


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("runs: {learning_rat: [1, 2]}", [], "There is no key 'learning_rat'. Did you mean `learning_rate`?"),
        ("", ["lora_rnk=1,2"], "Did you mean `lora_rank`?"),
        ("runs: {recipe: [1, 2]}", [], "There is no key 'recipe' of a run: it is this command's own."),
        ("", ["num_sample=3"], "There is no key 'num_sample'. Did you mean `num_samples`?"),
        (
            "num_sampels: 3",
            [],
            "unknown key 'num_sampels' of a sweep. Did you mean `num_samples`?",
        ),
        ("learning_rate: [1, 2]", [], "Keys of the recipe go below `runs:`"),
        ("runs: {lora_rank: []}", [], "lora_rank: an empty list leaves nothing to run"),
        ("runs: {lora_rank: [8, 8]}", [], "has a value twice"),
        ("runs: {lora_rank: [eight, 8]}", [], "Invalid lora_rank=eight: it takes a whole number."),
        ("runs: {learning_rate: {loguniform: [0, 1]}}", [], "it takes [low, high], above 0."),
        ("runs: {learning_rate: {uniform: [2, 1]}}", ["num_samples=2"], "it takes [low, high]."),
        ("runs: {learning_rate: {gauss: [2, 1]}}", [], "is not a distribution. Write one of"),
        ("runs: {learning_rate: {uniform: [1, 2]}}", [], "give the number of draws, as in num_samples: 8"),
        ("runs: [1", [], "cannot be read"),
        ("- a", [], "is not a sweep file. Write `runs:`"),
        ("runs: {log_path: a}", [], "each run has its own folder"),
        ("", ["lora_rank=8,,16"], "has an empty value between commas"),
        ("recipe: sfx", [], "There is no recipe 'sfx'. Did you mean `sft`?"),
        ("recipe: sft_loop", [], "There is no recipe 'sft_loop'"),
        ("recipe: recipes.sft_loop", [], "recipe=recipes.sft_loop is not a recipe"),
        ("runs: {lora_rank: 8}", [], "Nothing is varied. Give a key several values"),
        ("runs: {prompts: [a, b]}", ["lora_rank=8"], "Nothing is varied"),
        ("gpus_per_run: 1.5", [], "Invalid gpus_per_run=1.5: a run takes a part of one GPU"),
        ("cpus_per_run: 0", [], "Invalid cpus_per_run=0: must be > 0"),
        ("num_samples: 0", [], "Invalid num_samples=0: must be >= 1"),
        ("mode: less", [], "Invalid mode=less: it takes one of min, max."),
    ],
)
def test_an_invalid_sweep_is_one_error_before_anything_starts(
    tmp_path: Path, text: str, argv: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, text or "runs: {}", *argv)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_sweep_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """
num_sampels: 3
runs:
  learning_rat: [1, 2]
  batch_size: [8, eight]
  learning_rate: {gauss: [1, 2]}
  base_model: x
  lora_rank: [1, 2]
  lora_rank: [3, 4]
  evaluator_builders.0: cookbook.eval.samples:SamplesEvaluatorBuilder
  max_tokens: [7, 8]
"""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, text, "train_mlp=maybe,True", "verbose")
    said = str(caught.value).splitlines()
    file = tmp_path / "sweep.yaml"
    assert said[0] == "9 settings cannot be used."
    for line, message in {
        f"{file} line 2": "unknown key 'num_sampels' of a sweep. Did you mean `num_samples`?",
        f"{file} line 4": "There is no key 'learning_rat'. Did you mean `learning_rate`?",
        f"{file} line 5": "Invalid batch_size=eight: it takes a whole number.",
        f"{file} line 6": "learning_rate: {'gauss': [1, 2]} is not a distribution.",
        f"{file} line 7": "There is no key 'base_model'. Use `model_name`.",
        f"{file} line 9": "runs.lora_rank is already given in line 8.",
        f"{file} line 11": "'max_tokens' is ambiguous. Write one of evaluator_builders.0.max_tokens",
        "command line": "Invalid train_mlp=maybe: it takes True or False.",
    }.items():
        assert any(one.startswith(f"  {line}: {message}") for one in said), message


def test_the_command_line_replaces_a_key_of_the_file_in_its_other_spelling(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        "runs: {batch_size: [8, 16], lora_rank: [1, 2]}",
        "--dataset_builder.common_config.batch_size",
        "4",
    )
    assert [run.name for run in plan.runs] == ["lora_rank=1", "lora_rank=2"]
    sizes = {run.config.dataset_builder.common_config.batch_size for run in plan.runs}  # type: ignore[attr-defined]
    assert sizes == {4}


def test_best_yaml_is_valid_if_a_run_replaced_a_key_of_its_config_file(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("batch_size: 32\nprompts: [a, b]\nseed: 4\n", encoding="utf-8")
    plan = make_plan(
        [
            f"log_path={tmp_path / 'out'}",
            f"config={base}",
            "lora_rank=1,2",
            "dataset_builder.common_config.batch_size=4",
        ]
    )
    run_sweep(plan, FakeRay({"lora_rank=1": 1.0, "lora_rank=2": 2.0}))
    config = plan.recipe.make_config([f"config={tmp_path / 'out' / 'best.yaml'}"])
    assert (config.lora_rank, config.seed) == (1, 4)
    assert config.dataset_builder.common_config.batch_size == 4  # type: ignore[attr-defined]
    assert config.infrequent_evaluator_builders[0].prompts == ["a", "b"]  # type: ignore[attr-defined]


def test_a_missing_ray_is_an_error_that_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_package(monkeypatch, "ray")
    with pytest.raises(ConfigError, match=r"pip install 'sft-cookbook\[ray\]'"):
        run_sweep(make_plan([f"log_path={tmp_path}", "lora_rank=1,2"]))


# -- execution and results --------------------------------------------------------------------


class FakeRay:
    """Ends runs without running them, with the files of `train`, or as a test specifies."""

    error = "TrainingError: it broke"

    def __init__(
        self, values: dict[str, float], states: dict[str, str] | None = None, stop_after: int = 99
    ) -> None:
        self.values, self.states, self.stop_after = values, states or {}, stop_after
        self.ran: list[str] = []

    def __call__(self, plan: Plan, runs: Sequence[PlannedRun], over: object, on_end: object) -> bool:
        for run in runs[: self.stop_after]:
            self.ran.append(run.name)
            state = self.states.get(run.name, "finished")
            value = self.values.get(run.name, math.nan)
            if state != "failed":
                row = {"step": 5, "train/nll": 2.0, plan.config.metric: value}
                jsonl.append(run.folder / "metrics.jsonl", row)
            if state == "finished":
                log = CheckpointLog(run.folder)
                (run.folder / "checkpoints" / "final").mkdir(parents=True)
                log.add("final", str(run.folder / "checkpoints" / "final"), 5, 0, 5)
            on_end(run, Progress(state, 5, value, self.error if state == "failed" else ""))  # type: ignore[operator, arg-type]
        return len(runs) <= self.stop_after


def test_finished_and_stopped_runs_are_kept_and_failed_ones_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=1,2,4"])
    first = FakeRay(
        {"lora_rank=1": 2.0, "lora_rank=2": 1.0}, {"lora_rank=2": "stopped", "lora_rank=4": "failed"}
    )
    results = run_sweep(plan, first)
    assert [result.state for result in results] == ["finished", "stopped", "failed"]
    out = capsys.readouterr().out
    assert "lora_rank=4: failed.\n  TrainingError: it broke" in out
    assert yaml.safe_load((tmp_path / "best.yaml").read_text(encoding="utf-8"))["lora_rank"] == 1, (
        "the only finished one"
    )
    second = FakeRay({"lora_rank=4": 0.5})
    results = run_sweep(plan, second)
    assert second.ran == ["lora_rank=4"]
    assert [result.runs[0].name for result in results] == ["lora_rank=4", "lora_rank=1", "lora_rank=2"]
    assert yaml.safe_load((tmp_path / "best.yaml").read_text(encoding="utf-8"))["lora_rank"] == 4
    assert run_sweep(plan, FakeRay({})) == results


def test_an_interrupted_sweep_shows_its_results_and_resumes_with_the_rest(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=1,2,4"])
    values = {"lora_rank=1": 1.0, "lora_rank=2": 2.0, "lora_rank=4": 3.0}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, FakeRay(values, stop_after=1))
    rest = FakeRay(values)
    run_sweep(plan, rest)
    assert rest.ran == ["lora_rank=2", "lora_rank=4"]


def test_the_comparison_page_is_written_if_write_page_is_passed(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path / 'out'}", "lora_rank=1,2,4"])
    values = {"lora_rank=1": 2.0, "lora_rank=2": 1.0}
    written: list[tuple[list[str], Path, str]] = []

    def write_page(folders: Sequence[Path], to: Path, title: str) -> Path:
        written.append(([folder.name for folder in folders], to, title))
        return to

    run_sweep(plan, FakeRay(values, {"lora_rank=4": "failed"}), write_page=write_page)
    assert written == [(["lora_rank=2", "lora_rank=1"], tmp_path / "out" / "report.html", "Sweep out")]
    run_sweep(plan, FakeRay({}))
    assert len(written) == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_seeds_are_averaged_and_the_best_mean_wins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=1,2", "seed=0,1"])
    values = dict(zip([run.name for run in plan.runs], [1.0, 4.0, 2.0, 2.5], strict=True))
    results = run_sweep(plan, FakeRay(values))
    assert [result.value for result in results] == [2.25, 2.5]
    assert yaml.safe_load((tmp_path / "best.yaml").read_text(encoding="utf-8"))["lora_rank"] == 2
    assert "2.2500 ± 0.3536" in capsys.readouterr().out
    assert (
        run_sweep(make_plan([*[f"log_path={tmp_path}", "lora_rank=1,2", "seed=0,1"], "mode=max"]))[0].value
        == 2.5
    )


def test_a_folder_of_another_sweep_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run_sweep(
        make_plan([f"log_path={tmp_path}", "lora_rank=1,2"]),
        FakeRay({"lora_rank=1": 1.0, "lora_rank=2": 1.0}),
    )
    with pytest.raises(ConfigError, match="holds a run with another config:\n  adam_beta1: was 0.9, now 0.5"):
        run_sweep(make_plan([f"log_path={tmp_path}", "lora_rank=1,2", "adam_beta1=0.5"]), FakeRay({}))


def test_no_text_of_a_sweep_acts_as_markup_or_controls_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    metric = "[/INST]/nll"
    argv = ["system_prompt=[/INST] :smile:,[red]b\x1b[2J\nc,d", f"metric={metric}"]
    plan = make_plan([f"log_path={tmp_path / '[b]out[/INST]'}", *argv])
    first, second, third = (run.name for run in plan.runs)
    ray = FakeRay({first: 1.0, second: 2.0}, {third: "failed"})
    ray.error = "RuntimeError: no closing tag [/INST]\x1b]0;owned\x07\n3/3  all.well"
    results = run_sweep(plan, ray)
    assert [(result.state, result.value) for result in results[:2]] == [("finished", 1.0), ("finished", 2.0)]
    assert results[2].state == "failed"
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"3 runs of sft, in {plan.folder}."
    assert lines[1] == f"1/3  {first}: {metric} 1.0000, finished at step 5"
    assert lines[3:6] == [
        f"3/3  {third}: failed.",
        "  RuntimeError: no closing tag [/INST]␛]0;owned␇",
        "  3/3  all.well",
    ]
    table = lines[7:11]
    assert table[0].split() == ["system_prompt", metric, "steps", "state"]
    assert table[1].startswith("[/INST] :smile: ")
    assert table[2].startswith("[red]b␛[2J␊c ")
    assert f"Best: python -m recipes.sft config={plan.folder / 'best.yaml'}" in lines
    rows = list(csv.DictReader((plan.folder / "results.csv").open(encoding="utf-8", newline="")))
    assert [row["system_prompt"] for row in rows] == ["[/INST] :smile:", "[red]b\x1b[2J\nc", "d"]
    assert yaml.safe_load((plan.folder / "best.yaml").read_text(encoding="utf-8"))["system_prompt"] == (
        "[/INST] :smile:"
    )


def test_no_name_adds_a_setting_to_best_yaml(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}/a\nmax_steps: 7", "lora_rank=1,2", "metric=a\nbatch_size: 3"])
    run_sweep(plan, FakeRay({"lora_rank=1": 1.0, "lora_rank=2": 2.0}))
    best = yaml.safe_load((plan.folder / "best.yaml").read_text(encoding="utf-8"))
    assert not {"max_steps", "batch_size"} & set(best)


def test_no_cell_of_the_csv_is_a_formula(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "system_prompt==cmd(1),@a,-0.5"])
    first, second, third = (run.name for run in plan.runs)
    ray = FakeRay({first: 1.0, second: -2.0}, {third: "failed"})
    ray.error = "=HYPERLINK(1)"
    run_sweep(plan, ray)
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8", newline="")))
    assert [row["system_prompt"] for row in rows] == ["'@a", "'=cmd(1)", "-0.5"]
    assert [row["test/nll"] for row in rows] == ["-2.0", "1.0", ""]
    assert rows[2]["error"] == "'=HYPERLINK(1)"


class FullDisk(io.StringIO):
    """Standard output on a disk that is full after the first line."""

    def write(self, text: str) -> int:
        if "in " not in text:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_run_whose_end_cannot_be_printed_is_recorded(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=1,2,4"])
    values = {"lora_rank=1": 3.0, "lora_rank=2": 1.0, "lora_rank=4": 2.0}
    with contextlib.redirect_stdout(FullDisk()), pytest.raises(OSError, match="No space left"):
        run_sweep(plan, FakeRay(values))
    recorded = jsonl.read(tmp_path / "sweep.jsonl")
    assert [(row["name"], row["state"]) for row in recorded] == [(name, "finished") for name in values]
    assert len(list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))) == 3
    assert yaml.safe_load((tmp_path / "best.yaml").read_text(encoding="utf-8"))["lora_rank"] == 2
    again = FakeRay({})
    assert [result.value for result in run_sweep(plan, again)] == [1.0, 2.0, 3.0]
    assert again.ran == []


def test_a_failed_run_reports_its_error(tmp_path: Path) -> None:
    plan = make_plan([f"log_path={tmp_path}", "lora_rank=8,16", "dataset=missing.jsonl"])
    run_sweep(plan, lambda *_: True)
    process = RunProcess("recipes.sft", plan.runs[0].folder, "test/nll", str(tmp_path))
    progress = process.next_progress(60)
    process.stop()
    assert progress.state == "failed"
    assert "Dataset file missing.jsonl does not exist" in progress.error


def test_polling_a_long_run_reads_only_new_rows_and_reports_every_evaluation(
    tmp_path: Path, bytes_read: Callable[[], int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/nll": 1 / (1 + step), "perf/seconds": 0.1} for step in range(20_000)]
    jsonl.rewrite(
        path, [row | ({"test/nll": row["step"] / 7} if row["step"] % 5_000 == 0 else {}) for row in rows]
    )
    watched = RunProcess("recipes.sft", tmp_path, "test/nll", str(tmp_path), is_over=True)
    told = [watched.next_progress(0.0) for _ in range(4)]
    assert [(one.step, one.value) for one in told] == [(step, step / 7) for step in range(0, 20_000, 5_000)]
    before = bytes_read()
    for step in range(20_000, 20_050):
        jsonl.append(path, {"step": step, "train/nll": 0.5, "test/nll": step / 7})
        assert watched.next_progress(0.0).step == step
    assert bytes_read() - before < path.stat().st_size / 4
    watched.stop()


def test_a_watched_run_that_resumes_is_reported_from_its_last_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    jsonl.rewrite(path, [{"step": step, "test/nll": 1.0} for step in range(4)])
    watched = RunProcess("recipes.sft", tmp_path, "test/nll", str(tmp_path), is_over=True)
    assert [watched.next_progress(0.0).step for _ in range(4)] == [0, 1, 2, 3]
    jsonl.rewrite(
        path, [{"step": step, "test/nll": 1.0} for step in range(2)]
    )  # steps 2 and 3 will be logged again
    jsonl.append(path, {"step": 2, "test/nll": 2.0})
    jsonl.append(path, {"step": 4, "test/nll": 4.0})
    progress = watched.next_progress(0.0)
    assert (progress.step, progress.value) == (4, 4.0)
    watched.stop()


# -- on a real Ray ----------------------------------------------------------------------------


A_WHILE = pytest.mark.timeout(900)
"""A long timeout, since Ray and four runs are many processes, which are slow on busy cores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


ARGV = ["learning_rate=4e-3,1e-7", "max_steps=24", "eval_every=8", *QUICK]


@dataclass(frozen=True)
class Swept:
    printed: str
    listeners: dict[tuple[str, int], str]
    """The addresses at which processes of the sweep accept connections, and which process does."""
    modes: set[int]
    """The modes of the folder of its Ray's files."""


@pytest.fixture(scope="module")
def swept(
    folder: Path, one_ray_at_a_time: None, listeners: Callable[[int], dict[tuple[str, int], str]]
) -> Swept:
    """A sweep of two runs from the command line, one after the other: the first learns, the second cannot."""
    found: dict[tuple[str, int], str] = {}
    modes: set[int] = set()
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "recipes.sweep", *ARGV, f"log_path={folder / 'out'}"),
                *("asha=True", "asha_grace_steps=8", f"cpus_per_run={os.cpu_count()}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=_environment(temporary),
        )

        def has_ended() -> bool:
            found.update(listeners(process.pid))
            modes.update(stat.S_IMODE(path.stat().st_mode) for path in Path(temporary).glob("ray-*"))
            return process.poll() is not None

        wait_until(has_ended, seconds=800, every=1.0)
        printed, errors = process.communicate()
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert temporary not in left, "Ray's processes have ended"
        assert list(Path(temporary).glob("ray-*")) == []
    assert process.returncode == 0, errors
    assert errors == ""
    return Swept(printed, found, modes)


def _environment(temporary: str) -> dict[str, str]:
    return {**os.environ, "TMPDIR": temporary, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@A_WHILE
def test_the_ray_of_a_sweep_listens_only_on_loopback(swept: Swept) -> None:
    """Its agents need not have started before the sweep ends. Those of a head are awaited in `test_jobs`."""
    for part in ("recipes.sweep", "gcs_server", "raylet", "ray::"):
        assert any(part in who for who in swept.listeners.values()), part
    assert {address: who for address, who in swept.listeners.items() if address[0] != "127.0.0.1"} == {}


@pytest.mark.slow
@A_WHILE
def test_other_users_cannot_enter_the_folder_of_a_sweeps_ray(swept: Swept) -> None:
    assert swept.modes == {0o700}


@pytest.mark.slow
@A_WHILE
def test_a_sweep_results_in_a_sorted_table_a_csv_and_a_report(swept: Swept, folder: Path) -> None:
    rows = list(csv.DictReader((folder / "out" / "results.csv").open(encoding="utf-8")))
    assert len(rows) == 2
    finished = [row for row in rows if row["state"] == "finished"]
    assert finished
    assert rows[: len(finished)] == sorted(finished, key=lambda row: float(row["test/nll"]))
    table = [line for line in swept.printed.splitlines() if line.rstrip().endswith(("finished", "stopped"))]
    assert [line.split()[0] for line in table] == [row["learning_rate"] for row in rows]
    assert max(len(line) for line in table) <= 80
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert all(row["run"] in page for row in rows)


@pytest.mark.slow
@A_WHILE
def test_worse_runs_are_stopped_early_with_a_checkpoint(swept: Swept, folder: Path) -> None:
    rows = list(csv.DictReader((folder / "out" / "results.csv").open(encoding="utf-8")))
    stopped = [row for row in rows if row["state"] == "stopped"]
    assert {row["run"] for row in rows if row["learning_rate"] == "1e-7"} <= {row["run"] for row in stopped}
    for row in stopped:
        last = CheckpointLog(Path(row["log_path"])).last()
        assert last is not None
        assert 8 <= last.step < 24
        assert (Path(row["log_path"]) / last.path / "adapter_model.safetensors").exists()


@pytest.mark.slow
@A_WHILE
def test_a_run_of_best_yaml_equals_the_run_of_the_sweep(
    swept: Swept, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = next(csv.DictReader((folder / "out" / "results.csv").open(encoding="utf-8")))
    summary = sft.main([f"config={folder / 'out' / 'best.yaml'}"])
    assert summary.log_path == folder / "out" / "best"
    assert summary.metrics["test/nll"] == float(best["test/nll"])
    recorded = json.loads((Path(best["log_path"]) / "config.json").read_text(encoding="utf-8"))
    assert f"{recorded['learning_rate']:g}" == "0.004"


def test_each_run_is_reported_once_and_an_error_of_on_end_is_raised_at_the_end(
    tmp_path: Path,
) -> None:
    runs = {run.name: run for run in make_plan([f"log_path={tmp_path}", "lora_rank=1,2,4"]).runs}
    reported: list[tuple[str, str]] = []

    def on_end(run: PlannedRun, progress: Progress) -> None:
        reported.append((run.name, progress.state))
        if run.name == "lora_rank=1":
            raise ValueError("it cannot be reported")

    ends = execution.Ends({name: runs[name] for name in ("lora_rank=1", "lora_rank=2")}, on_end)
    ends.report("lora_rank=4", Progress("finished"))  # ended before
    ends.report("lora_rank=1", Progress("finished"))
    ends.report("lora_rank=1", Progress("failed"))
    ends.report("lora_rank=2", Progress("finished"))
    assert reported == [("lora_rank=1", "finished"), ("lora_rank=2", "finished")]
    assert ends.count == 3
    with pytest.raises(ValueError, match="it cannot be reported"):
        ends.raise_failure()


@pytest.mark.slow
@A_WHILE
def test_an_error_of_on_end_ends_no_run_twice_and_no_other_run(
    tmp_path: Path, one_ray_at_a_time: None
) -> None:
    plan = make_plan([f"log_path={tmp_path / 'out'}", "lora_rank=1,2", "dataset=/nowhere.jsonl"])
    run_sweep(plan, lambda *_: True)  # creates the folder of each run
    reported: list[tuple[str, str]] = []

    def on_end(run: PlannedRun, progress: Progress) -> None:
        reported.append((run.name, progress.error))
        raise ValueError(f"{run.name} cannot be reported")

    with pytest.raises(ValueError, match="cannot be reported"):
        execution.execute(plan, plan.runs, [], on_end)
    error = "DataError: Dataset file /nowhere.jsonl does not exist."
    assert sorted(reported) == [("lora_rank=1", error), ("lora_rank=2", error)]


def test_only_ray_s_own_log_handlers_are_silenced() -> None:
    pytest.importorskip("ray")
    ours = logging.StreamHandler()
    ray_logger = logging.getLogger("ray")
    ray_logger.addHandler(ours)
    try:
        clusters.import_ray()
    finally:
        ray_logger.removeHandler(ours)
    assert ours.level == logging.NOTSET
