"""The memory that well-known models need in training: tables of models, methods and cards.

The shapes are those of the models' published configs, so the table needs no download.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook.engine.cards import CARDS, GIB
from cookbook.engine.options import EngineOptions, GradientCheckpointing, OptimizerBits
from cookbook.types import LoraConfig

_QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960}
_LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "Qwen/Qwen3-0.6B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12_288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-14B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 17_408,
        "num_hidden_layers": 40, "num_attention_heads": 40, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-32B": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25_600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN3, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_LLAMA3, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.3-70B-Instruct": {
        **_LLAMA3, "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28_672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "tie_word_embeddings": False,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": False, "max_position_embeddings": 131_072,
    },
}  # fmt: skip

METHODS: Mapping[str, tuple[int, str | None, OptimizerBits]] = {
    "LoRA": (32, None, 32),
    "fp8": (32, "fp8", 32),
    "nf4": (32, "nf4", 32),
    "full": (0, None, 32),
    "full, 8 bits": (0, None, 8),
}
"""The rank, the quantization and the bits of moments of each method."""
TABLE_CARDS = ("4090", "l40s", "h100", "h200")
SIZES = {"16 GB": "t4", "24 GB": "4090", "48 GB": "l40s", "80 GB": "h100", "141 GB": "h200"}
"""Sizes of memory as cards are sold with them, and the card whose memory stands for each."""
LENGTH = 2048


@dataclass(frozen=True)
class TableRow:
    """The memory of a model with a method."""

    model: str
    method: str
    num_weights: int
    context: int
    """The tokens of the longest sequence that the model takes."""
    least: float
    """The bytes with one sequence at a time, whose layers run again with their inputs in host memory."""
    tokens: Mapping[str, tuple[int, str] | None]
    """For each card the tokens of a micro-batch and how it is run; None if it does not fit."""
    longest: Mapping[str, int]
    """For each of SIZES the tokens of the longest sequence that fits; 0 if none does."""


def config_of(shape: Mapping[str, Any]) -> Any:
    """Returns the config of transformers for a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**shape)


def rows(
    shapes: Mapping[str, Mapping[str, Any]] = SHAPES, cards: Sequence[str] = TABLE_CARDS
) -> Iterator[TableRow]:
    """Yields the rows of the table, for adapters of rank 32 on all layers and sequences of LENGTH tokens."""
    from cookbook.engine.model import estimate

    for name, shape in shapes.items():
        for method, (rank, quantization, bits) in METHODS.items():

            def options(
                checkpointing: GradientCheckpointing, quantization: Any = quantization, bits: Any = bits
            ) -> EngineOptions:
                made = EngineOptions(gradient_checkpointing=checkpointing)
                object.__setattr__(made, "quantization", quantization)  # bitsandbytes need not be installed
                object.__setattr__(made, "optimizer_bits", bits)
                return made

            auto = options("auto")
            found = estimate.footprint(config_of(shape), name, LoraConfig(rank), auto, "cuda")
            tokens: dict[str, tuple[int, str] | None] = {}
            for key in cards:
                plan = estimate.plan(found, auto, "cuda", CARDS[key].memory, LENGTH)
                mark = "**" if plan.on_host else "*" if plan.is_checkpointed else ""
                tokens[key] = (plan.tokens, mark) if plan.fits else None
            one = estimate.plan(found, options("offload"), "cuda", 2.0**50, LENGTH, batch_tokens=LENGTH)
            context = shape["max_position_embeddings"]
            longest = {
                size: estimate.longest_sequence(found, auto, "cuda", CARDS[key].memory, context)
                for size, key in SIZES.items()
            }
            yield TableRow(name, method, found.num_weights, context, one.total, tokens, longest)


def markdown(found: Sequence[TableRow], cards: Sequence[str] = TABLE_CARDS) -> str:
    """Returns the table in Markdown."""
    lines = [
        f"| model | method | least memory | {' | '.join(CARDS[key].name for key in cards)} |",
        f"|---|---|--:|{'--:|' * len(cards)}",
    ]
    for row in found:
        cells = [_cell(row.tokens[key]) for key in cards]
        lines.append(f"| {row.model} | {row.method} | {row.least / GIB:,.1f} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(tokens: tuple[int, str] | None) -> str:
    if tokens is None:
        return "-"
    number, mark = tokens
    return f"{number:,}{mark}"


def longest_markdown(found: Sequence[TableRow]) -> str:
    """Returns the table of the longest sequences for each size of memory in Markdown."""
    lines = [f"| model | method | {' | '.join(SIZES)} |", f"|---|---|{'--:|' * len(SIZES)}"]
    for row in found:
        cells = [
            "-" if not length else f"{length:,}{'+' if length == row.context else ''}"
            for length in row.longest.values()
        ]
        lines.append(f"| {row.model} | {row.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest_markdown(found: Sequence[TableRow]) -> str:
    """Returns the table of the largest models for each size of memory in Markdown.

    These are the ones of `found` with the most weights whose sequences of LENGTH tokens fit.
    """
    lines = [f"| method | {' | '.join(SIZES)} |", f"|---|{'---|' * len(SIZES)}"]
    for method in METHODS:
        cells = []
        for size in SIZES:
            fitting = [row for row in found if row.method == method and row.longest[size] >= LENGTH]
            largest = max(fitting, key=lambda row: row.num_weights, default=None)
            cells.append("-" if largest is None else largest.model.rpartition("/")[2])
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
