"""A base model: its weights, its adapters, and what its clients share."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cookbook import models
from cookbook.engine import devices, processes
from cookbook.engine.model import (
    architecture,
    architecture_probe,
    expert_lora,
    fsdp,
    fused,
    linear_scan,
    rope,
    vocabulary,
)
from cookbook.engine.model.adapters import GLOBAL_STATE, Adapters
from cookbook.engine.model.compiling import compile_layers
from cookbook.engine.model.loading import load_model, return_freed_memory
from cookbook.engine.model.memory import decoder_layers, in_gib, is_out_of_memory, usable_memory
from cookbook.engine.model.packed_weights import PackedWeights
from cookbook.engine.model.passes import ModelPasses
from cookbook.engine.model.peft_settings import is_same
from cookbook.engine.model.recurrence import RecurrentLayers
from cookbook.engine.model.text_part import by_published_names, frozen_parameters, text_decoder
from cookbook.engine.model.tiled_mlp import tile_for
from cookbook.engine.model.unembedding import BlockSizes
from cookbook.engine.options import EngineOptions
from cookbook.errors import ConfigError, ModelError


class BaseModel(ModelPasses):
    """A model that is loaded once. All training and sampling clients on it share its weights."""

    # `sampling.decoder_probe` sets these six when the model is first sampled from.
    decodes_packed: bool | None = None
    """Whether sampled sequences can share a row too."""
    make_decoder: Callable[[BaseModel], Any] | None = None
    """The factory of the decoder."""
    cache_bytes = (0, 0)
    """The bytes of one cached position and of one sequence's recurrent states, or zeros if unknown."""
    reuses_prompts = False
    """Whether prompts reuse the keys and values of texts that begin alike."""
    row_multiple = 8
    """Passes are padded to a multiple of this many tokens. On some CPUs matrix products of fewer rows round
    differently, so the last bits of a sequence would depend on what it is batched with."""
    packed_weights: PackedWeights | None = None
    """Weights with which passes need no such padding."""
    is_captured: bool | None = None
    """Whether passes that decode are captured on CUDA; None until the model is first sampled from there."""
    decode_graphs: Any = None
    """The captured passes (`sampling.decode_graphs`)."""

    def __init__(
        self,
        model_name: str,
        options: EngineOptions | None = None,
        is_trained: bool = False,
        add_tokens: tuple[str, ...] = (),
    ) -> None:
        """Loads the model, with rows for `add_tokens`.

        `is_trained` says that its own weights are trained, which needs more memory.
        """
        self.name = model_name
        self.add_tokens = add_tokens
        self.options = options or EngineOptions()
        self.world = processes.current().duplicate()
        self.device, self.dtype = devices.resolve(self.options)
        self.tokenizer = models.get_tokenizer(model_name, add_tokens)
        with GLOBAL_STATE:
            self.is_sharded = fsdp.should_shard(
                self.options, self.world, model_name, self.device, self.dtype, is_trained
            )
            self.model = self._load(is_trained)
        self.vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.num_logits: int = getattr(self.model.get_output_embeddings(), "out_features", self.vocab_size)
        self.context_length: int = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        )
        self.decoder = text_decoder(self.model)
        linear_scan.install(self.decoder)
        self.recurrent = RecurrentLayers(self.decoder)
        self.adapters = Adapters(self.model, model_name, self.tokenizer)
        self.longrope_thresholds = architecture.longrope_thresholds(self.model.config.get_text_config())
        self.block_sizes = BlockSizes.on(self.device)
        self.prompt_trees: weakref.WeakSet[Any] = weakref.WeakSet()
        """What samplers keep of prompts (`sampling.prompt_tree`)."""
        with self.adapters.watching_layers():
            self._probe_architecture()
        fsdp.reshard(self.model)
        self._prepare_layers()
        return_freed_memory()

    def _load(self, is_trained: bool) -> Any:
        """Returns the model. Raises ModelError, with the memory that it needs, if that is not there."""
        try:
            return self._load_weights(is_trained)
        except (ModelError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error.__cause__ if isinstance(error, ModelError) else error):
                raise
            needed = fsdp.bytes_needed(self.name, self.dtype, is_trained)
            raise ModelError(
                f"{self.name} does not fit in the memory of {self.device}: {in_gib(needed)} are needed "
                f"{'to train all its weights' if is_trained else 'for its weights'} in "
                f"{str(self.dtype).removeprefix('torch.')}, and {in_gib(usable_memory(self.device))} may be "
                f"used, less what other programs hold. Use "
                f"{'lora_rank of at least 1' if is_trained else 'quantization=nf4'}, a smaller model, or "
                f"several devices with shard=full."
            ) from None

    def _load_weights(self, is_trained: bool) -> Any:
        if not self.is_sharded:
            model = load_model(self.name, self.device, self.dtype, self.options.quantization)
            self._add_rows(model)
            return model
        with self.loading_in_turn():
            model = load_model(self.name, torch.device("cpu"), self.dtype)
            self._add_rows(model)
            for weight in {*model.parameters()} - frozen_parameters(model):
                weight.requires_grad_(is_trained)
            fsdp.shard(model, self.world, self.device, self.name)
        return model

    def _add_rows(self, model: Any) -> None:
        if self.add_tokens:
            base_tokenizer = models.get_tokenizer(self.name)
            vocabulary.add_rows(model, self.tokenizer, base_tokenizer, self.add_tokens, self.name)
            model.requires_grad_(False)

    @contextlib.contextmanager
    def loading_in_turn(self) -> Iterator[None]:
        """Limits the body to one process of a machine at a time if the model is sharded.

        A sharded model is loaded with all weights in memory.
        """
        with self.world.one_after_another() if self.is_sharded else contextlib.nullcontext():
            yield

    def has_weight(self, weight: Tensor, module: str) -> bool:
        """Returns whether the module of this name has this weight, below any adapters."""
        (published,) = by_published_names(self.model, {module: None})
        found = dict(self.model.named_modules()).get(published)
        own = getattr(getattr(found, "base_layer", found), "weight", None)
        if own is None or own.shape != weight.shape:
            return False
        part = fsdp.local_part(fsdp.part_like(weight, own))
        return is_same(part, fsdp.local_part(own))

    def _prepare_layers(self) -> None:
        layers = decoder_layers(self.model)
        if not layers and (self.options.compile or self.options.gradient_checkpointing in ("on", "offload")):
            raise ConfigError(
                f"{self.name} has no layers that transformers can checkpoint or compile. Use compile=False "
                f"and gradient_checkpointing=off."
            )
        self.mlp_tile = tile_for(self.options, self.device, self.is_sharded)
        if self.options.compile:
            compile_layers(layers)
        elif self.device.type == "cuda":
            fused.install(self.decoder)
            expert_lora.run_grouped(self.decoder)
            rope.install(self.decoder)

    def _probe_architecture(self) -> None:
        architecture_probe.probe(self)

    def weight_bytes(self) -> int:
        """Returns the bytes of the weights on the device, at most, if they are gathered from several."""
        if self.is_sharded:
            return fsdp.bytes_held(self.model)
        on_device = (weight for weight in self.model.parameters() if weight.device.type == self.device.type)
        return sum(weight.nbytes for weight in on_device)

    def forget_prompts(self) -> None:
        """Frees what samplers keep, whose memory a pass of training may need."""
        for tree in self.prompt_trees:
            tree.clear()
        if self.decode_graphs is not None:
            self.decode_graphs.forget()
