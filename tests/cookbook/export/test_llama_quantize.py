"""Smaller GGUF files: llama.cpp's tool is run where it is installed, and else its command is printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cookbook.config import cli
from cookbook.errors import ConfigError, FileError
from cookbook.export import llama_quantize
from cookbook.export.config import ExportConfig


def install(tool: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `llama-quantize` of these shell commands alone on the path."""
    program = folder / "bin" / llama_quantize.PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{tool}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model-f16.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_the_tool_makes_the_file_beside_the_larger_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install('cp "$1" "$2"; echo "$3" >> "$2"', tmp_path, monkeypatch)
    made = llama_quantize.quantize(model, "q4_k_m")
    assert made == tmp_path / "model-q4_k_m.gguf"
    assert made.read_bytes() == b"GGUFQ4_K_M\n"


def test_without_the_tool_nothing_is_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert llama_quantize.quantize(model, "q4_k_m") is None
    assert llama_quantize.command("out", model.name, "q4_k_m") == [
        "llama-quantize", "out/model-f16.gguf", "out/model-q4_k_m.gguf", "Q4_K_M",
    ]  # fmt: skip


def test_a_tool_that_fails_is_an_error_with_its_last_lines(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("echo no such type >&2; exit 3", tmp_path, monkeypatch)
    with pytest.raises(FileError, match=r"(?s)exit code 3.*no such type"):
        llama_quantize.quantize(model, "q4_k_m")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["format=gguf", "gguf_quantize=q4_k"], "Did you mean `q4_k_m`"),
        (["format=merged", "gguf_quantize=q4_k_m"], "applies to format=gguf only"),
        (["format=gguf", "gguf_type=q4_k_m"], "q4_k_m is a value of `gguf_quantize`"),
        (["format=gguf", "gguf_type=Q4_K_M"], "q4_k_m is a value of `gguf_quantize`"),
        (["format=gguf", "dtype=q4_k_m"], "q4_k_m is a value of `gguf_quantize`"),
    ],
)
def test_an_invalid_type_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.make_config(ExportConfig, {}, ["checkpoint=runs/sft", "to=out", *settings])
