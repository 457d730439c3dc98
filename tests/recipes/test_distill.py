"""A data set from a server's replies: written as they arrive, continued, counted, and trained on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import outside_world
import pytest

from recipes import distill, sft


class Server(ThreadingHTTPServer):
    """Answers `<the last message>!`. It keeps the requests, and fails those that `failures` counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.failures = 0
        self.status = 503
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fails = self.server.failures > 0
            self.server.failures -= fails
            self.server.requests.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
        asked = body["messages"][-1]["content"]
        ending = "length" if "long" in asked else "stop"
        text = "" if "nothing" in asked else f"{asked}!"
        message = {"role": "assistant", "content": text, "tool_calls": []}
        answer = {
            "choices": [{"message": message, "finish_reason": ending}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        }
        assert self.path == "/v1/chat/completions"
        content = json.dumps(answer).encode()
        self.send_response(self.server.status if fails else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    outside_world.retry_at_once(monkeypatch)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"What is {number}?"} for number in range(5)]
    rows += [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "unused"}]}]
    rows += [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}]
    rows += [{"prompt": "a long one"}, {"prompt": "say nothing"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(server: Server, prompts: Path, *more: str) -> Any:
    to = prompts.with_name("taught.jsonl")
    return distill.main([f"url={server.url}", "model=teacher", f"dataset={prompts}", f"to={to}", *more])


def rows_of(prompts: Path) -> list[dict[str, Any]]:
    lines = prompts.with_name("taught.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: row["distilled"]["prompt"])


@pytest.mark.slow
def test_every_whole_reply_is_a_conversation_and_the_others_are_counted(
    server: Server, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    report = run(server, prompts, "system_prompt=Be kind.", "temperature=0.5", "max_tokens=9")
    rows = rows_of(prompts)
    assert [row["messages"][-1]["content"] for row in rows] == [
        *(f"What is {number}?!" for number in range(5)), "Hello!", "Who?!",
    ]  # fmt: skip
    assert {row["messages"][0]["content"] for row in rows} == {"Be kind.", "Be brief."}
    assert all(
        row["messages"][-1] == {"role": "assistant", "content": row["messages"][-1]["content"]}
        for row in rows
    )
    assert (report.prompts, report.kept, sum(report.dropped.values())) == (9, 7, 2)
    assert server.keys == {"Bearer secret"}
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in server.requests} == {
        ("teacher", 0.5, 9)
    }
    printed = capsys.readouterr().out
    assert "9 prompts, 7 replies in the file." in printed
    assert "1 replies not kept: the token limit cut them" in printed
    recorded = json.loads(prompts.with_name("taught.jsonl.report.json").read_text(encoding="utf-8"))
    assert (recorded["kept"], recorded["reply_tokens"]) == (7, 18)
    assert "secret" not in json.dumps(recorded)


def test_a_stopped_run_continues_with_what_is_missing(
    server: Server, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    server.failures, server.status = 1, 401
    with pytest.raises(SystemExit):
        run(server, prompts, "concurrency=1")
    assert "gave no reply to prompt 0. Last: status 401" in capsys.readouterr().err
    run(server, prompts, "limit=4", "concurrency=2")
    asked_before = len(server.requests)
    report = run(server, prompts, "num_samples=2")
    assert report.kept_before == 4
    assert len(rows_of(prompts)) == 14
    assert len({(row["distilled"]["prompt"], row["distilled"]["sample"]) for row in rows_of(prompts)}) == 14
    assert len(server.requests) - asked_before == 18 - 4


@pytest.mark.slow
def test_a_busy_server_is_asked_again(server: Server, prompts: Path) -> None:
    server.failures = 3
    assert run(server, prompts, "concurrency=2").kept == 7


@pytest.mark.slow
def test_other_prompts_are_not_mixed_into_a_file(
    server: Server, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    run(server, prompts)
    prompts.write_text(json.dumps({"prompt": "another"}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(server, prompts)
    assert "is a reply to another prompt 0 than dataset= has" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_distilled_can_be_trained_on(server: Server, prompts: Path, tmp_path: Path) -> None:
    run(server, prompts)
    keys = [f"dataset={prompts.with_name('taught.jsonl')}", f"log_path={tmp_path / 'run'}", "max_steps=1"]
    assert sft.main([*keys, "batch_size=2", "test_size=0", "infrequent_evaluator_builders=[]"]).is_finished
