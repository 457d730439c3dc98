"""Pushes with the hub's real client to a small hub on this machine."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from outside_world import log_out_of_hub, point_hub_client_at

from cookbook.config.cli import make_config
from cookbook.errors import CheckpointError, ConfigError
from cookbook.export.config import ExportConfig
from cookbook.export.export import main
from cookbook.export.push import check_access, push, repository_of
from recipes import sft

TOKEN = "hf_stubstubstubstubstubstubstubstub"


class Hub:
    """A fake of the hub's HTTP API: repositories by name, with their files."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        """Large files, which are uploaded before the commit, by SHA-256."""
        self.breaks_off = False
        """Whether the connection breaks at a commit."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "owner", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "owner":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            status = 409 if name in self.private else 200
            self.private.setdefault(name, wanted["visibility"] == "private")
            return status, {"url": f"{self.address}/{name}", "error": "exists"}
        if method == "PUT":
            digest = path.rsplit("/", 1)[-1]
            assert hashlib.sha256(body).hexdigest() == digest
            self.large[digest] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**o, "actions": {"upload": {"href": f"{self.address}/large/{o['oid']}"}}} for o in objects
            ]
            return 200, {"transfer": "basic", "objects": actions}
        name = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            return 200, {"files": modes}
        if path.endswith("/commit/main"):
            if self.breaks_off:
                raise ConnectionAbortedError
            return 200, self._commit(name, [json.loads(line) for line in body.splitlines()])
        if name not in self.private:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": self.private[name], "sha": "0" * 40, "siblings": []}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files = self.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.large[value["oid"]]
        return {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client uses, with a valid token."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.command == "PUT"
            status, answer = (
                hub.answer(self.command, self.path, body) if is_known else (401, {"error": "Invalid token"})
            )
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(server.server_address[1])
    point_hub_client_at(monkeypatch, hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# A model\n", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 50)
    return tmp_path


@pytest.mark.slow
def test_a_folder_is_pushed_in_one_commit_to_a_private_repository(hub: Hub, export: Path) -> None:
    check_access("owner/parrot")
    url = push(export, "owner/parrot", True, "adapter of parrot")
    assert url == f"{hub.address}/owner/parrot"
    assert hub.private == {"owner/parrot": True}
    assert hub.messages == ["adapter of parrot"]
    assert hub.files["owner/parrot"] == {path.name: path.read_bytes() for path in export.iterdir()}
    assert len(hub.large) == 1  # the weights


@pytest.mark.slow
def test_a_repository_is_public_if_private_is_false(hub: Hub, export: Path) -> None:
    push(export, "owner/parrot", False, "x")
    assert hub.private == {"owner/parrot": False}


@pytest.mark.slow
def test_pushing_again_adds_a_commit(hub: Hub, export: Path) -> None:
    push(export, "owner/parrot", True, "one")
    (export / "README.md").write_text("another", encoding="utf-8")
    push(export, "owner/parrot", True, "two")
    assert hub.messages == ["one", "two"]
    assert hub.files["owner/parrot"]["README.md"] == b"another"


def test_a_private_push_to_a_public_repository_is_refused(hub: Hub, export: Path) -> None:
    push(export, "owner/parrot", False, "one")
    with pytest.raises(CheckpointError, match="exists and is public. Set private=False"):
        push(export, "owner/parrot", True, "two")
    assert hub.messages == ["one"]


@pytest.mark.slow
def test_an_unknown_token_is_reported_before_any_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecretsecretse")
    with pytest.raises(CheckpointError, match="does not know this token. Run `hf auth login`") as caught:
        check_access("owner/parrot")
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_missing_login_is_reported_before_any_work(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_out_of_hub(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="not logged in. Run `hf auth login`"):
        check_access("owner/parrot")


@pytest.mark.slow
def test_a_token_without_write_permission_is_reported(hub: Hub, export: Path) -> None:
    with pytest.raises(CheckpointError, match="may not write there. Check the owner's name"):
        push(export, "ownr/parrot", True, "x")


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_hub_client_at(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(CheckpointError, match="127.0.0.1 cannot be reached.*to=<folder>"):
        check_access("owner/parrot")


@pytest.mark.slow
def test_a_broken_connection_is_reported(hub: Hub, export: Path) -> None:
    hub.breaks_off = True
    with pytest.raises(CheckpointError, match="Cannot push to owner/parrot: .*Run the command again"):
        push(export, "owner/parrot", True, "x")


@pytest.mark.slow
@pytest.mark.parametrize("keeps_folder", [False, True], ids=["to", "push_to"])
def test_a_pushed_run_has_a_card_that_names_its_repository(
    hub: Hub, run: Path, tmp_path: Path, keeps_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"to={tmp_path}/out", "push_to=owner/parrot"] if keeps_folder else ["to=hf://owner/parrot"]
    asyncio.run(main(make_config(ExportConfig, {}, [f"checkpoint={run}", *where])))
    files = hub.files["owner/parrot"]
    assert {"README.md", "adapter_model.safetensors", "chat_template.jinja", "curves.png"} <= files.keys()
    assert b'path = "owner/parrot"' in files["README.md"]
    assert hub.messages == ["adapter of parrot"]
    assert f"Pushed to {hub.address}/owner/parrot" in capsys.readouterr().out
    assert (tmp_path / "out").exists() == keeps_folder


def test_offline_mode_is_reported() -> None:
    with pytest.raises(CheckpointError, match="offline mode is on"):
        check_access("owner/parrot")


@pytest.mark.parametrize("name", ["hf://owner/parrot", "owner/parrot"])
def test_a_repository_has_an_owner_and_a_name(name: str) -> None:
    assert repository_of(name) == "owner/parrot"


@pytest.mark.parametrize(
    "name", ["hf://parrot", "hf://a/b/c", "owner/par rot", "hf://owner/", "hf://owner/x..y"]
)
def test_an_invalid_repository_name_is_refused(name: str) -> None:
    form = "hf://owner/name" if name.startswith("hf://") else "owner/name"
    with pytest.raises(ConfigError, match=f"Invalid repository .*rite {form}"):
        repository_of(name)


def test_a_run_pushes_its_checkpoints_and_its_model_card(hub: Hub, tmp_path: Path) -> None:
    sft.main(
        [
            f"log_path={tmp_path / 'run'}", "max_steps=3", "batch_size=2", "test_size=40", "lora_rank=2",
            "save_every=1", "infrequent_eval_every=0", "push_to_hub=owner/parrot",
        ]
    )  # fmt: skip
    assert hub.private["owner/parrot"]
    assert hub.messages[-1].startswith("adapter")
    assert all(message.startswith("after ") for message in hub.messages[:-1])
    names = set(hub.files["owner/parrot"])
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.startswith("optimizer") for name in names)


@pytest.mark.slow
def test_a_push_that_fails_does_not_end_the_run(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.breaks_off = True
    keys = ["max_steps=1", "batch_size=2", "test_size=0", "lora_rank=2", "infrequent_eval_every=0"]
    summary = sft.main([f"log_path={tmp_path / 'run'}", *keys, "push_to_hub=owner/parrot"])
    assert summary.is_finished
    assert "To push the run: python -m recipes.export checkpoint=" in caplog.text


def test_a_repository_without_an_owner_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        sft.main([f"log_path={tmp_path / 'run'}", "push_to_hub=parrot"])
    assert not (tmp_path / "run").exists()
