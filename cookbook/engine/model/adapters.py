"""The trained weights of a base model: PEFT's LoRA adapters, or the model's own weights."""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine import checkpoint
from cookbook.engine.model import (
    dropout,
    expert_lora,
    fsdp,
    full_weights,
    input_groups,
    peft_layers,
    peft_names,
    peft_targets,
    vocabulary,
)
from cookbook.engine.model import lora as fused_lora
from cookbook.engine.model.dropout import DropoutKeys
from cookbook.engine.model.targets import find_targets, unused_layers
from cookbook.engine.model.text_part import text_decoder
from cookbook.errors import ConfigError
from cookbook.types import LoraConfig
from cookbook.utils import pretrained

GLOBAL_STATE = threading.Lock()
"""This lock is held while a model loads or an adapter is initialised, because both change global state."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a base model. `weights` are its parameters under the names that PEFT saves.

    With a rank of 0 the adapter stands for the base model itself, or a copy of it, and `weights` are all of
    the model's weights.
    """

    name: str
    lora: LoraConfig
    weights: dict[str, nn.Parameter]

    @property
    def is_full(self) -> bool:
        return self.lora.rank == 0


class Adapters:
    """Adds adapters to a model, removes them, and selects the active one."""

    def __init__(self, model: Any, model_name: str, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._peft: Any = None
        self._active: str | None = None
        self.in_use: str | None = None
        """The name of the adapter that runs now, or None if none does. No two adapters have one name."""
        self._numbers = itertools.count()
        self.targets = find_targets(model)
        """What the model has to put an adapter on."""
        self.input_groups: set[input_groups.Names] = set()
        """The names of layers that read one tensor."""
        self._readable: set[tuple[str, ...]] = set()
        """Choices of targets on which PEFT reads an adapter. Snapshots for sampling repeat one of them."""
        self.dropout_keys = DropoutKeys()

    def add(self, lora: LoraConfig) -> Adapter:
        """Returns a new adapter. A is random with `lora.seed` and B is zero, so the outputs do not change.

        With `lora.peft` it has the layers of a saved adapter, whose weights are to be copied into it. With a
        rank of 0 the adapter is the model's own weights, and the model then carries no other adapter.
        Raises ConfigError where there is no layer to put an adapter on.
        """
        from peft.utils.constants import DUMMY_TARGET_MODULES

        if lora.rank == 0:
            assert self._peft is None, "a model whose own weights are trained carries no adapter"
            if pretrained.is_of_own_code(self._model):
                raise ConfigError(
                    f"lora_rank=0 is not supported for {self._model_name}: its checkpoints would need the "
                    f"code that comes with the model, which is not copied. Set lora_rank to at least 1."
                )
            return Adapter("", lora, full_weights.train_all(self._model))
        name = f"adapter{next(self._numbers)}"
        if lora.peft is not None:
            lora = replace(lora, peft=peft_layers.under_published_names(self._model, lora.peft))
        targets, settings = self._targets_and_settings(lora)
        # PEFT chooses no layers itself: it would match names, and rewrite those of experts.
        settings |= {"target_modules": DUMMY_TARGET_MODULES, "target_parameters": None}
        config = peft_layers.config_of(lora, models.model_location(self._model_name), **settings)
        self._put_on(name, lora, targets, config)
        if lora.dropout:
            dropout.install(self._model, name, lora.dropout, self.dropout_keys)
        fused_lora.fuse(self._model, self.input_groups)
        expert_lora.fuse(self._model)
        peft_layers.replace_token_rows(self._model)
        self._active = None
        return Adapter(name, lora, peft_layers.weights_of(self._peft, name))

    def _targets_and_settings(self, lora: LoraConfig) -> tuple[list[str], dict[str, Any]]:
        """Returns the names of the targets of an adapter, and its further settings for PEFT.

        Raises ConfigError for an adapter that is not supported on this model.
        """
        if lora.peft is None:
            rows = vocabulary.rows_to_train(self._model, self._tokenizer, lora.add_tokens)
            settings: dict[str, Any] = {"trainable_token_indices": rows}
            # PEFT has no LoRA on a projection whose rows are trained.
            options = replace(lora, train_unembed=False) if lora.add_tokens else lora
            targets = self._chosen(options)
        else:
            peft_layers.check_supported(self._model, self._model_name, lora)
            targets, settings = peft_targets.named_in(self._model, lora.peft.explicit)
        stacked = [name for name in targets if name not in self.targets.names]
        if lora.dropout and stacked:
            raise ConfigError(
                f"lora_dropout={lora.dropout:g} is not supported on the stacked weights of experts "
                f"({stacked[0]}), as in PEFT. Use lora_dropout=0, or skip the experts with lora_targets or "
                f"train_mlp=False."
            )
        return targets, settings

    def _chosen(self, lora: LoraConfig) -> list[str]:
        """Returns the names of the targets that the options choose.

        Those are skipped on which PEFT could not read an adapter of a checkpoint: transformers renames their
        weights while it loads them, and PEFT does not arrive at their names.
        """
        targets = [target.name for target in self.targets.chosen(lora, self._model_name)]
        if tuple(targets) in self._readable:
            return targets
        unreadable = peft_names.unreadable(self._model, targets, self.targets.names)
        if not unreadable:
            self._readable.add(tuple(targets))
            return targets
        self.targets = self.targets.without(unreadable, "layers PEFT refuses")
        return self._chosen(lora)

    def _put_on(self, name: str, lora: LoraConfig, targets: list[str], config: Any) -> None:
        """Puts PEFT's layers on the targets. Raises ConfigError where PEFT supports no such adapter."""
        from peft import PeftModel

        device = self._model.get_input_embeddings().weight.device
        devices = [device] if device.type == "cuda" else []
        with GLOBAL_STATE, torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            # PEFT warns that an adapter on a tied lm_head cannot be merged in place; nothing here merges.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            # PEFT 0.21 reads a name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # PEFT sets this option of its config for each layer anew.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            if lora.seed is not None:
                torch.manual_seed(lora.seed)
            try:
                if self._peft is None:
                    self._peft = PeftModel(self._model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
                peft_targets.put_on(self._peft, self._model, targets, config, name, self.targets.names)
            except (ValueError, TypeError) as error:
                what = (
                    "Skip those layers with train_attn=False, train_mlp=False or train_unembed=False."
                    if lora.peft is None
                    else "Merge it with PEFT itself, onto the model that it was made for."
                )
                raise ConfigError(
                    f"PEFT does not support this adapter on {self._model_name}: {error} {what}"
                ) from error

    def remove(self, adapter: Adapter) -> None:
        """Frees an adapter. Removing the last adapter also removes PEFT's layers from the model."""
        if adapter.is_full:
            return  # a copy is freed with the last reference to it
        others = [name for name in self._peft.peft_config if name != adapter.name]
        if others:
            self._activate(others[0])
        # frees its tensors now, even if the layer is still referenced
        self._peft.delete_adapter(adapter.name)
        if not others:
            fused_lora.unfuse(self._model)
            expert_lora.unfuse(self._model)
            peft_layers.unwrap(self._model)
            self._peft.base_model.unload()
            self._peft = self._active = None

    def clone(self, adapter: Adapter) -> Adapter:
        """Returns a copy, which does not change while the adapter is trained further."""
        if adapter.is_full:
            return Adapter("", adapter.lora, full_weights.copy_of(adapter.weights))
        clone = self.add(adapter.lora)
        with torch.no_grad(), self.removing_on_failure(clone):
            for name, weight in adapter.weights.items():
                clone.weights[name].copy_(weight)
        return clone

    @contextlib.contextmanager
    def removing_on_failure(self, adapter: Adapter) -> Iterator[None]:
        """Removes a new adapter if the body fails."""
        try:
            yield
        except BaseException:
            self.remove(adapter)
            raise

    def write(self, adapter: Adapter, folder: Path) -> None:
        """Saves an adapter in PEFT's format, or the model's own weights in the format of transformers."""
        if adapter.is_full:
            with self.using(adapter):
                full_weights.write(self._model, self._model_name, self._tokenizer, folder)
        else:
            config = self._peft.peft_config[adapter.name]
            keys = peft_names.keys_to_save(self._model, adapter.weights)
            peft_layers.write_config(config, adapter.lora, folder, keys)
            checkpoint.write_adapter(folder, {keys[name]: w for name, w in adapter.weights.items()})
            if adapter.lora.add_tokens:
                self._tokenizer.save_pretrained(folder)

    def read(self, path: str, lora: LoraConfig) -> dict[str, Tensor]:
        """Returns the weights that `write` saved. Raises CheckpointError for a damaged checkpoint.

        Where the model's own weights are sharded, the result holds this process's part of each weight.
        """
        if lora.rank == 0:
            checkpoint.check_files(path)
            return full_weights.read(path, self._model)
        return peft_names.by_own_names(self._model, checkpoint.read_weights(path))

    @contextlib.contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Runs the body with `adapter` active, or with no adapter for None."""
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if adapter is not None and adapter.is_full:
            context = full_weights.swapped_in(self._model, adapter.weights)
        elif adapter is not None:
            self._activate(adapter.name)
        elif self._peft is not None:
            context = self._peft.disable_adapter()
        before, self.in_use = self.in_use, None if adapter is None else adapter.name
        try:
            with context:
                yield
                fsdp.reshard(self._model)
        finally:
            self.in_use = before

    def _activate(self, adapter_name: str) -> None:
        if self._active != adapter_name:
            self._peft.set_adapter(adapter_name)
            self._active = adapter_name

    @contextlib.contextmanager
    def watching_layers(self) -> Iterator[None]:
        """Learns from the body, in which the model reads some text, which layers run and what they share.

        Layers that do not run get no adapter.
        """
        decoder = text_decoder(self._model)
        with (
            input_groups.noting_groups(self._model, decoder) as self.input_groups,
            unused_layers(self.targets, self._model) as unused,
        ):
            yield
        self.targets = self.targets.without(unused, "unused layers")

    def shares_without(self, adapter: Adapter) -> dict[str, float]:
        """Returns the share of the model's weights that the adapter is not on, by kind, largest first."""
        if adapter.is_full:
            return {}
        total = self.targets.num_weights
        return {kind: count / total for kind, count in self.targets.without_adapter(adapter.lora).items()}
