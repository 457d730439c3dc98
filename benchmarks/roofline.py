"""Derives what a training step and a sampled token cost on GPUs, on a machine that has none.

    python -m benchmarks.roofline [--model qwen3-0.6b ...] [--card h200 ...] [--what step token]
                                  [--checkpointing on] [--plain] [--classes]

The engine runs on fake tensors of device `cuda` (`benchmarks.fake_cuda`), which count launches, bytes and
floating-point operations. Each launch then takes as long as its operations, its bytes or the shortest kernel
do on the card, whichever is longest, and kernels run one after another. Nothing here is measured: the rates
are shares of the published peaks, and what the host needs to launch kernels is left out.

A step has 16,384 tokens in sequences of 2,048, all trained, with LoRA of rank 16 on all linear layers without
the projection to the vocabulary. A sampled token is the next one of 64 sequences after 1,024 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fake_cuda import library
from cookbook.engine import cards
from cookbook.supervised.memory_table import SHAPES

if TYPE_CHECKING:
    from benchmarks.fake_cuda.costs import Cost, Costs

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "roofline.txt"
LABEL = "Derived from launches, bytes and operations, not measured."
LENGTHS = (2048,) * 8
LORA_RANK = 16
NUM_SEQUENCES, CONTEXT = 64, 1024
TFLOPS_SHARE, BANDWIDTH_SHARE, FLASH_SHARE, FLASH_BACKWARD_SHARE = 0.6, 0.8, 0.35, 0.25
"""What large kernels reach of a card's published rates: an assumption, which `make gpu` measures."""
SHORTEST_KERNEL_SECONDS = 2.5e-6
MEMCPY_SECONDS = 5e-6


@dataclass(frozen=True)
class RatedCard:
    """A GPU by its published rates."""

    card: cards.Card
    bytes_per_second: float

    def seconds(self, cost: Cost) -> float:
        """Returns the time of one launch."""
        if cost.kind == "memcpy":
            return MEMCPY_SECONDS
        share = {"attention": FLASH_SHARE, "attention backward": FLASH_BACKWARD_SHARE}.get(
            cost.kind, TFLOPS_SHARE
        )
        bandwidth = self.bytes_per_second * BANDWIDTH_SHARE
        if cost.kind == "thin product":
            bandwidth /= 2
        return max(
            cost.flops / (self.card.peak_flops * share), cost.num_bytes / bandwidth, SHORTEST_KERNEL_SECONDS
        )


CARDS = {
    key: RatedCard(cards.CARDS[key], bytes_per_second)
    for key, bytes_per_second in (("h200", 4.8e12), ("h100", 3.35e12), ("a100", 2.039e12), ("4090", 1.008e12))
}


def _qwen3_5(
    hidden: int, intermediate: int, layers: int, heads: int, values: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_text",
        "vocab_size": 248_320,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": values,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": tied,
    }


MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(SHAPES["Qwen/Qwen3-0.6B"]),
    "qwen3-1.7b": {**SHAPES["Qwen/Qwen3-0.6B"], "hidden_size": 2048, "intermediate_size": 6144},
    "qwen3-4b": dict(SHAPES["Qwen/Qwen3-4B"]),
    "qwen3-8b": dict(SHAPES["Qwen/Qwen3-8B"]),
    "qwen3-30b-a3b": {**SHAPES["Qwen/Qwen3-30B-A3B"], "norm_topk_prob": True},
    "qwen3.5-2b": _qwen3_5(2048, 6144, 24, 8, values=16, tied=True),
    "qwen3.5-9b": _qwen3_5(4096, 12288, 32, 16, values=32, tied=False),
}  # fmt: skip
"""The published shapes."""
PERIODS = {"qwen3_5_text": 4}
"""After how many layers the kinds of layers repeat, where it is not each layer."""


