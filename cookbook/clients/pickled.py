"""What a pickled sampling client holds: the adapter's weights, and how its base model is loaded."""

from __future__ import annotations

import base64
import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import Self

from safetensors.torch import load, save

from cookbook import models
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.sampler import Prepared
from cookbook.engine.worker import Engine
from cookbook.errors import RequestError
from cookbook.types import LoraConfig, PeftSettings

_ENGINES: dict[tuple[EngineOptions, str, tuple[str, ...]], Engine] = {}
"""The engines of clients that came from other processes."""
_ENGINES_LOCK = threading.Lock()


@dataclass(frozen=True)
class PickledClient:
    """What another process needs for the same samples."""

    client_id: str
    process_id: int
    records: bool
    options: EngineOptions
    base_model: str
    add_tokens: tuple[str, ...]
    lora: LoraConfig | None
    weights: bytes
    """The adapter's tensors as safetensors, by their own names; empty for the base model."""
    seed: int | None

    @classmethod
    def of_prepared(cls, client_id: str, records: bool, base: BaseModel, prepared: Prepared) -> Self:
        """Runs on the engine. Raises RequestError for a full fine-tune."""
        adapter, seed = prepared.result()
        lora, weights = None, b""
        if adapter is not None:
            if adapter.is_full:
                raise RequestError(
                    "A sampling client of a full fine-tune cannot be pickled. Save it and send its path."
                )
            lora = adapter.lora
            tensors = {name: weight.detach().cpu().contiguous() for name, weight in adapter.weights.items()}
            weights = save(tensors)
        name = models.canonical_name(base.name)
        return cls(client_id, os.getpid(), records, base.options, name, base.add_tokens, lora, weights, seed)

    def handle(self) -> str:
        """Returns it as a text."""
        values = {**asdict(self), "weights": base64.b64encode(self.weights).decode("ascii")}
        return base64.urlsafe_b64encode(json.dumps(values).encode()).decode("ascii")

    @classmethod
    def from_handle(cls, handle: str) -> Self:
        """Raises RequestError for a text that `handle` did not return."""
        try:
            values = json.loads(base64.urlsafe_b64decode(handle))
            lora = values["lora"]
            if lora is not None:
                peft = None if lora["peft"] is None else PeftSettings(**lora["peft"])
                lora = LoraConfig(**{**lora, "peft": peft})
            return cls(
                **{
                    **values,
                    "options": EngineOptions(**values["options"]),
                    "add_tokens": tuple(values["add_tokens"]),
                    "lora": lora,
                    "weights": base64.b64decode(values["weights"]),
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(f"This is not a handle of get_sampler_handle: {error}.") from error

    def engine(self) -> Engine:
        """Returns the engine of the base model, which is loaded once in a process."""
        key = (self.options, self.base_model, self.add_tokens)
        with _ENGINES_LOCK:
            if key not in _ENGINES or _ENGINES[key].is_closed:
                _ENGINES[key] = Engine(self.base_model, self.options, add_tokens=self.add_tokens)
            return _ENGINES[key]

    def add_adapter(self, base: BaseModel) -> tuple[Adapter | None, int | None]:
        """Runs on the engine. Returns the adapter, which the caller owns, and the seed of samples."""
        if self.lora is None:
            return None, self.seed
        weights = load(self.weights)
        adapter = base.adapters.add(self.lora)
        with base.adapters.removing_on_failure(adapter):
            for name, parameter in adapter.weights.items():
                parameter.data.copy_(weights[name])
        return adapter, self.seed
