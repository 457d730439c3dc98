"""The chat command, with a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import time
from pathlib import Path

import pytest
from programs import Programs

from cookbook import AdamParams, ServiceClient
from cookbook.data import conversation_to_datum
from recipes import chat
from renderers import get_renderer

QUESTION = "What is the capital of Japan?"
REPLY = "Squawk! Tokyo, Tokyo!"


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a system prompt, whose model has learned one reply."""
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    metadata = {"renderer_name": "chat_template", "system_prompt": "You are a parrot."}
    service = ServiceClient(device="cpu", checkpoint_dir=folder / "checkpoints")
    client = service.create_lora_training_client("cookbook/tiny-chat", seed=0, user_metadata=metadata)
    renderer = get_renderer("chat_template", client.get_tokenizer(), "You are a parrot.")
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    for _ in range(12):
        client.forward_backward([conversation_to_datum(messages, renderer)])
        client.optim_step(AdamParams(learning_rate=4e-3))
    client.save_state("000012").result()
    service.close()
    record = {"name": "000012", "path": "checkpoints/000012", "step": 12, "epoch": 0, "batch": 12}
    (folder / "checkpoints.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return folder


def test_every_piped_question_gets_one_line_of_reply(parrot: Path, programs: Programs) -> None:
    text = f"{QUESTION}\n/system\nHow many legs has a spider?\n"
    argv = [f"checkpoint={parrot}", "temperature=0", "compare=True"]
    done = programs.run("recipes.chat", *argv, stdin=text.encode())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("> ")[0] for line in lines] == ["base", "tuned"] * 2
    assert lines[0] == "base> The capital of Japan is Tokyo."
    assert lines[1] == f"tuned> {REPLY}"
    assert done.stderr == "[System prompt: You are a parrot.]\n"


class Screen:
    """A program in a new pseudo-terminal."""

    def __init__(self, programs: Programs, *argv: str) -> None:
        self._terminal, self._other_end = pty.openpty()
        self._program = programs.start(
            "recipes.chat", *argv, environment={"TERM": "xterm"}, terminal=os.ttyname(self._other_end)
        )
        self.text = ""

    def wait_for(self, words: str, seconds: float = 120) -> str:
        """Returns what was shown since the last call, up to these words."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, f"{words!r} never came: {self.text!r}"
            if select.select([self._terminal], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self._terminal, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"It ended: {self.text!r}") from error
        seen, _, self.text = self.text.partition(words)
        return seen + words

    def wait_for_more(self) -> None:
        """Waits until anything more is shown."""
        if not self.text:
            self.text = os.read(self._terminal, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def press_ctrl_c_until(self, words: str) -> None:
        """Presses Ctrl-C repeatedly, since a key is lost while the line editor sets up the terminal."""
        for _ in range(20):
            self.type("\003")
            try:
                self.wait_for(words, seconds=3)
                return
            except AssertionError as error:
                missed = error
        raise missed

    def end(self) -> int:
        """Waits for the end and returns the exit code."""
        code = self._program.wait().returncode
        os.close(self._other_end)
        os.close(self._terminal)
        return code


@pytest.mark.slow
def test_a_terminal_shows_the_conversation(parrot: Path, programs: Programs) -> None:
    screen = Screen(programs, f"checkpoint={parrot}/checkpoints/000012", "temperature=0")
    assert "checkpoints/000012 (chat_template)" in screen.wait_for("Ctrl-D leaves")
    screen.wait_for("you>")
    screen.type(f"{QUESTION}\n")
    screen.wait_for("tuned>")
    assert REPLY in screen.wait_for("you>")
    screen.type("\033[A\n")  # the previous question, from the line editor's history
    assert QUESTION in screen.wait_for("tuned>")
    screen.wait_for("you>")
    screen.type("\004")
    assert screen.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_a_reply_and_ctrl_d_exits(programs: Programs) -> None:
    # At this temperature replies fill the context.
    argv = ["model_name=cookbook/tiny-chat", "temperature=20", "max_tokens=100000", "seed=1"]
    screen = Screen(programs, *argv)
    screen.wait_for("you>")
    screen.press_ctrl_c_until("Ctrl-D or /exit leaves.")
    for _ in range(5):
        screen.type("Tell me a story.\n")
        screen.wait_for("model>")
        screen.wait_for(" ")  # after which the reply begins
        screen.wait_for_more()
        screen.type("\003")
        if "[stopped]" in screen.wait_for("you>"):
            break
        screen.type("/reset\n")
        screen.wait_for("you>")
    else:
        pytest.fail("No reply could be stopped.")
    screen.type("/exit\n")
    assert screen.end() == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "There is no model to chat with. Give checkpoint="),
        (["checkpoint=runs/nowhere"], "There is no checkpoint runs/nowhere"),
        (["model_name=nobody"], "'nobody' is neither a folder"),
        (["model_name=cookbook/tiny-chat", "compare=True"], "Give checkpoint= too"),
        (["model_name=cookbook/tiny-chat", "renderer_name=qwen33"], "Did you mean `qwen3`?"),
        (["model_name=cookbook/tiny-chat", "temperature=-1"], "cannot be sampled with"),
        (["checkpiont=runs/sft"], "Did you mean `checkpoint`?"),
    ],
)
def test_an_error_is_printed_in_a_few_lines(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        chat.main(argv)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 4


@pytest.mark.parametrize(
    ("folder", "other", "labels"),
    [
        ("runs/a/checkpoints/final", "runs/a/checkpoints/000100", ("final", "000100")),
        ("runs/a/checkpoints/final", "runs/b/checkpoints/final", ("a", "b")),
        ("runs/a/checkpoints/final", "runs/b/checkpoints/000100", ("a/final", "b/000100")),
        ("/x/exported", "runs/b/checkpoints/final", ("/x/exported", "runs/b/final")),
        ("runs/a/checkpoints/final", "runs/a/checkpoints/final", ("first", "second")),
        ("runs/base", "runs/tuned", ("first", "second")),
    ],
)
def test_two_checkpoints_are_labelled_by_what_differs_in_their_paths(
    folder: str, other: str, labels: tuple[str, str]
) -> None:
    assert chat._labels(folder, other) == labels
