"""Tests of what happens around the steps of a run: signals, samples, warnings, messages, damage."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import chz
import pytest

from cookbook import embedded, models
from cookbook.clients.futures import APIFuture
from cookbook.config import config_files
from cookbook.config.cli import make_config
from cookbook.errors import CheckpointError, ConfigError
from cookbook.eval.evaluators import EvaluatorBuilder, TrainingClientEvaluator
from cookbook.eval.samples import MAX_REPEATED, SamplesEvaluatorBuilder, held_out_prompts
from cookbook.jobs import jobs
from cookbook.supervised import notify
from cookbook.supervised.batches import BEGINNING, PlacedBatch
from cookbook.supervised.run import PendingStep, StateEvaluation, withdraw
from cookbook.supervised.train import Config
from cookbook.types import Datum, ModelInput
from recipes import sft
from renderers import get_renderer

FEW = ["batch_size=2", "test_size=2", "lora_rank=2", "train_unembed=False", "max_tokens=2"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- stopping ---------------------------------------------------------------------------------


def pending(step: int, is_running: bool) -> PendingStep:
    first: Future[Any] = Future()
    if is_running:
        first.set_running_or_notify_cancel()
    batch = PlacedBatch([], 0, 0, 0, BEGINNING, BEGINNING, (0.0, 0.0))
    others = [APIFuture(Future()) for _ in range(2)]
    return PendingStep(step, batch, StateEvaluation(), 1.0, APIFuture(first), *others)  # type: ignore[arg-type]


def test_queued_steps_are_cancelled_and_the_running_one_is_not() -> None:
    steps = deque([pending(3, True), pending(4, False), pending(5, False)])
    dropped = [*steps][1:]
    first = withdraw(steps)
    assert first is not None
    assert (first.step, [one.step for one in steps]) == (4, [3])
    for one in dropped:
        for future in (one.forward_backward, one.optim_step, one.save):
            assert future is not None
            assert future.done()
    assert withdraw(steps) is None


class SignalEvaluator(TrainingClientEvaluator):
    """Sends Ctrl-C to this process when it evaluates the second time."""

    num_calls = 0

    async def __call__(self, training_client: Any) -> dict[str, float]:
        type(self).num_calls += 1
        if self.num_calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"signal/sent": 1.0}


@chz.chz
class SignalBuilder(EvaluatorBuilder):
    def __call__(self) -> SignalEvaluator:
        return SignalEvaluator()


@pytest.mark.slow
def test_a_signal_during_an_evaluation_starts_no_further_step(tmp_path: Path) -> None:
    builder = f"evaluator_builders.0={__name__}:SignalBuilder"
    with pytest.raises(SystemExit) as ended:
        sft.main([f"log_path={tmp_path}", *FEW[:4], "max_steps=9", "eval_every=3", builder, "submit_ahead=2"])
    assert ended.value.code == 128 + signal.SIGINT
    assert rows_of(tmp_path / "checkpoints.jsonl")[-1]["step"] == 3


# -- samples ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("running") / "run"
    sft.main([f"log_path={folder}", *FEW, "max_steps=4", "save_every=2"])
    return folder


@pytest.mark.slow
def test_samples_are_drawn_at_the_start_half_way_and_at_the_end(run: Path) -> None:
    assert [row["step"] for row in rows_of(run / "tables.jsonl")] == [0, 0, 2, 2, 4, 4]


@pytest.mark.slow
def test_samples_are_of_held_out_conversations(run: Path) -> None:
    config = config_files.load(str(run / "config.json"))
    assert config["infrequent_evaluator_builders.0.prompts"] is None
    made = make_config(Config, sft.DEFAULTS, [f"log_path={run}", *FEW])
    _, eval_data = made.data_builder()
    assert eval_data is not None
    tokenizer = models.get_tokenizer(made.model_name)
    renderer = get_renderer(str(made.renderer_name), tokenizer)
    prompts = held_out_prompts(eval_data, renderer)
    shown = [row["row"]["prompt"] for row in rows_of(run / "tables.jsonl")]
    assert shown[:2] == [prompt.text for prompt in prompts]
    asked = [row["messages"] for row in rows_of(embedded.PIRATE_PATH)]
    expected = set()
    for chat in asked:
        before = [message["role"] for message in chat].index("assistant")
        tokens = tuple(renderer.build_generation_prompt(chat[:before]).to_ints())
        expected.add((tokens, chat[before - 1]["content"]))
    assert {(tuple(prompt.tokens.to_ints()), prompt.text) for prompt in prompts} <= expected


def test_a_held_out_prompt_is_sampled_from_once(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    asked = ["Who are you?"] * 4 + ["Hi"]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"{number}"}]
        for number, text in enumerate(asked)
    ]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    made = make_config(Config, sft.DEFAULTS, [f"log_path={tmp_path}", f"dataset={data}", "test_size=0"])
    train_data, _ = made.data_builder()
    renderer = get_renderer(str(made.renderer_name), models.get_tokenizer(made.model_name))
    assert sorted(prompt.text for prompt in held_out_prompts(train_data, renderer)) == ["Hi", "Who are you?"]


def test_other_prompts_are_not_looked_for_in_all_of_the_data() -> None:
    """Texts for continued pre-training all begin alike."""
    tokenizer = models.get_tokenizer(embedded.MODEL_NAME)
    renderer = get_renderer("chat_template", tokenizer)
    text = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weights": [1.0, 1.0]})

    class Alike:
        num_read = 0

        def iter_batches(self) -> Iterator[list[Datum]]:
            for self.num_read in range(1, 10_001):
                yield [text]

    data = Alike()
    assert len(held_out_prompts(data, renderer)) == 1  # type: ignore[arg-type]
    assert data.num_read == 1 + MAX_REPEATED


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("Hello, world", ["Hello, world"]),
        ("a,b", ["a", "b"]),
        ('["Hello,world", "b"]', ["Hello,world", "b"]),
        ("Yes, no, or what?,Next", ["Yes, no, or what?", "Next"]),
    ],
)
def test_a_comma_with_a_space_stays_in_a_prompt(text: str, prompts: list[str]) -> None:
    assert SamplesEvaluatorBuilder(prompts=text.split(",")).prompts == prompts


# -- warnings ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_few_held_out_rows_make_the_best_checkpoint_noise(run: Path) -> None:
    assert "Only 2 rows are held out" in (run / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_damaged_checkpoint_names_the_command_that_continues(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = run / "checkpoints" / "final" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    keys = [f"log_path={run}", *FEW, "max_steps=6", "save_every=2"]
    with pytest.raises(SystemExit):
        sft.main(keys)
    error = capsys.readouterr().err
    assert "after 2 steps" in error
    command = error.rsplit("command again: ", 1)[-1].strip()
    subprocess.run(shlex.split(command), check=True)
    assert sft.main(keys).num_steps == 6
    assert [row["step"] for row in rows_of(run / "metrics.jsonl")] == list(range(7))


# -- the message at the end -------------------------------------------------------------------


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/secret", received
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_webhook_is_told_how_a_run_ended_and_is_not_recorded(
    tmp_path: Path, webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    url, received = webhook
    folder = tmp_path / "run"
    sft.main([f"log_path={folder}", *FEW[:4], "max_steps=1", "infrequent_eval_every=0", f"notify={url}"])
    (message,) = received
    assert (message["status"], message["steps"]) == ("finished", 1)
    assert message["text"].startswith(f"{folder} finished after 1 step, test/nll ")
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"secret" not in written


def test_a_command_gets_the_failure_as_its_last_argument(tmp_path: Path) -> None:
    out = tmp_path / "told.txt"
    script = "import sys; open(sys.argv[1], 'w', encoding='utf-8').write(sys.argv[2])"
    command = f"{sys.executable} -c {shlex.quote(script)} {out}"
    data = tmp_path / "rows.jsonl"
    data.write_text('{"nothing": 1}\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        sft.main([f"log_path={tmp_path / 'run'}", f"dataset={data}", f"notify={command}"])
    assert f"{tmp_path / 'run'} failed: DataError" in out.read_text(encoding="utf-8")


def test_a_record_of_a_run_names_no_command(tmp_path: Path, run: Path) -> None:
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert "notify" not in record
    foreign = tmp_path / "config.json"
    foreign.write_text(json.dumps({**record, "notify": "touch pwned"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="notify, which no run records"):
        config_files.read_settings(str(foreign))


def test_an_unreachable_webhook_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from cookbook.supervised.notify import message_of, notify

    notify("http://127.0.0.1:9/secret", message_of("runs/x", error=CheckpointError("no")))
    assert "the message was not delivered (ConnectError)" in caplog.text
    assert "secret" not in caplog.text


def test_jobs_and_sweeps_refuse_a_message_that_they_would_lose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A job starts from its recorded config"):
        jobs.submit("sft", [f"log_path={tmp_path / 'job'}", "notify=echo"])
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://", "a URL without a host"),
        ("https:///hook", "a URL without a host"),
        (" ", "notify is empty"),
    ],
)
def test_a_notification_that_cannot_arrive_is_refused_at_the_start(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        notify.check_target(target)
    notify.check_target("https://example.org/hook")
    notify.check_target("no-such-command now")  # it may be there on the machine that runs
    with pytest.raises(ConfigError, match="there is no command 'no-such-command'"):
        notify.check_command("no-such-command now")
    notify.check_command("echo 'it has ended'")
