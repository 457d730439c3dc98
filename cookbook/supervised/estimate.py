"""Estimates a run before its model is loaded: memory, time, disk, and what is trained.

Memory follows from the model's config (`engine.model.estimate`), and time from the number of operations of a
token. Operations per token are 2 for each weight that the token passes in the forward pass, as many for the
gradient of the layer's input, as many again for the gradient of a weight that is trained, and 2 more where
layers are run again; attention is counted apart, over half of the pairs of a sequence. Both are derived and
not measured: the progress bar tells the time from the steps themselves.
"""

from __future__ import annotations

import functools
import json
import logging
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import models
from cookbook.data.types import ChatDatasetBuilder, SupervisedDataset
from cookbook.engine.cards import CARDS, SHARE_OF_PEAK, Card
from cookbook.errors import CookbookError
from cookbook.runs.summary import size
from cookbook.supervised.config import Config
from cookbook.utils import files

if TYPE_CHECKING:
    from cookbook.engine.model.estimate import Footprint, MemoryPlan

logger = logging.getLogger(__name__)

FILE = "estimate.json"
DEFAULT_LENGTH = 2048
BYTES_OF_ADAM_STATE = 8
"""Two moments per trained weight, in float32."""


@dataclass(frozen=True)
class RunLength:
    """How much a run trains on. What streams is unknown before it is read."""

    num_steps: int | None
    tokens_per_batch: float | None
    """The mean number of tokens of a batch."""
    longest: int
    """The number of tokens of the longest example."""
    trained_share: float = 1.0
    """The share of the tokens that are trained on, for which logits are computed."""


