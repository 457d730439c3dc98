"""Checks of a config that need no data and no weights, before anything is read, removed or written."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import models
from cookbook.config.chz_private import plain_default
from cookbook.data.types import ChatDatasetBuilder
from cookbook.engine import processes
from cookbook.engine.options import check_device
from cookbook.errors import CheckpointError, ConfigError
from cookbook.eval.evaluators import AnyEvaluatorBuilder, metric_patterns_of
from cookbook.loggers import check_wandb_login
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.directions import DEFAULT_METRIC
from cookbook.supervised.config import Config
from cookbook.supervised.notify import check_command
from cookbook.types import LORA_KEYS, LoraConfig
from cookbook.utils import extras
from renderers.registry import check_renderer_name

if TYPE_CHECKING:
    from cookbook.engine.checkpoint import StateInfo

BYTES_OF_ADAM = 8
"""Two moments per weight, in float32."""


def check_before_work(config: Config, is_resumed: bool = False) -> None:
    """Raises a CookbookError if this machine cannot run the config. Takes a second or two.

    A resumed run starts from its own checkpoint instead of `load_checkpoint_path`.
    """
    _check_log_path(Path(config.log_path).absolute())
    check_device(config.device)
    if config.load_checkpoint_path is not None and not is_resumed:
        _check_is_checkpoint(Path(config.load_checkpoint_path).expanduser())
    if config.tensorboard:
        extras.require("tensorboard", "tensorboard=True")
    if config.trackio_project is not None:
        extras.require("trackio", f"trackio_project={config.trackio_project}")
    if config.wandb_project is not None and processes.current().is_main:
        check_wandb_login(config.wandb_project)
    if config.mlflow_experiment is not None:
        extras.require("mlflow", f"mlflow_experiment={config.mlflow_experiment}")
    if config.swanlab_project is not None:
        extras.require("swanlab", f"swanlab_project={config.swanlab_project}")
    if config.notify is not None:
        check_command(config.notify)
    if config.push_to_hub is not None:
        _check_push(config.push_to_hub)
    if config.compile:
        _check_compiler()
    has_eval_data = config.dataset_builder.has_eval_data()
    check_evaluations(config, has_eval_data)
    if config.load_checkpoint_path is not None and not is_resumed:
        _check_start_weights(config, config.load_checkpoint_path)
    models.check_files(config.model_name)
    check_chat_format(config)
    _check_space(config)


def _check_push(name: str) -> None:
    from cookbook.export import push

    repository = push.repository_of(name)
    if processes.current().is_main:
        push.check_access(repository)


def _check_log_path(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"log_path={folder}: {existing} is a file. Give a folder; it need not exist.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"log_path={folder} cannot be written: no permission for {existing}. Choose another folder."
        )


# -- evaluations ------------------------------------------------------------------------------


def check_evaluations(config: Config, has_eval_data: bool | None) -> None:
    """Raises ConfigError for a cadence with nothing to evaluate, or a `best_metric` that nothing measures.

    A `has_eval_data` of None means that it is unknown until the data are read.
    """
    _check_best_metric(config, has_eval_data)
    nothing_at = {
        "eval_every": has_eval_data is False and not config.evaluator_builders,
        "infrequent_eval_every": not config.infrequent_evaluator_builders,
    }
    for key, has_nothing in nothing_at.items():
        every = getattr(config, key)
        if has_nothing and every and (every,) != plain_default(type(config), key):
            builders = key.replace("eval_every", "evaluator_builders")
            data = "data to evaluate on (test_size= or eval_dataset=) or " if key == "eval_every" else ""
            raise ConfigError(
                f"{key}={every}, but there is nothing to evaluate. Give {data}{builders}=, or remove {key}."
            )


def _check_best_metric(config: Config, has_eval_data: bool | None) -> None:
    """Raises ConfigError if no evaluation measures `best_metric`.

    If a builder does not list its metrics, the first evaluation checks it instead.
    """
    metric = config.best_metric
    if metric is None or (metric == DEFAULT_METRIC and config.early_stopping_patience is None):
        return
    measured = config.metric_patterns() if has_eval_data is not False and config.eval_every else []
    due: list[AnyEvaluatorBuilder] = [
        *(config.evaluator_builders if config.eval_every else ()),
        *(config.infrequent_evaluator_builders if config.infrequent_eval_every else ()),
    ]
    for builder in due:
        patterns = metric_patterns_of(builder)
        if patterns is None:
            return
        measured += patterns
    if any(fnmatch.fnmatchcase(metric, pattern) for pattern in measured):
        return
    patience = config.early_stopping_patience
    if not measured and patience is not None:
        raise ConfigError(
            f"early_stopping_patience={patience} counts evaluations, and this run has none. Give data to "
            f"evaluate on or an evaluator, or remove early_stopping_patience."
        )
    raise ConfigError(
        f"best_metric={metric} is not among the metrics of this run's evaluations: "
        f"{', '.join(measured) or 'there are none'}. Name one of those, or add the evaluator that "
        f"measures it."
    )


# -- weights ----------------------------------------------------------------------------------


def _check_is_checkpoint(folder: Path) -> None:
    """Raises CheckpointError if the folder is missing or is that of a run. Reads none of its files."""
    if not folder.is_dir():
        raise CheckpointError(
            f"Checkpoint {folder} does not exist (load_checkpoint_path). Give the path of a saved checkpoint."
        )
    if (folder / "checkpoints.jsonl").is_file():
        raise CheckpointError(
            f"load_checkpoint_path={folder} is the folder of a run. Give one of its checkpoints: "
            f"{CheckpointLog(folder).last_path() or 'it has none'}."
        )


def _check_start_weights(config: Config, path: str) -> None:
    """Raises CheckpointError if the weights are missing or do not fit the model or the adapter."""
    from cookbook.engine import checkpoint

    info = checkpoint.read_info(path)
    folder = Path(path).expanduser()
    _check_settings_fit(config, path, info, is_own=(folder / checkpoint.STATE_FILE).is_file())
    if info.lora.rank == 0:
        models.check_files(str(folder))
        theirs = _sizes_of_model(str(folder))
    else:
        theirs = _sizes_of_adapter(folder / checkpoint.ADAPTER_FILE)
    ours = _sizes_of_model(config.model_name)
    differing = [
        f"{name} {value} there, {ours[name]} here"
        for name, value in theirs.items()
        if ours[name] is not None and value != ours[name]
    ]
    if differing:
        raise CheckpointError(
            f"load_checkpoint_path={path}, trained on {info.base_model}, does not fit "
            f"model_name={config.model_name}: {', '.join(differing)}. Give the model that it was trained on."
        )


def _check_settings_fit(config: Config, path: str, info: StateInfo, is_own: bool) -> None:
    """Raises CheckpointError if the weights were trained with different adapter settings.

    An adapter keeps the layers that it has, so keys that choose layers may be left at their defaults. The
    kinds of layers are not compared for an adapter of another program, for which they are a guess.
    """
    ours, theirs = config.lora(), info.lora
    keys = ["rank", "add_tokens"]
    if theirs.rank and ours.rank:
        chosen = ("targets", *(("train_attn", "train_mlp", "train_unembed") if is_own else ()))
        keys += ["alpha", "use_rslora", *(key for key in chosen if getattr(ours, key) != _DEFAULT[key])]
    differing = [key for key in keys if _plain(getattr(theirs, key)) != _plain(getattr(ours, key))]
    if differing:
        named = [(LORA_KEYS.get(key, key), key) for key in differing]
        there = ", ".join(f"{name}={_plain(getattr(theirs, key))}" for name, key in named)
        here = ", ".join(f"{name}={_plain(getattr(ours, key))}" for name, key in named)
        raise CheckpointError(
            f"load_checkpoint_path={path} (rank {info.lora.rank} and alpha {info.lora.alpha:g}) does not fit "
            f"rank {config.lora_rank} and alpha {config.lora_alpha:g}: it was trained with {there}, and this "
            f"run has {here}. Give {there}; or merge it into its model with recipes.export, and start from "
            f"that as model_name."
        )


_DEFAULT = vars(LoraConfig())


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, (list, tuple)) else value


def _sizes_of_model(model_name: str) -> dict[str, int | None]:
    config = models.text_config(model_name)
    return {name: getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}


def _sizes_of_adapter(file: Path) -> dict[str, int | None]:
    """Returns the sizes of the model that a LoRA was trained on, as far as its tensors' shapes show them."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(f"Checkpoint {file.parent} is incomplete: it has no {file.name}.")
    found: dict[str, int | None] = {}
    try:
        with safe_open(str(file), "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if (layer := re.search(r"\.layers\.(\d+)\.", name)) is not None:
                    found["num_hidden_layers"] = max(found.get("num_hidden_layers") or 0, int(layer[1]) + 1)
                if re.search(r"\.(q_proj|gate_proj|lm_head)\.lora_A\.", name):
                    found["hidden_size"] = tensors.get_slice(name).get_shape()[1]
                if ".lm_head.lora_B." in name:
                    found["vocab_size"] = tensors.get_slice(name).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {file.parent} is damaged: {file.name} cannot be read ({error})."
        ) from error
    return found


