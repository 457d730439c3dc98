"""Compares the public names and signatures with those of the Tinker SDK, in the committed table of it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cookbook
from cookbook.clients import as_tinker, rest
from cookbook.engine.training.losses import LOSSES

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "sdk.json").read_text(encoding="utf-8"))

NAMES_NOT_HERE = {
    **dict.fromkeys(
        ["BackcompatSamplingClientFuture", "BackcompatTrainingClientFuture"], "clients are futures"
    ),
    **dict.fromkeys(["AdminClient", "auth"], "accounts of the hosted service"),
    **dict.fromkeys(["RequestOptions", "Timeout"], "settings of HTTP requests"),
    **dict.fromkeys(["OptimStepRequest", "SampleRequest"], "messages of HTTP requests"),
    **dict.fromkeys(
        ["DimuonOptimizerConfig", "DimuonParams", "OptimParams"], "an optimizer that is not here"
    ),
    **dict.fromkeys(["LossHandle", "PerDatumLossFn"], "losses that are sent to a server"),
    "ExperimentalWarning": "nothing warns of being experimental",
}
METHODS_NOT_HERE = {
    "ServiceClient": {"create_custom_loss", "get_console_url", "get_telemetry"},
    "TrainingClient": {"__init__", "get_console_url", "get_telemetry"},
    "SamplingClient": {"__init__", "create", "get_telemetry", "on_queue_state_change"},
    "RestClient": {"get_telemetry"},
    "APIFuture": {"__init__"},
}
TYPES = (
    *("AdamParams", "Checkpoint", "Cursor", "Datum", "EncodedTextChunk", "ImageAssetPointerChunk"),
    *("ImageChunk", "LoraConfig", "ModelInput", "ParsedCheckpointTinkerPath", "PromptProvenanceSpan"),
    *("SamplingParams", "SampledProvenanceSpan", "TensorData", "TrainingRun", "TrainingRunsResponse"),
    "WeightsInfoResponse",
)


@pytest.mark.slow
def test_the_table_is_that_of_the_installed_sdk() -> None:
    if importlib.util.find_spec("tinker") is None:
        pytest.skip("the Tinker SDK is not installed (`make tinker` compares with it)")
    script = Path(__file__).parent / "signatures.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == TABLE, "write the new table: python tests/tinker/signatures.py"


def test_the_version_is_that_of_the_table() -> None:
    assert TABLE["version"] == as_tinker.SDK_VERSION


def test_every_name_is_here_or_it_is_said_why_not() -> None:
    top = as_tinker.modules()["tinker"]
    missing = {name for name in TABLE["names"] if name not in top and name != "types"}
    assert missing == set(NAMES_NOT_HERE)


@pytest.mark.parametrize("client", METHODS_NOT_HERE)
def test_methods_have_the_positions_and_keywords_of_the_sdk(client: str) -> None:
    """Further parameters are keyword-only, so that no value is taken for another parameter."""
    kind = getattr(cookbook, client)
    missing = set()
    for name, (positional, keywords) in TABLE["methods"][client].items():
        if name in METHODS_NOT_HERE[client]:
            continue
        method = getattr(kind, name, None)
        if client == "RestClient" and method is None:
            method = getattr(kind, name.removesuffix("_async"), None)
        if method is None:
            missing.add(name)
            continue
        parameters = [*inspect.signature(method).parameters.values()]
        ours = [
            one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD and one.name != "self"
        ]
        assert ours == [one for one in positional if not one.startswith("_")], name
        assert {one.name for one in parameters} >= set(keywords), name
    hosted = {
        name for name in missing if client == "RestClient" and name.removesuffix("_async") in rest.HOSTED_ONLY
    }
    assert missing == hosted


@pytest.mark.parametrize("name", TYPES)
def test_types_have_the_fields_of_the_sdk(name: str) -> None:
    assert set(getattr(cookbook.types, name)._fields()) >= set(TABLE["fields"][name])


@pytest.mark.slow
def test_every_loss_of_the_sdk_is_here() -> None:
    assert set(LOSSES) == set(TABLE["losses"]) - {"custom"}