def costs_of(
    model: str, what: str, checkpointing: str = "off", has_kernels: bool = True
) -> tuple[Costs, Costs]:
    """Returns the costs of a period of layers, and of everything else. The fake device has to be loaded."""
    from transformers import AutoConfig

    from benchmarks.fake_cuda.device import FakeCuda
    from benchmarks.fake_cuda.outline import outline, step_costs, token_costs
    from cookbook.engine.model.kernels import NAMES
    from cookbook.types import LoraConfig, SamplingParams

    shape = dict(MODELS[model])
    model_type = shape.pop("model_type")
    period = PERIODS.get(model_type, 1)
    answers = {"cookbook/engine/sampling/sampler.py:_RunningBatch._prefill": NUM_SEQUENCES}
    found = []
    for layers in (period, 2 * period):
        config = AutoConfig.for_model(model_type, **{**shape, "num_hidden_layers": layers})
        with FakeCuda(answers, NAMES if has_kernels else ()) as device:
            base = outline(config, checkpointing)
            if what == "step":
                lora = LoraConfig(rank=LORA_RANK, seed=0, train_unembed=False)
                found.append(step_costs(device, base, LENGTHS, lora))
            else:
                found.append(token_costs(device, base, NUM_SEQUENCES, CONTEXT, SamplingParams(stop=[])))
    one, two = found
    of_layers = two.plus(one, -1)
    return of_layers, one.plus(of_layers, -1)


def whole(model: str, of_layers: Costs, rest: Costs) -> Costs:
    """Returns the costs of the model with all its layers."""
    shape = MODELS[model]
    return rest.plus(of_layers, shape["num_hidden_layers"] / PERIODS.get(shape["model_type"], 1))


def row(model: str, what: str, card: RatedCard, costs: Costs) -> str:
    """Returns a row of the table, which ends with the milliseconds of each class."""
    from benchmarks.fake_cuda.costs import CLASSES

    seconds = costs.time(card)
    total = sum(seconds.values())
    tokens = sum(LENGTHS) if what == "step" else NUM_SEQUENCES
    launches, num_bytes, flops = (sum(column) for column in zip(*costs.totals().values(), strict=True))
    cells = [
        model, card.card.name, f"{tokens / total:,.0f}", f"{1000 * total:.1f}", f"{launches:,.0f}",
        f"{costs.num_waits:.0f}", f"{num_bytes / 1e9:.1f}", f"{flops / 1e12:.2f}",
        *(f"{1000 * seconds.get(name, 0):.1f}" for name in CLASSES),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def header(what: str) -> str:
    from benchmarks.fake_cuda.costs import CLASSES

    names = ["model", "card", "tokens/s", "ms", "launches", "waits", "GB", "TFLOP", *CLASSES]
    title = {
        "step": "A training step of 16,384 tokens in sequences of 2,048, LoRA of rank 16, bfloat16",
        "token": f"The next token of {NUM_SEQUENCES} sequences after {CONTEXT:,} tokens, bfloat16",
    }[what]
    return f"{title}. {LABEL}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}"


def summary(models: Sequence[str], whats: Sequence[str]) -> str:
    """Returns launches, waits, bytes and operations of one period of layers and of the rest, by class.

    A step is listed with the kernels that may be installed and without.
    """
    lines = [LABEL, ""]
    for what in whats:
        for model in models:
            lines += _lines(f"{model} {what}", costs_of(model, what))
            if what == "step":
                lines += _lines(f"{model} {what} without kernels", costs_of(model, what, has_kernels=False))
    return "\n".join(lines) + "\n"


def _lines(title: str, parts: Sequence[Costs]) -> list[str]:
    lines = []
    for name, costs in zip(("layers", "rest"), parts, strict=True):
        lines.append(f"{title}, {name}: {costs.num_waits:g} waits")
        for operator_class, (launches, num_bytes, flops) in costs.totals().items():
            if launches:
                lines.append(
                    f"  {operator_class:<11} {launches:5g} launches {num_bytes / 1e6:12,.2f} MB "
                    f"{flops / 1e9:12,.2f} GFLOP"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--card", nargs="*", choices=CARDS, default=list(CARDS))
    parser.add_argument("--what", nargs="*", choices=["step", "token"], default=["step", "token"])
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    parser.add_argument(
        "--classes", action="store_true", help="launches, bytes and operations of the layers and of the rest"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="without Triton (`engine/model/kernels.py`)",
    )
    arguments = parser.parse_args()
    library.load()
    if arguments.classes:
        print(summary(arguments.model, arguments.what), end="")
        return
    for what in arguments.what:
        print(f"\n{header(what)}")
        for model in arguments.model:
            costs = whole(model, *costs_of(model, what, arguments.checkpointing, not arguments.plain))
            for card in arguments.card:
                print(row(model, what, CARDS[card], costs), flush=True)


if __name__ == "__main__":
    main()
