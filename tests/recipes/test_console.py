"""The command `sft-cookbook`: its list, version, errors and completion in shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook import __version__
from recipes import __main__ as console
from recipes import summaries

RECIPES = sorted(path.stem for path in Path(console.__file__).parent.glob("[!_]*.py"))


def test_the_list_has_every_recipe_with_a_sentence(capsys: pytest.CaptureFixture) -> None:
    console.main([])
    printed = capsys.readouterr().out
    assert sorted(summaries()) == RECIPES
    for name, summary in summaries().items():
        assert f" {name} {summary} " in " ".join(printed.split())
        assert summary.endswith(".")
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.slow
def test_a_name_runs_the_recipe_with_the_other_arguments(tmp_path: Path) -> None:
    path = tmp_path / "run"
    summary = console.main(["sft", f"log_path={path}", "max_steps=1", "eval_every=0", "save_every=0"])
    assert summary.is_finished
    assert (path / "report.html").is_file()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("no_such_package", "There is no module no_such_package"),
        ("cookbook.no_such_module", "There is no module cookbook.no_such_module"),
        ("no_such_file.py", "There is no file no_such_file.py"),
    ],
)
def test_a_tinker_program_that_is_not_there_is_said_in_a_sentence(
    program: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        console.main(["tinker", program])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("argument", ["--version", "version", "-V"])
def test_the_version_is_printed(argument: str, capsys: pytest.CaptureFixture) -> None:
    console.main([argument])
    assert capsys.readouterr().out == f"sft-cookbook {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sfd"], "There is no command 'sfd'. Did you mean `sft`?"),
        (["completion", "tcsh"], "tcsh is not a shell. Supported: bash, zsh, fish."),
        (["completion"], "nothing is not a shell."),
    ],
)
def test_an_error_says_what_to_do(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        console.main(argv)
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ([""], [*RECIPES, "completion"]),
        (["exp"], ["export"]),
        (["completion", "f"], ["fish"]),
        (["sft", "learn"], ["learning_rate="]),
        (["sft", "learning_rate=1", "learn"], []),
        (["sft", "batch_s"], ["batch_size="]),
        (["sft", "dataset=ch"], []),
        (["nothing", ""], []),
        (["chat", "checkp"], ["checkpoint="]),
    ],
)
def test_words_that_may_follow(before: list[str], found: list[str]) -> None:
    assert console.words(before) == found


BASH = """
sft-cookbook() {{ {python} -m recipes "$@"; }}
{script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
compopt() {{ :; }}
_sft_cookbook
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("sft-cookbook swe", ["sweep"]),
        ("sft-cookbook sft wandb_", ["wandb_name=", "wandb_project="]),
        ("sft-cookbook sft dataset = x", [""]),  # bash cuts words at =, and completes the file itself
    ],
)
def test_bash_completes(words: str, found: list[str]) -> None:
    script = BASH.format(python=sys.executable, script=console.SCRIPTS["bash"], words=words)
    ended = subprocess.run(
        ["bash", "-c", script], cwd=Path(console.__file__).parents[1], capture_output=True, text=True
    )
    assert ended.stdout.rstrip("\n").split("\n") == found, ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_valid_in_it(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(console.SCRIPTS[shell], encoding="utf-8")
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
