"""Tests that a Ray that is started on this machine is accessible only from this machine and to its user."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from outside_world import keep_temporary_files_in

from cookbook.errors import ClusterError
from cookbook.utils import clusters

pytest.importorskip("ray")

MAKE_TOKEN = "from cookbook.utils import clusters; clusters.import_ray(to_start=True)"


@pytest.mark.slow
def test_a_token_is_created_once_and_readable_only_by_its_user_for_any_umask(tmp_path: Path) -> None:
    token = tmp_path / "deep" / "private" / "token"
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    command = [sys.executable, "-c", MAKE_TOKEN]
    makers = [subprocess.Popen(command, env=environment, umask=0) for _ in range(2)]
    assert [maker.wait() for maker in makers] == [0, 0]
    first = token.read_text(encoding="utf-8")
    assert len(bytes.fromhex(first)) == 32
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert list(token.parent.iterdir()) == [token]
    subprocess.run(command, env=environment, check=True)
    assert token.read_text(encoding="utf-8") == first


def test_a_token_that_others_could_read_is_closed_to_them_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_text("ab" * 32, encoding="utf-8")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with caplog.at_level(logging.WARNING):
        clusters.import_ray(to_start=True)
        clusters.import_ray(to_start=True)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text(encoding="utf-8") == "ab" * 32
    (record,) = caplog.records
    assert f"Ray's token in {token} had mode 0644; it has 0600 now." in record.getMessage()


def test_importing_ray_without_starting_one_creates_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    clusters.import_ray()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_ray_that_was_imported_before_there_was_a_token_uses_it(tmp_path: Path) -> None:
    program = (
        "import ray\n"
        "from ray._private.authentication import authentication_utils as utils\n"
        "from cookbook.utils import clusters\n"
        "was = utils.is_token_auth_enabled()\n"
        "clusters.import_ray(to_start=True)\n"
        "token = clusters._token_file().read_text()\n"
        "print(was, utils.is_token_auth_enabled(), utils.validate_request_token(f'Bearer {token}'))"
    )
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize("depth", [0, 60])
def test_the_folder_of_a_ray_is_private_and_short_enough_for_its_sockets(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        deep = Path(base) / ("x" * depth)
        deep.mkdir(exist_ok=True)
        keep_temporary_files_in(monkeypatch, deep)
        folder = clusters.private_folder("ray-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(f"{folder}{clusters.SOCKET_IN_FOLDER}") <= 107
        assert folder.is_relative_to(base) == (depth == 0)
        folder.rmdir()


@pytest.mark.parametrize("before", [None, "1"])
def test_only_a_ray_that_is_started_is_limited_to_loopback(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import ray_constants

    monkeypatch.delenv(clusters.NO_CLUSTER, raising=False)
    if before is not None:
        monkeypatch.setenv(clusters.NO_CLUSTER, before)
    ray = clusters.import_ray()
    with clusters.on_loopback(ray):
        assert os.environ[clusters.NO_CLUSTER] == "0"
    assert os.environ.get(clusters.NO_CLUSTER) == before
    assert ray_constants.ENABLE_RAY_CLUSTER


def test_a_ray_that_would_listen_to_other_machines_is_not_started() -> None:
    other = SimpleNamespace(__version__="9.9", util=SimpleNamespace(get_node_ip_address=lambda: "192.0.2.7"))
    with (
        pytest.raises(ClusterError, match=r"Ray 9\.9 would listen on 192\.0\.2\.7"),
        clusters.on_loopback(other),
    ):
        raise AssertionError("it is started")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9[x]", "http://[::1", "host:port"])
def test_an_invalid_address_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(ClusterError, match="Invalid address="):
        clusters.check_reachable(address, 1)
