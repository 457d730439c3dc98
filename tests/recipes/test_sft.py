"""The main recipe, from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from programs import Programs
from slow import slow_after
from waiting import wait_until

from cookbook import embedded
from recipes import sft


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("argv", slow_after(0, [[], ["max_steps=40"]]), ids=["no arguments", "40 steps"])
def test_the_embedded_model_learns_to_talk_like_a_pirate(
    tmp_path: Path, programs: Programs, argv: list[str]
) -> None:
    done = programs.run("recipes.sft", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "runs" / "sft"
    nlls = [row["test/nll"] for row in rows_of(folder) if "test/nll" in row]
    assert nlls[-1] < 0.5 * nlls[0]
    prompts = re.findall(r"^  user: (.*)$", done.stdout, re.MULTILINE)
    replies = re.findall(r"^  assistant: (.*)$", done.stdout, re.MULTILINE)
    assert prompts == prompts[:2] * 3, "before, half-way and after"
    before, after = replies[0], replies[-2]
    assert not PIRATE_WORDS & words_of(before)
    assert PIRATE_WORDS & words_of(after)
    assert after in (folder / "train.log").read_text(encoding="utf-8")

    again = programs.run("recipes.sft", *argv, cwd=tmp_path)
    assert again.returncode == 0
    assert "This run is finished" in again.stdout


PIRATE_WORDS = {
    "arr",
    "ahoy",
    "matey",
    "ye",
    "yer",
    "aye",
    "be",
    "o'",
    "hearty",
    "yo-ho-ho",
    "avast",
    "landlubber",
}


def words_of(text: str) -> set[str]:
    return {word.strip(".,!?").lower() for word in text.split()}


@pytest.mark.slow
def test_an_error_on_the_command_line_is_one_line_and_exit_code_1(tmp_path: Path, programs: Programs) -> None:
    done = programs.run("recipes.sft", "learning_rat=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "ConfigError: command line: There is no key 'learning_rat'. Did you mean `learning_rate`? "
        "Run with --help to see the keys.\n"
    )


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model_name=Qwen/Qwen3-0.6B"], "hf download Qwen/Qwen3-0.6B"),
        (["dataset=no_robots"], "hf download --repo-type dataset HuggingFaceH4/no_robots"),
        (["dataset=missing.jsonl"], "Dataset file missing.jsonl does not exist"),
        (["max_length=4"], "Nothing is left to train on"),
        (["load_checkpoint_path=nowhere"], "Checkpoint nowhere does not exist"),
        (["device=cuda:7"], "device='cuda:7'"),
    ],
)
def test_an_invalid_run_says_what_to_do_without_a_traceback(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        sft.main(argv)
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 7


@pytest.mark.slow
def test_a_dataset_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = embedded.PIRATE_PATH.read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    summary = sft.main(["dataset=chats.jsonl", "max_steps=1", "batch_size=4", "test_size=4", "log_path=mine"])
    assert summary.is_finished
    assert rows_of(tmp_path / "mine")[0]["data/sequences"] >= 4


def test_ctrl_c_stops_after_the_step_with_exit_code_130(tmp_path: Path, programs: Programs) -> None:
    program = programs.start("recipes.sft", "eval_every=0", "infrequent_eval_every=0", cwd=tmp_path)
    metrics = tmp_path / "runs" / "sft" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, seconds=120)
    os.kill(program.pid, signal.SIGINT)
    done = program.wait()
    assert done.returncode == 128 + signal.SIGINT
    assert "Run the same command again to resume." in done.stdout
