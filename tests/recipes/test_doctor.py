"""Tests of the report on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from recipes import doctor


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_versions_are_those_of_the_imported_packages(report: doctor.Report) -> None:
    assert f"torch {torch.__version__}" in report.facts["Versions"]
    assert f"transformers {transformers.__version__}" in report.facts["Versions"]


def test_extras_are_listed_with_the_command_that_installs_them(report: doctor.Report) -> None:
    extras = dict(fact.split(": ", 1) for fact in report.facts["Extras"])
    assert extras["trackio"] == "installed"
    missing = {name: state for name, state in extras.items() if state != "installed"}
    assert all(f"pip install 'sft-cookbook[{name}]'" in state for name, state in missing.items())


def test_a_machine_without_a_gpu_is_told_what_is_slow(report: doctor.Report) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert report.facts["GPU"] == ["none that torch can use"]
    assert any("no GPU" in finding for finding in report.findings)


def test_slow_settings_of_the_environment_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines = "\n".join(doctor.examine().lines())
    assert "CUDA_LAUNCH_BLOCKING is set: the CPU waits for every kernel" in lines
    assert "logged in" in lines
    assert "hf_secret" not in lines


def test_an_offline_hub_is_said(report: doctor.Report) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert report.facts["Hub"][0] == "not reachable: offline mode is on (HF_HUB_OFFLINE)"


def test_the_command_takes_no_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["device=cuda"])
    assert "takes no arguments" in capsys.readouterr().err
