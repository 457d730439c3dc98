"""A base model with frozen weights and the LoRA adapters that live on it.

Shape suffixes: N tokens of a packed row, S scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine import attention
from cookbook.engine.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.projection import token_logprobs
from cookbook.errors import ConfigError
from cookbook.types import LoraConfig

logger = logging.getLogger(__name__)

_GLOBAL_STATE = threading.Lock()
"""Held while a model loads or an adapter is drawn: both change state that all engines share."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA on a base model. `weights` are its parameters under the names that PEFT saves."""

    name: str
    lora: LoraConfig
    weights: dict[str, nn.Parameter]


class BaseModel:
    """Loads one model once; every training and sampling client on it shares the weights.

    `device` is "auto" (CUDA when there is one), or a torch device; `dtype` is "auto" (bfloat16 on
    CUDA, float32 on CPU), "float32", "bfloat16" or "float16". Adapters are always float32.
    """

    def __init__(self, model_name: str, device: str = "auto", dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM

        self.name = model_name
        self.device = _resolve_device(device)
        self.dtype = _resolve_dtype(dtype, self.device)
        self.tokenizer = models.get_tokenizer(model_name)
        with _GLOBAL_STATE, _no_progress_bar():
            self.model: Any = models.load_from_hub_or_disk(
                "weights", model_name, _whole(AutoModelForCausalLM.from_pretrained), dtype=self.dtype
            )
        self.model.to(self.device).eval().requires_grad_(False)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.context_length: int = getattr(self.model.config, "max_position_embeddings", None) or 2**20
        self._peft: Any = None
        self._active: str | None = None
        self._adapter_numbers = itertools.count()
        self.is_packed = self._switch_to_packed_attention()

    # -- adapters ---------------------------------------------------------------------------

    def add_adapter(self, lora: LoraConfig) -> Adapter:
        """A new adapter: A random in `lora.seed`, B zero, so the model is unchanged at first."""
        from peft import LoraConfig as PeftLoraConfig
        from peft import PeftModel, TaskType

        name = f"adapter{next(self._adapter_numbers)}"
        config = PeftLoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=self._target_modules(lora),
            base_model_name_or_path=models.model_location(self.name),
            inference_mode=True,
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with _GLOBAL_STATE, torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            # PEFT warns that an adapter on a tied lm_head cannot be merged in place; nothing here merges.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            # PEFT 0.21 reads a name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            if lora.seed is not None:
                torch.manual_seed(lora.seed)
            if self._peft is None:
                self._peft = PeftModel(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        self._active = None
        weights = {
            parameter_name.replace(f".{name}.", "."): parameter
            for parameter_name, parameter in self._peft.named_parameters()
            if f".{name}." in parameter_name
        }
        return Adapter(name, lora, weights)

    def remove_adapter(self, adapter: Adapter) -> None:
        """Frees an adapter. PEFT keeps at least one, so the last one stays."""
        others = [name for name in self._peft.peft_config if name != adapter.name]
        if others:
            self._activate(others[0])
            self._peft.delete_adapter(adapter.name)

    def clone_adapter(self, adapter: Adapter) -> Adapter:
        clone = self.add_adapter(adapter.lora)
        with torch.no_grad():
            for name, weight in adapter.weights.items():
                clone.weights[name].copy_(weight)
        return clone

    def adapter_config(self, adapter: Adapter) -> Any:
        """The adapter's configuration as PEFT saves it."""
        return self._peft.peft_config[adapter.name]

    def _target_modules(self, lora: LoraConfig) -> list[str]:
        head = self.model.get_output_embeddings()
        chosen, other = {}, []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Module) and hasattr(module, "base_layer"):
                module = module.base_layer  # already carries another adapter
            if not isinstance(module, nn.Linear) or ".lora_" in name or name.endswith(".base_layer"):
                continue
            if module is getattr(head, "base_layer", head):
                group, wanted = "train_unembed", lora.train_unembed
            elif "attn" in name or "attention" in name:
                group, wanted = "train_attn", lora.train_attn
            else:
                group, wanted = "train_mlp", lora.train_mlp
            if wanted:
                chosen[name] = group
            else:
                other.append(name)
        for group in ("train_attn", "train_mlp", "train_unembed"):
            if getattr(lora, group) and group not in chosen.values():
                raise ConfigError(
                    f"{group}=True, but {self.name} has no linear layer of that kind to put an adapter on. "
                    f"Pass {group}=False."
                )
        if not chosen:
            raise ConfigError("Nothing to train: set train_attn, train_mlp or train_unembed.")
        suffixes = {name.rsplit(".", 1)[-1] for name in chosen}
        is_unambiguous = not any(name.rsplit(".", 1)[-1] in suffixes for name in other)
        return sorted(suffixes) if is_unambiguous else sorted(chosen)

    @contextlib.contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Runs the model with one adapter, or with none."""
        if adapter is not None:
            self._activate(adapter.name)
        is_bare = adapter is None and self._peft is not None
        with self._peft.disable_adapter() if is_bare else contextlib.nullcontext():
            yield

    def _activate(self, adapter_name: str) -> None:
        if self._active != adapter_name:
            self._peft.set_adapter(adapter_name)
            self._active = adapter_name

    # -- forward ----------------------------------------------------------------------------

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """The log-probability of the target at every scored position: [S], fp32."""
        return self._packed_logprobs(batch) if self.is_packed else self._plain_logprobs(batch)

    def _packed_logprobs(self, batch: PackedBatch) -> Tensor:
        hidden_ND = self.model.get_decoder()(
            input_ids=batch.tokens_1N,
            position_ids=batch.positions_1N,
            use_cache=False,
            segments=batch.layout.segments,
        ).last_hidden_state[0]
        project = self.model.get_output_embeddings()
        return token_logprobs(
            batch.scored(hidden_ND), batch.scored(batch.targets_N), project, self.vocab_size
        )

    def _plain_logprobs(self, batch: PackedBatch) -> Tensor:
        """The model's own forward, for models whose sequences cannot be packed: one at a time."""
        assert len(batch.layout.segments) == 1
        logits_NV = self.model(input_ids=batch.tokens_1N, use_cache=False).logits[0]
        logits_SV, targets_S = batch.scored(logits_NV), batch.scored(batch.targets_N)
        return -nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")

    @torch.no_grad()
    def _switch_to_packed_attention(self) -> bool:
        """Uses packed attention if, on two short sequences, it gives what the model itself gives.

        Architectures differ in more than a config tells (soft caps, sinks, recurrent layers,
        scaled logits), so this is tried, not guessed.
        """
        generator = torch.Generator().manual_seed(0)
        sequences = []
        for length in (7, 5):
            ids_T = torch.randint(self.vocab_size, (length,), generator=generator).numpy()
            sequences.append(TokenSequence(ids_T, ids_T, np.ones(length, np.float32), {}))
        plain_N = torch.cat(
            [self._plain_logprobs(pack([s], self.device, trained_only=False)) for s in sequences]
        )
        own_attention = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(attention.NAME)
            packed_N = self._packed_logprobs(pack(sequences, self.device, trained_only=False))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            tolerance = 1e-4 if self.dtype == torch.float32 else 0.05
            difference = ((packed_N - plain_N).abs() / plain_N.abs()).max().item()
            if difference <= tolerance:
                return True
            reason = f"its log-probabilities would move by {difference:.1%}"
        self.model.set_attn_implementation(own_attention)
        logger.info("%s runs one sequence at a time: it cannot be packed (%s).", self.name, reason)
        return False


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading from disk is quick; a download has the hub's own progress bar."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _whole(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses files that lack a weight, for which transformers would draw random numbers."""

    def load(location: str, **options: Any) -> Any:
        model, report = from_pretrained(location, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing from its files, first {missing[0]}.")
        return model

    return load


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no torch device. Use auto, cpu, cuda or cuda:0.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but this machine has no CUDA device. Use device=auto.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r}, but this machine has {torch.cuda.device_count()} CUDA devices."
        )
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ConfigError(f"dtype={dtype!r} is not supported. Use auto, {', '.join(dtypes)}.")
    return dtypes[dtype]