@dataclass(frozen=True)
class RunEstimate:
    """The estimate of a run on a device."""

    device: str
    footprint: Footprint
    plan: MemoryPlan
    length: RunLength
    dtype: str
    checkpoint_bytes: int
    num_checkpoints: int | None
    """The number of checkpoints on disk at the end."""
    flops_per_token: float
    flops_per_second: float
    rate_source: str
    """What `flops_per_second` is from."""
    num_processes: int = 1
    """If there are several, each has less of the batches than this, and perhaps of the weights."""

    @property
    def seconds(self) -> float | None:
        if self.length.num_steps is None or self.length.tokens_per_batch is None:
            return None
        tokens = self.length.num_steps * self.length.tokens_per_batch
        return tokens * self.flops_per_token / self.flops_per_second

    def lines(self) -> list[str]:
        """Returns the estimate in words, in 80 columns."""
        found, plan = self.footprint, self.plan
        share = found.num_trained / found.num_weights
        parts = [
            f"weights {size(found.weights)} ({self.dtype})",
            f"adapter {size(found.adapter)}",
            f"gradients and optimizer {size(found.training)}",
            f"temporary {size(plan.temporary)}",
        ]
        if not found.adapter:
            del parts[1]
        if found.activations is None:
            parts.append("activations unknown for this architecture")
        else:
            again = " whose layers run again" if plan.is_checkpointed else ""
            again += f" with {size(plan.on_host)} of their inputs in host memory" if plan.on_host else ""
            parts.append(
                f"activations {size(plan.activations)} for a micro-batch of {plan.tokens:,} tokens{again}"
            )
        disk = f"{size(self.checkpoint_bytes)} per checkpoint"
        if self.num_checkpoints is not None:
            total = size(self.num_checkpoints * self.checkpoint_bytes)
            disk += f", {self.num_checkpoints} at the end: {total}"
        rate = self.flops_per_second / self.flops_per_token
        seconds = "" if self.seconds is None else f"{in_words(self.seconds)} of training steps, at "
        facts = {
            "trained": f"{found.num_trained:,} of {found.num_weights:,} weights ({share:.2%})",
            "memory": f"{size(plan.total)}: {', '.join(parts)}",
            "disk": disk,
            "time": f"{seconds}{rate:,.0f} tokens/s by {self.rate_source}",
        }
        lines = [f"Estimate for {self.device} (derived, before the model is loaded):"]
        for name, fact in facts.items():
            lines += textwrap.wrap(fact, 79, initial_indent=f"  {name:8} ", subsequent_indent=" " * 11)
        if self.num_processes > 1:
            number = self.num_processes
            lines.append(f"  This is one process; {number} share the batches, and may share the weights.")
        if not plan.fits:
            lines.append(
                f"  It does not fit: one example of {self.length.longest:,} tokens needs more than the "
                f"{size(plan.usable)} in use."
            )
        return lines

    def record(self, folder: Path) -> None:
        """Writes the estimate into the folder of a run."""
        files.write(folder / FILE, json.dumps(self.to_json(), indent=2) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Returns the values by name. Memory and time are None for several processes, which share them."""
        is_alone = self.num_processes == 1
        return {
            "device": self.device,
            "num_steps": self.length.num_steps,
            "peak_bytes": self.plan.total if is_alone else None,
            "weights_bytes": self.footprint.weights,
            "adapter_bytes": self.footprint.adapter,
            "training_bytes": self.footprint.training,
            "activation_bytes": self.plan.activations,
            "temporary_bytes": self.plan.temporary,
            "microbatch_tokens": self.plan.tokens,
            "layers_run_again": self.plan.is_checkpointed,
            "inputs_on_host_bytes": self.plan.on_host,
            "trained_weights": self.footprint.num_trained,
            "all_weights": self.footprint.num_weights,
            "checkpoint_bytes": self.checkpoint_bytes,
            "seconds": self.seconds if is_alone else None,
        }


def length_of(config: Config, train_data: SupervisedDataset, num_steps: int | None) -> RunLength:
    """Returns how much a run trains on, as far as the reports on its data say."""
    reports = [report for report in train_data.reports() if report.role == "training"]
    tokens = sum(report.tokens for report in reports)
    num_batches = train_data.epoch_length()
    builder = config.dataset_builder
    limit = builder.common_config.max_length if isinstance(builder, ChatDatasetBuilder) else None
    longest = max((report.longest_kept for report in reports), default=0) or limit or DEFAULT_LENGTH
    trained = sum(report.trained_tokens for report in reports)
    return RunLength(
        num_steps=num_steps,
        tokens_per_batch=tokens / num_batches if tokens and num_batches else None,
        longest=max(2, longest),
        trained_share=trained / tokens if tokens else 1.0,
    )


def estimate(config: Config, length: RunLength, card: Card | None = None) -> RunEstimate:
    """Returns the estimate of a run on a card, or on the device of this machine that the config chooses."""
    from cookbook.engine.devices import resolve_device
    from cookbook.engine.model import estimate as of_model
    from cookbook.engine.model.memory import total_memory

    if card is not None:
        device_type, name, memory = "cuda", card.name, card.memory
    else:
        device = resolve_device(config.device)
        device_type, memory = device.type, float(total_memory(device))
        name = "this CPU" if device_type == "cpu" else _name_of(device)
    options = config.engine_options()
    found = of_model.footprint(
        models.load_config(config.model_name), config.model_name, config.lora(), options, device_type
    )
    per_batch = None if length.tokens_per_batch is None else round(length.tokens_per_batch)
    plan = of_model.plan(found, options, device_type, memory, length.longest, per_batch)
    rate, source = _rate(card, device_type, name)
    return RunEstimate(
        device=f"{name}, {size(memory)}",
        footprint=found,
        plan=plan,
        length=length,
        dtype=_dtype_in_words(config, device_type),
        checkpoint_bytes=_checkpoint_bytes(config, found, device_type),
        num_checkpoints=_num_checkpoints(config, length.num_steps),
        flops_per_token=_flops_per_token(config, found, plan, length),
        flops_per_second=rate,
        rate_source=source,
    )


def log_estimate(
    config: Config, train_data: SupervisedDataset, num_steps: int | None, num_processes: int = 1
) -> RunEstimate | None:
    """Logs and returns the estimate of a run.

    An estimate that fails does not end a run, which loads the same model: the log says why there is none.
    """
    try:
        made = replace(
            estimate(config, length_of(config, train_data, num_steps)), num_processes=num_processes
        )
    except (CookbookError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        logger.info("No estimate of memory and time: %s", error)
        return None
    logger.info("%s", "\n".join(made.lines()))
    return made


def _dtype_in_words(config: Config, device_type: str) -> str:
    if config.quantization is not None:
        return config.quantization
    usual = "bfloat16" if device_type == "cuda" else "float32"
    return usual if config.dtype == "auto" else config.dtype


def _checkpoint_bytes(config: Config, found: Footprint, device_type: str) -> int:
    """Returns the size of a checkpoint: weights, moments, and masters of weights in lower precision."""
    if config.lora_rank:
        return found.num_trained * (4 + BYTES_OF_ADAM_STATE)
    itemsize = 4 if _dtype_in_words(config, device_type) == "float32" else 2
    masters = 0 if itemsize == 4 else 4
    return found.num_trained * (itemsize + masters + BYTES_OF_ADAM_STATE)


def _num_checkpoints(config: Config, num_steps: int | None) -> int | None:
    if num_steps is None:
        return None
    periodic = (num_steps - 1) // config.save_every if config.save_every else 0
    every = periodic + 1
    if config.keep_checkpoints is not None:
        every = min(every, config.keep_checkpoints)
    return every + (config.best_metric is not None)


def _flops_per_token(config: Config, found: Footprint, plan: MemoryPlan, length: RunLength) -> float:
    passes = (4 if config.lora_rank else 6) + (2 if plan.is_checkpointed else 0)
    attention = 2 * 2 * found.heads_times_size * length.longest / 2  # two products, over half of the pairs
    of_attention = attention * (3 + plan.is_checkpointed)
    adapter = 6 * found.num_trained if config.lora_rank else 0
    head = found.num_head * (1 - length.trained_share)
    return passes * (found.num_active - head) + adapter + of_attention


def _rate(card: Card | None, device_type: str, name: str) -> tuple[float, str]:
    """Returns the operations per second, and what they are from."""
    if card is None and device_type == "cuda":
        words = name.lower()
        card = next((one for key, one in CARDS.items() if key in words), None)
    if card is not None:
        share = f"{SHARE_OF_PEAK:.0%} of its peak of {card.peak_flops / 1e12:,.0f} TFLOP/s"
        return card.peak_flops * SHARE_OF_PEAK, share
    return _measured_rate(device_type), "the speed of a matrix product just now"


@functools.cache
def _measured_rate(device_type: str) -> float:
    """Returns the operations per second of matrix products of a layer's size, measured for a moment."""
    import torch

    with torch.no_grad():
        a, b = torch.ones(512, 512, device=device_type), torch.ones(512, 512, device=device_type)
        (a @ b).sum().item()
        start, count = time.perf_counter(), 0
        while count < 4 or time.perf_counter() - start < 0.03:
            (a @ b)[0, 0].item()
            count += 1
        return count * 2 * 512**3 / (time.perf_counter() - start)


def _name_of(device: Any) -> str:
    import torch

    name: str = torch.cuda.get_device_name(device)
    return name


def in_words(seconds: float) -> str:
    """Returns a time in the two largest units that it has."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