# -- model, chat format, compiler, disk -------------------------------------------------------


def check_chat_format(config: Config) -> None:
    """Raises a CookbookError for an unknown renderer, or data tokenized with a different vocabulary."""
    assert config.renderer_name is not None  # set by its munger
    check_renderer_name(config.renderer_name)
    models.check_vocabulary(config.model_name)
    builder = config.dataset_builder
    if not isinstance(builder, ChatDatasetBuilder):
        return
    common = builder.common_config
    assert common.renderer_name is not None
    check_renderer_name(common.renderer_name)
    name = common.model_name_for_tokenizer
    if common.add_tokens not in ([], config.add_tokens):  # their order decides their ids
        raise ConfigError(
            f"The data are tokenized with add_tokens={common.add_tokens}, and the run has "
            f"add_tokens={config.add_tokens}. Give both the same tokens in the same order."
        )
    theirs, ours = models.get_tokenizer(name), models.get_tokenizer(config.model_name)
    if name != config.model_name and theirs.get_vocab() != ours.get_vocab():
        raise ConfigError(
            f"The data are tokenized for {name!r}, whose vocabulary is not that of "
            f"model_name={config.model_name!r}. Give both the same name."
        )


def _check_compiler() -> None:
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "gcc", "clang", "cc"]
    if not any(name is not None and shutil.which(name) for name in names):
        raise ConfigError(
            "compile=True needs a C++ compiler, and none is on the PATH (g++, clang++). Install one, name it "
            "in CXX, or remove compile."
        )


def _check_space(config: Config) -> None:
    """Raises ConfigError if the disk has no room for one checkpoint, by a lower bound of its size."""
    folder = Path(config.log_path).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    check_space(config.log_path, existing, _least_bytes(config))


def check_space(log_path: str, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConfigError(
            f"log_path={log_path} is on a disk with {free / 2**20:,.0f} MiB free, and a checkpoint of this "
            f"run takes at least {num_bytes / 2**20:,.1f} MiB. Free some space, or choose another log_path."
        )


def _least_bytes(config: Config) -> int:
    """Returns a lower bound of a checkpoint's bytes, from the layers that nearly every model has."""
    sizes = _sizes_of_model(config.model_name)
    hidden, layers, vocab = (sizes[name] or 0 for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if config.lora_rank == 0:
        return vocab * hidden * (2 + BYTES_OF_ADAM)
    per_layer = 2 * hidden * (config.train_attn + config.train_mlp)
    num_weights = config.lora_rank * (layers * per_layer + (hidden + vocab) * config.train_unembed)
    return num_weights * (4 + BYTES_OF_ADAM)
