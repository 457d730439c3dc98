"""Every recipe runs in an ASCII environment: files are UTF-8, and consoles replace unprintable characters."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import Programs

Run = Callable[..., subprocess.CompletedProcess[bytes]]

UTF_8_OUTPUT = {"PYTHONIOENCODING": "utf-8"}
ASCII_OUTPUT = {"PYTHONIOENCODING": "ascii"}
ASCII_LOCALE = {"PYTHONUTF8": "0", "LC_ALL": "C"}
ENVIRONMENTS = pytest.mark.parametrize(
    "environment", [ASCII_OUTPUT, ASCII_LOCALE], ids=["ascii output", "ascii locale"]
)
ENVIRONMENTS_OF_LONG_TESTS = pytest.mark.parametrize(
    "environment",
    [
        pytest.param(ASCII_OUTPUT, id="ascii output", marks=pytest.mark.slow),
        pytest.param(ASCII_LOCALE, id="ascii locale"),
    ],
)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Wie grüßt man auf Russisch? ☕ {number}"},
            {"role": "assistant", "content": "Привет, мир 天"},
        ]
    }
    for number in range(6)
]


@pytest.fixture
def run(programs: Programs, tmp_path: Path) -> Run:
    """A function of (recipe, *argv, environment, stdin) that runs a recipe in the test's folder."""
    return lambda recipe, *argv, **options: programs.run(
        f"recipes.{recipe}", *argv, cwd=tmp_path, text=False, **options
    )


def write_rows(path: Path) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
@ENVIRONMENTS_OF_LONG_TESTS
def test_a_run_on_text_in_any_script_trains_resumes_and_is_reported(
    run: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    write_rows(tmp_path / "grüße.jsonl")
    argv = ["dataset=grüße.jsonl", "log_path=läufe", "system_prompt=Sé amable ☕", "test_size=2"]
    argv += ["batch_size=2", "max_steps=1", "infrequent_eval_every=0"]
    done = run("sft", *argv, environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    # The files of the run are UTF-8, with unchanged text.
    folder = tmp_path / "läufe"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["system_prompt"] == "Sé amable ☕"
    for name in ("train.log", "data.json", "report.html"):
        (folder / name).read_text(encoding="utf-8")

    again = run("sft", *argv, environment=environment)
    assert again.returncode == 0, again.stderr
    assert b"This run is finished" in again.stdout
    reported = run("report", "läufe", environment=environment)
    assert reported.returncode == 0, reported.stderr


@pytest.mark.slow
@ENVIRONMENTS
def test_a_preview_replaces_unprintable_characters(
    run: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    write_rows(tmp_path / "chats.jsonl")
    done = run("preview", "dataset=chats.jsonl", "num_examples=1", environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"[[??????, ??? ?" in done.stdout
    assert ">天<" in (tmp_path / "preview.html").read_text(encoding="utf-8")


@pytest.mark.slow
@ENVIRONMENTS_OF_LONG_TESTS
def test_piped_questions_are_utf8(run: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    argv = ["model_name=cookbook/tiny-chat", "max_tokens=4", "temperature=0"]
    text = "Qué es un café? ☕\n".encode()
    done = run("chat", *argv, environment=environment, stdin=text)
    assert done.returncode == 0, done.stderr
    elsewhere = run("chat", *argv, environment=UTF_8_OUTPUT, stdin=text)
    assert done.stdout == elsewhere.stdout.decode().encode("ascii", "replace")


@pytest.mark.slow
def test_a_piped_question_that_is_not_utf8_is_named(run: Run, tmp_path: Path) -> None:
    done = run(
        *("chat", "model_name=cookbook/tiny-chat", "max_tokens=4"),
        environment=UTF_8_OUTPUT,
        stdin=b"Hello\ncaf\xe9\n",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        b"RequestError: Question 2 is not UTF-8 text: byte 0xe9 at character 4. "
        b"Convert it, as with: iconv -f LATIN1 -t UTF-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("sft", "system_prompt=ñ", "--help"), 0, b"system_prompt=?"),
        (("sft", "dataset=größe.jsonl"), 1, b"DataError: Dataset file gr"),
        (("report", "läufe"), 1, b"ConfigError: There is no folder l"),
        (("export", "checkpoint=läufe", "to=anderswohin"), 1, b"is no checkpoint"),
        (("jobs", "list", "größe"), 2, b"unrecognized arguments: gr"),
        (("sweep", "größe=1,2"), 1, b"no key 'gr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_and_errors_are_printed_without_a_traceback(
    run: Run, tmp_path: Path, argv: tuple[str, ...], code: int, message: bytes
) -> None:
    done = run(*argv, environment=ASCII_LOCALE)
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed
    assert message in printed
    assert b"Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbfmax_steps: 1\n", b"max_steps=1"),
        (b"system_prompt: caf\xe9\n", b"config=run.yaml is not UTF-8 text"),
    ],
)
def test_a_config_file_is_utf8_with_or_without_a_byte_order_mark(
    run: Run, tmp_path: Path, content: bytes, message: bytes
) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    done = run("sft", "config=run.yaml", "--help", environment=ASCII_LOCALE)
    assert message in done.stdout + done.stderr
