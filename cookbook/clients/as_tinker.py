"""Puts this package under the name `tinker`, so that programs written for the Tinker SDK run unchanged."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types as python_types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook import errors, types
from cookbook.clients import futures, rest, sampling, service, training
from cookbook.errors import ConfigError

SDK_VERSION = "0.38.0"
"""The version of the Tinker SDK whose names these are."""


class TinkerServiceClient(service.ServiceClient):
    """A ServiceClient that names saved checkpoints by `tinker://` paths, as the Tinker SDK does."""

    _says_tinker_paths = True


_TYPE_MODULES = (
    "checkpoint", "checkpoints_list_response", "cursor", "datum", "dmel_chunk", "encoded_text_chunk",
    "external_weights_urls_response", "forward_backward_output", "get_info_response",
    "get_server_capabilities_response", "image_asset_pointer_chunk", "image_chunk", "load_weights_response",
    "lora_config", "loss_fn_inputs", "loss_fn_output", "loss_fn_type", "model_id", "model_input",
    "model_input_chunk", "optim_step_response", "optimizer", "provenance_spans", "sample_response",
    "sampled_sequence", "sampling_client_kind", "sampling_params", "save_weights_external_response",
    "save_weights_for_sampler_response", "save_weights_response", "stop_reason", "tensor_data",
    "tensor_dtype", "training_run", "training_runs_response", "weights_info_response",
)  # fmt: skip
"""The modules of `tinker.types` whose types there are here. Each has the names of all of them."""

_CLIENTS = {
    "APIFuture": futures.APIFuture,
    "RestClient": rest.RestClient,
    "SamplingClient": sampling.SamplingClient,
    "ServiceClient": TinkerServiceClient,
    "TrainingClient": training.TrainingClient,
}
_CLIENT_MODULES = ("api_future", "rest_client", "sampling_client", "service_client", "training_client")


CHILDREN_PATH = Path(__file__).parent / "tinker_path"
"""The folder that processes which a program starts have in their PYTHONPATH."""


def install_as_tinker() -> None:
    """Makes `import tinker` import this package, with the submodules whose names there are here.

    It does so in the processes that this one starts as well. Raises ConfigError if the Tinker SDK itself is
    imported already.
    """
    there = sys.modules.get("tinker")
    if there is not None and not isinstance(there, _Alias):
        raise ConfigError(
            f"The package tinker is imported already, from {there.__file__}. Call install_as_tinker() before "
            f"anything imports it, or run the program with: python -m recipes.tinker <module> <arguments>"
        )
    for name, names in modules().items():
        sys.modules[name] = _Alias(name, names)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(CHILDREN_PATH) not in paths:
        root = Path(errors.__file__).parents[1]
        if root.name != "site-packages":  # it may have been found in the current folder
            paths.append(str(root))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILDREN_PATH), *paths])
    if str(CHILDREN_PATH) not in sys.path:  # which multiprocessing hands on
        sys.path.insert(0, str(CHILDREN_PATH))
    if not any(isinstance(finder, _NoOtherModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoOtherModules())


def modules() -> dict[str, Mapping[str, Any]]:
    """Returns the names of each module of the SDK that there is here."""
    values = {name: getattr(types, name) for name in types.__all__}
    raised = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    top = {
        **values,
        **raised,
        **_CLIENTS,
        "__version__": SDK_VERSION,
        "__title__": "tinker",
    }
    return {
        "tinker": top,
        "tinker.types": values,
        **{f"tinker.types.{name}": values for name in _TYPE_MODULES},
        "tinker._exceptions": raised,
        "tinker._version": {"__version__": SDK_VERSION, "__title__": "tinker"},
        "tinker.lib": {},
        "tinker.lib.public_interfaces": _CLIENTS,
        **{f"tinker.lib.public_interfaces.{name}": _CLIENTS for name in _CLIENT_MODULES},
    }


class _Alias(python_types.ModuleType):
    """A module of the name `tinker`, or below it."""

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name, f"What `{name}` of the Tinker SDK is in sft-cookbook.")
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.__name__}.{name} of the Tinker SDK {SDK_VERSION} is not in sft-cookbook: see "
            f"docs/tinker.md for what is."
        )


class _NoOtherModules(importlib.abc.MetaPathFinder):
    """Keeps the SDK's own modules from being mixed with these."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.startswith("tinker.") and isinstance(sys.modules.get("tinker"), _Alias):
            raise ModuleNotFoundError(
                f"The module {fullname} of the Tinker SDK {SDK_VERSION} is not in sft-cookbook: see "
                f"docs/tinker.md for what is.",
                name=fullname,
            )
