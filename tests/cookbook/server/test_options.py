"""Options of a server that cannot work are refused before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from cookbook.errors import ConfigError
from cookbook.server.options import ServerOptions
from recipes import serve


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("max_adapters", 0, ">= 1"),
        ("max_pending", -1, ">= 1"),
        ("session_timeout_seconds", -5.0, "> 0"),
        ("max_request_mib", 0.0, "> 0"),
        ("poll_seconds", float("nan"), "> 0"),
    ],
)
def test_limits_that_would_refuse_everything_are_refused(name: str, value: float, bound: str) -> None:
    with pytest.raises(ConfigError, match=f"Invalid {name}={value}: must be {bound}"):
        ServerOptions(["cookbook/tiny-chat"], **{name: value})


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            serve.main([f"port={port}", "model_name=no/such-model"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert f"Nothing can listen at 127.0.0.1:{port}: Address already in use." in printed.err
    assert not printed.out
