"""`Config`: the keys of a run, their defaults, and the check of their values."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

import chz

from cookbook import models
from cookbook.data.types import ChatDatasetBuilder, SupervisedDatasetBuilder
from cookbook.engine.options import (
    EngineOptions,
    GradientCheckpointing,
    OptimizerBits,
    Quantization,
    Shard,
)
from cookbook.errors import ConfigError
from cookbook.eval.evaluators import EvaluatorBuilder, OnEvaluatorError
from cookbook.runs.directions import DEFAULT_METRIC, METRIC_PATTERNS, BestMode, direction
from cookbook.runs.folder import IfLogPathExists
from cookbook.supervised.hyperparameters import LearningRate, recommend_learning_rate
from cookbook.supervised.notify import check_target
from cookbook.supervised.objectives import Objective
from cookbook.supervised.schedules import LRSchedule
from cookbook.types import MAX_RANK, LoraConfig, check_lora

_field = functools.partial(chz.field, validator=chz.validators.typecheck)


@chz.chz
class Config:
    """A supervised fine-tuning run."""

    # model and data
    log_path: str = _field(doc="folder of the run", munger=lambda self, path: str(Path(path).expanduser()))
    model_name: str = _field(doc="hub id, folder, or cookbook/tiny-chat, the embedded model")
    dataset_builder: SupervisedDatasetBuilder = chz.field(doc="makes the training and the evaluation data")
    renderer_name: str | None = _field(
        default=None,
        doc="chat format, recorded with every checkpoint; default: chosen from the model",
        munger=chz.mungers.if_none(lambda self: models.recommended_renderer(self.model_name)),
    )
    system_prompt: str | None = _field(
        default=None, doc="put before every conversation, recorded with every checkpoint"
    )
    tools_in_system: bool = _field(
        default=False,
        doc="describe tools in the system message and write calls and results as text, for a chat template "
        "without a place for them; recorded with every checkpoint",
    )
    template_kwargs: Mapping[str, Any] | None = _field(
        default=None,
        doc='variables of the chat template in every conversation, such as {"enable_thinking": false}; '
        "recorded with every checkpoint",
    )
    load_checkpoint_path: str | None = _field(
        default=None, doc="start from these weights, with a new optimizer"
    )

    # optimization
    learning_rate: float | Literal["auto"] = _field(
        default="auto",
        doc="peak learning rate; auto: by a published rule, from the model's family and hidden size",
    )
    lr_schedule: LRSchedule = _field(default="linear", doc="linear or cosine, both down to 0, or constant")
    warmup_steps: int = _field(default=0, doc="steps over which the learning rate rises to its peak")
    num_epochs: int = _field(default=1, doc="passes over the data")
    max_steps: int | None = _field(
        default=None, doc="maximum number of optimizer steps; default: as many as num_epochs takes"
    )
    adam_beta1: float = _field(default=0.9, doc="decay rate of the running mean of gradients")
    adam_beta2: float = _field(default=0.95, doc="decay rate of the running mean of squared gradients")
    adam_eps: float = _field(default=1e-8, doc="added to the root of the mean of squared gradients")
    weight_decay: float = _field(default=0.0, doc="decoupled weight decay of the adapter's weights")
    grad_clip_norm: float = _field(default=1.0, doc="global gradient norm to clip to; 0: do not clip")
    seed: int = _field(default=0, doc="seed of the adapter's weights and of the order of the data")

    # adapter
    lora_rank: int = _field(default=32, doc="rank of the adapter; 0: train all of the model's own weights")
    lora_alpha: float = _field(default=32.0, doc="the adapter is scaled by lora_alpha / lora_rank")
    train_attn: bool = _field(default=True, doc="adapt the attention projections")
    train_mlp: bool = _field(default=True, doc="adapt the feed-forward layers")
    train_unembed: bool = _field(default=True, doc="adapt the projection to the vocabulary")

    lora_targets: list[str] = chz.field(
        default_factory=list,
        doc="layers to adapt, by their full names or the ends of these (q_proj), or regular expressions of "
        "full names; default: as train_attn, train_mlp and train_unembed say",
        validator=chz.validators.typecheck,
    )
    lora_dropout: float | None = _field(
        default=None,
        doc="share of the adapter's inputs that is dropped in training; default: that of an adapter in "
        "load_checkpoint_path, else 0",
    )
    use_rslora: bool = _field(
        default=False, doc="scale the adapter by lora_alpha / sqrt(lora_rank) instead (rsLoRA)"
    )
    add_tokens: list[str] = chz.field(
        default_factory=list,
        doc="tokens to add to the tokenizer; their embeddings are trained, and text that contains one is "
        "encoded with it",
        validator=chz.validators.typecheck,
    )

    # evaluation: at step 0, at a cadence in steps, and on the finished model
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="evaluators to run every eval_every steps"
    )
    infrequent_evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="evaluators to run every infrequent_eval_every steps"
    )
    eval_every: int = _field(default=50, doc="steps between evaluations; 0: off")
    infrequent_eval_every: int = _field(default=200, doc="steps between infrequent evaluations; 0: off")
    on_evaluator_error: OnEvaluatorError = _field(
        default="warn",
        doc="what happens when an evaluator fails: warn (the run continues without it) or raise",
    )

    # the best evaluation: its checkpoint is kept, and recorded in checkpoints.jsonl
    best_metric: str | None = _field(
        default=DEFAULT_METRIC, doc="metric that decides which checkpoint is the best; None: off"
    )
    best_mode: BestMode = _field(
        default="auto", doc="min or max is better; auto: by the metric's name (nll: min, accuracy: max)"
    )
    early_stopping_patience: int | None = _field(
        default=None,
        doc="evaluations without an improvement of best_metric after which the run finishes; default: off",
    )
    early_stopping_min_delta: float = _field(
        default=0.0, doc="improvement of best_metric that must be exceeded to reset the patience"
    )

    # checkpoints
    save_every: int = _field(default=100, doc="steps between checkpoints; 0: only the last")
    keep_checkpoints: int | None = _field(
        default=None, doc="number of newest checkpoints to keep, besides the best; default: all"
    )
    if_log_path_exists: IfLogPathExists = _field(
        default="resume", doc="what to do with an earlier run in log_path: resume, raise, delete or ask"
    )

    # running
    submit_ahead: int = _field(default=1, doc="number of steps queued ahead of the running one")
    device: str = _field(default="auto", doc="auto (CUDA when there is one), cpu, cuda or cuda:N")
    dtype: str = _field(
        default="auto",
        doc="of the base model: a name, or auto (bfloat16 on CUDA, float16 on CUDA devices that have none, "
        "float32 on CPU)",
    )
    max_tokens_per_microbatch: int | None = _field(
        default=None,
        doc="maximum number of tokens in a micro-batch; default: what fits in memory and is fast",
    )
    gradient_checkpointing: GradientCheckpointing = _field(
        default="auto",
        doc="recompute layers in the backward pass: auto (where memory needs it), on, off or offload (on, "
        "with the inputs of layers in host memory, which auto does for sequences that do not fit otherwise)",
    )
    quantization: Quantization | None = _field(
        default=None,
        doc="nf4: hold the frozen base weights in 4 bits (QLoRA; needs the extra qlora); fp8: in 8 bits, "
        "with forward products in 8 bits on CUDA devices that have them",
    )
    compile: bool = _field(default=False, doc="compile the layers: slow first steps, then fewer kernels")
    shard: Shard = _field(
        default="auto",
        doc="sharding over processes (torchrun): each holds all base weights (none), a shard of them "
        "(full), or what fits (auto)",
    )
    deterministic: bool = _field(
        default=False,
        doc="compute the same bits each time on CUDA too, so that resumes are bit-exact; slower",
    )
    optimizer_bits: OptimizerBits = _field(
        default=32,
        doc="of AdamW's moments: 32, or 8 (a quarter of their memory, rounded; needs the extra qlora)",
    )
    trace: bool = _field(default=False, doc="write trace.json: what ran when, for https://ui.perfetto.dev")
    wandb_project: str | None = _field(default=None, doc="Weights & Biases project; default: do not use it")
    wandb_name: str | None = _field(default=None, doc="name of the run there")
    tensorboard: bool = _field(
        default=False, doc="write TensorBoard event files to the run's folder (needs the extra tensorboard)"
    )
    trackio_project: str | None = _field(
        default=None, doc="trackio project, kept on this machine (needs the extra trackio); default: none"
    )
    trackio_name: str | None = _field(default=None, doc="name of the run there; default: that of its folder")

    mlflow_experiment: str | None = _field(
        default=None, doc="MLflow experiment, at MLFLOW_TRACKING_URI (needs the extra mlflow); default: none"
    )
    mlflow_name: str | None = _field(default=None, doc="name of the run there; default: that of its folder")
    swanlab_project: str | None = _field(
        default=None, doc="SwanLab project (needs the extra swanlab); default: none"
    )
    swanlab_name: str | None = _field(default=None, doc="name of the run there; default: that of its folder")
    push_to_hub: str | None = _field(
        default=None,
        doc="owner/name of a private repository on the hub; each checkpoint is pushed to it, and at the end "
        "the best one with its model card",
    )
    notify: str | None = _field(
        default=None,
        doc="URL that gets a JSON message when the run ends, or a command that gets its text; not recorded",
    )

    @property
    def peak_learning_rate(self) -> float:
        """Returns the learning rate of a resolved config, in which it is a number."""
        assert not isinstance(self.learning_rate, str)
        return self.learning_rate

    @property
    def recommended_learning_rate(self) -> LearningRate:
        return recommend_learning_rate(self.model_name, is_full=self.lora_rank == 0)

    @property
    def data_builder(self) -> SupervisedDatasetBuilder:
        """Returns the builder of the data, whose tokenizer has `add_tokens`."""
        builder = self.dataset_builder
        if not self.add_tokens or not isinstance(builder, ChatDatasetBuilder):
            return builder
        common = chz.replace(
            builder.common_config, add_tokens=builder.common_config.add_tokens or self.add_tokens
        )
        return chz.replace(builder, common_config=common)

    def lora(self) -> LoraConfig:
        """Returns the settings of a new adapter."""
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            seed=self.seed,
            train_unembed=self.train_unembed,
            train_mlp=self.train_mlp,
            train_attn=self.train_attn,
            targets=tuple(self.lora_targets),
            dropout=self.lora_dropout or 0.0,
            use_rslora=self.use_rslora,
            add_tokens=tuple(self.add_tokens),
        )

    def engine_options(self) -> EngineOptions:
        """Returns the engine's options, from the keys of the same names."""
        # packing serves commands that sample, and would take the memory of training
        names = {option.name for option in fields(EngineOptions)} - {"pack_weights"}
        return EngineOptions(**{name: getattr(self, name) for name in names})

    def objective(self) -> Objective | None:
        """Returns what the run trains for; None for the likelihood of its data."""
        return None

    def metric_patterns(self) -> list[str]:
        """Returns the metrics of held-out data."""
        return list(METRIC_PATTERNS)

    def resolved(self) -> Self:
        """Returns this config with `learning_rate=auto` resolved to a number, from the model's config."""
        if self.learning_rate != "auto":
            return self
        return chz.replace(self, learning_rate=self.recommended_learning_rate.value)

    @chz.validate
    def _check_values(self) -> None:
        at_least = {
            "warmup_steps": 0, "num_epochs": 1, "max_steps": 1, "weight_decay": 0, "grad_clip_norm": 0,
            "seed": 0, "lora_rank": 0, "eval_every": 0, "infrequent_eval_every": 0, "save_every": 0,
            "keep_checkpoints": 1, "submit_ahead": 0, "early_stopping_patience": 1,
            "early_stopping_min_delta": 0,
        }  # fmt: skip
        if self.lora_rank > MAX_RANK:
            raise ConfigError(f"Invalid lora_rank={self.lora_rank}: must be <= {MAX_RANK}.")
        above_zero = ("learning_rate", "adam_eps", "lora_alpha")
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"Invalid {name}={value}: must be >= {least}.")
        for name in above_zero:
            value = getattr(self, name)
            if value != "auto" and not 0 < value < math.inf:
                raise ConfigError(f"Invalid {name}={value}: must be finite and > 0.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Invalid {name}={getattr(self, name)}: must be >= 0 and < 1.")
        self.engine_options()  # raises for unsupported values
        try:
            json.dumps(dict(self.template_kwargs or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"template_kwargs={self.template_kwargs} cannot be recorded as JSON: {error}."
            ) from error
        if self.seed >= 2**31:
            raise ConfigError(f"Invalid seed={self.seed}: must be < 2**31.")
        if self.weight_decay == math.inf or self.grad_clip_norm == math.inf:
            raise ConfigError("weight_decay and grad_clip_norm must be finite.")
        if self.lora_rank == 0 and not (self.train_attn and self.train_mlp and self.train_unembed):
            raise ConfigError(
                "lora_rank=0 trains every weight: train_attn, train_mlp and train_unembed choose the layers "
                "of a LoRA. Remove them, or set lora_rank to at least 1."
            )
        if self.lora_rank == 0 and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization} needs frozen base weights, and lora_rank=0 trains them. "
                f"Set lora_rank to at least 1, or remove quantization."
            )
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise ConfigError("Nothing to train: set train_attn, train_mlp or train_unembed.")
        check_lora(self.lora())
        if self.notify is not None:
            check_target(self.notify)
        self._check_best()

    def _check_best(self) -> None:
        if self.best_metric is not None:
            direction(self.best_metric, self.best_mode)  # raises if the direction is unknown
        if self.early_stopping_patience is None:
            return
        if self.best_metric is None:
            raise ConfigError(
                "early_stopping_patience waits for a better best_metric, which is None. Set best_metric."
            )
        if not (self.eval_every or self.infrequent_eval_every):
            raise ConfigError(
                "early_stopping_patience counts evaluations, and there are none: set eval_every."
            )


Config.__module__ = "cookbook.supervised.train"  # the path that users import and that config.json records
