"""The public names of `import cookbook`, and the modules that it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cookbook
import recipes

HEAVY = (
    "accelerate",
    "datasets",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)
MODULES = ("cookbook", "renderers", "cookbook.supervised.train", "recipes.sft", "recipes.sft_loop")


def test_the_public_names_are_these() -> None:
    assert sorted(cookbook.__all__) == [
        "APIConnectionError",
        "APIError",
        "APIFuture",
        "APIResponseValidationError",
        "APIStatusError",
        "APITimeoutError",
        "AdamOptimizerConfig",
        "AdamParams",
        "AuthenticationError",
        "BadRequestError",
        "BillingError",
        "Checkpoint",
        "CheckpointType",
        "CheckpointsListResponse",
        "ConflictError",
        "CookbookError",
        "Datum",
        "DmelChunk",
        "EncodedTextChunk",
        "ExternalWeightsUrlsResponse",
        "ForwardBackwardOutput",
        "GetInfoResponse",
        "GetServerCapabilitiesResponse",
        "ImageAssetPointerChunk",
        "ImageChunk",
        "InternalServerError",
        "LoadWeightsResponse",
        "LoraConfig",
        "LossFnInput",
        "LossFnInputs",
        "LossFnOutput",
        "LossFnType",
        "ModelData",
        "ModelID",
        "ModelInput",
        "ModelInputChunk",
        "NotFoundError",
        "OptimStepResponse",
        "ParsedCheckpointTinkerPath",
        "PermissionDeniedError",
        "PromptProvenanceSpan",
        "PromptScores",
        "RateLimitError",
        "RequestFailedError",
        "RestClient",
        "SampleResponse",
        "SampledProvenanceSpan",
        "SampledSequence",
        "SamplingClient",
        "SamplingClientKind",
        "SamplingParams",
        "SaveWeightsExternalResponse",
        "SaveWeightsForSamplerResponse",
        "SaveWeightsResponse",
        "ServiceClient",
        "StopReason",
        "SupportedModel",
        "TensorData",
        "TensorDtype",
        "TinkerError",
        "TrainingClient",
        "TrainingRun",
        "TrainingRunsResponse",
        "UnprocessableEntityError",
        "WeightsInfoResponse",
        "install_as_tinker",
        "types",
    ]


@pytest.mark.parametrize("name", cookbook.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    value = getattr(cookbook, name)
    if isinstance(value, type) and issubclass(value, Exception):
        assert value is getattr(cookbook.errors, name)
    elif name not in ("types", "APIFuture", "install_as_tinker") and not name.endswith("Client"):
        assert value is getattr(cookbook.types, name)


def test_dir_lists_the_names_and_other_attributes_raise() -> None:
    assert dir(cookbook) == sorted(cookbook.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ServiceClint'"):
        cookbook.ServiceClint  # noqa: B018


def test_importing_loads_no_heavy_package_and_the_types_need_none() -> None:
    """One interpreter imports one after the other: what the first loads would be found behind each."""
    check = (
        "import importlib, sys, cookbook\n"
        "cookbook.Datum(cookbook.ModelInput.from_ints([1]), {'target_tokens': [2]})\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in MODULES]


def test_help_of_every_command_loads_neither_torch_nor_transformers() -> None:
    """One interpreter prints one after the other: what the first loads would be found behind each."""
    check = (
        "import contextlib, io, sys\n"
        "from recipes import __main__ as console, summaries\n"
        "for name in summaries():\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        console.main([name, '--help'])\n"
        "    print(name, sorted({'torch', 'transformers', 'peft', 'datasets', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in recipes.summaries()], done.stderr


@pytest.mark.slow
def test_a_run_loads_no_tracker_and_no_plotting_package_before_it_ends(tmp_path: Path) -> None:
    check = (
        "import sys\n"
        "from cookbook.runs import curves\n"
        "from recipes import sft\n"
        "late = {'wandb', 'trackio', 'tensorboard', 'matplotlib'}\n"
        "curves.draw = lambda *_: print('before the picture:', sorted(late & set(sys.modules)))\n"
        f"sft.main(['log_path={tmp_path}', 'max_steps=1', 'batch_size=2', 'lora_rank=1', 'test_size=2',"
        "'infrequent_eval_every=0'])\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before the picture: []\n" in done.stdout
    assert done.stdout.endswith("True\n")
