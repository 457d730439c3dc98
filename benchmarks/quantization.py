"""What holding the frozen weights in 8 or 4 bits changes: log-probabilities, gradients and a short fine-tune.

    python -m benchmarks.quantization FOLDER [--tokens 256] [--chunks 8] [--steps 20]

FOLDER is a published model. Its text is that of the pages of docs/. All but "bfloat16", which takes minutes
on a CPU without instructions for it, compute in float32. "fp8 products" rounds the inputs of linear layers to
8 bits too, as CUDA devices with kernels for such products do. Prints a table against the weights in float32,
and the losses of a LoRA of rank 16 after each step, on batches that are the same for all.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cookbook.engine.model import fp8
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"quantization": "fp8"},
    "fp8 products": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
}
BATCH = 4


def text() -> str:
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)


def chunks(tokens: list[int], length: int, number: int) -> list[Datum]:
    """Returns evenly spaced parts of the text."""
    starts = np.linspace(0, len(tokens) - length - 1, number).astype(int)
    parts = [tokens[start : start + length + 1] for start in starts]
    return [Datum(ModelInput.from_ints(part[:-1]), {"target_tokens": np.array(part[1:])}) for part in parts]


@contextlib.contextmanager
def products_in_fp8(enabled: bool) -> Iterator[None]:
    """Takes the products that CUDA devices compute, in the body."""
    usual = fp8.has_fp8_products, fp8.scaled_product
    if enabled:
        fp8.has_fp8_products, fp8.scaled_product = lambda x_NI, layer: True, _scaled_product
    try:
        yield
    finally:
        fp8.has_fp8_products, fp8.scaled_product = usual


def _scaled_product(x_NI: torch.Tensor, layer: fp8.Fp8Linear) -> torch.Tensor:
    x8_NI, scale_N1 = fp8.rows_in_fp8(x_NI)
    return torch.nn.functional.linear(x8_NI.float() * scale_N1, layer.weight_in(torch.float32), layer.bias)


def measured(folder: str, way: str, data: list[Datum], steps: int) -> dict[str, Any]:
    """Returns the log-probabilities, the gradients of an adapter, and the losses of a short fine-tune."""
    base = BaseModel(folder, EngineOptions(**{"device": "cpu", "dtype": "float32", **WAYS[way]}))
    trainer = Trainer(base, LoraConfig(rank=16, seed=0))
    generator = torch.Generator().manual_seed(0)
    began = {name: weight.detach().clone() for name, weight in trainer.adapter.weights.items()}
    with torch.no_grad():  # so little that the model stays the same, or the gradients of A would be zero
        for name, weight in trainer.adapter.weights.items():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 1e-4)
    found = trainer.forward_backward(trainer.check(data, "cross_entropy", None)).output()
    logprobs = np.concatenate([np.array(each["logprobs"].data) for each in found.loss_fn_outputs])
    gradient = torch.cat([weight.grad.flatten().double() for weight in trainer.adapter.weights.values()])  # type: ignore[union-attr]
    trainer.discard_gradients()
    with torch.no_grad():
        for name, weight in trainer.adapter.weights.items():
            weight.copy_(began[name])
    losses = []
    for step in range(steps):
        batch = [data[(step * BATCH + place) % len(data)] for place in range(BATCH)]
        losses.append(trainer.forward_backward(trainer.check(batch, "cross_entropy", None)).output().loss)
        trainer.optim_step(AdamParams(learning_rate=1e-3))
    return {"logprobs": logprobs, "gradient": gradient, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--chunks", type=int, default=8, help="number of sequences")
    parser.add_argument("--steps", type=int, default=20, help="steps of the fine-tune, each of 4 sequences")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="after float32, which is always first")
    arguments = parser.parse_args()
    tokenizer = BaseModel(arguments.folder, EngineOptions(device="cpu")).tokenizer
    data = chunks(tokenizer.encode(text()), arguments.tokens, arguments.chunks)
    truth: dict[str, Any] | None = None
    print("| weights | mean change of a log-probability | largest | NLL | error of the gradient | cosine |")
    print("|---|--:|--:|--:|--:|--:|")
    for way in dict.fromkeys(["float32", *arguments.ways]):
        with products_in_fp8(way == "fp8 products"):
            found = measured(arguments.folder, way, data, arguments.steps)
        truth = truth or found
        change = np.abs(found["logprobs"] - truth["logprobs"])
        error = (found["gradient"] - truth["gradient"]).norm() / truth["gradient"].norm()
        cosine = torch.cosine_similarity(found["gradient"], truth["gradient"], dim=0)
        print(
            f"| {way} | {change.mean():.4f} | {change.max():.3f} | {-found['logprobs'].mean():.4f} "
            f"| {error:.4f} | {cosine:.5f} |",
            flush=True,
        )
        print(f"    losses: {' '.join(f'{loss:.4f}' for loss in found['losses'])}", flush=True)


if __name__ == "__main__":
    main()
