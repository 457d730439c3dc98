"""Measures a LoRA step on one CUDA device: tokens/s and model FLOPs utilization (MFU).

    python -m benchmarks.gpu_step [--models 0.6B 1.7B 4B 8B] [--steps 20] [--compile] [--real] [--trl]

The models are Qwen3 of published sizes with random weights in bfloat16 and an adapter of rank 16 on all
linear layers. A step has 16,384 tokens in sequences of 2,048, every token trained. MFU counts 4 FLOPs per
token and parameter of the linear layers (2 forward, 2 for the gradient of the input; frozen weights need no
gradient), relative to the rate of a large bfloat16 matrix product in the same run. `--real` trains on
sequences of 20 to 2,000 tokens instead, two thirds trained. `--trl` also measures TRL with packing and
Liger-Kernel; it needs liger-kernel and flash-attn to be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.roofline import MODELS
from benchmarks.side_cookbook import make_datums
from benchmarks.step_data import NUM_TEXT_TOKENS, SEED, Example, batches, num_tokens
from cookbook.clients.service import ServiceClient
from cookbook.types import AdamParams
from cookbook.utils import pretrained

LORA_RANK = 16
LENGTH, TOKENS_A_STEP = 2048, 16_384
WARM_UP_STEPS = 5

SIZES = {size: MODELS[f"qwen3-{size.lower()}"] for size in ("0.6B", "1.7B", "4B", "8B")}


def make_model_folder(size: str, folder: Path, **further: Any) -> Path:
    from transformers import AutoConfig, Qwen3ForCausalLM

    from cookbook import embedded
    from cookbook.models import get_tokenizer

    config = AutoConfig.for_model(**{**SIZES[size], **further}, dtype="bfloat16")
    torch.manual_seed(SEED)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    get_tokenizer(embedded.MODEL_NAME).save_pretrained(folder)  # the examples are token ids already
    return folder


def make_batches(num_steps: int, real: bool) -> list[list[Example]]:
    if real:
        return batches("mixed", num_steps)
    rng = np.random.default_rng(SEED)
    return [
        [
            (rng.integers(NUM_TEXT_TOKENS, size=LENGTH + 1).tolist(), [1] * (LENGTH + 1))
            for _ in range(TOKENS_A_STEP // LENGTH)
        ]
        for _ in range(num_steps)
    ]


def matrix_rate(size: int = 8192, repeats: int = 20) -> float:
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def linear_parameters(folder: Path) -> int:
    model = pretrained.empty_causal_lm(pretrained.load_config(folder))
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def measure_engine(folder: Path, data: list[list[Example]], compile_layers: bool) -> float:
    """Returns the seconds of the timed steps."""
    service = ServiceClient(device="cuda", compile=compile_layers)
    client = service.create_lora_training_client(str(folder), rank=LORA_RANK, seed=0, train_unembed=False)
    pending = []
    for step, batch in enumerate(map(make_datums, data)):
        if step == WARM_UP_STEPS:
            while pending:
                pending.pop().result()
            torch.cuda.synchronize()
            started = time.perf_counter()
        client.forward_backward(batch, return_logprobs="trained")
        pending.append(client.optim_step(AdamParams(learning_rate=1e-4)))
        if len(pending) > 2:
            pending.pop(0).result()
    for optim_step in pending:
        optim_step.result()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    service.close()
    return seconds


def measure_trl(folder: Path, data: list[list[Example]], model: Any = None) -> float:
    """Returns the seconds of the timed steps of `SFTTrainer`, with rows of `LENGTH` tokens.

    `model` already has an adapter; without it, the model of the folder gets one.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class RecordStepEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    rows = [
        {"input_ids": tokens, "labels": [token if m else -100 for token, m in zip(tokens, mask, strict=True)]}
        for batch in data
        for tokens, mask in batch
    ]
    own = {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=TOKENS_A_STEP // LENGTH,
        max_steps=len(data),
        max_length=LENGTH,
        packing=True,
        use_liger_kernel=model is None,
        bf16=True,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        model_init_kwargs=own if model is None else None,
    )
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        str(folder) if model is None else model,
        config,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora if model is None else None,
        callbacks=[RecordStepEnds()],
    ).train()
    return marks[-1] - marks[WARM_UP_STEPS - 1]


def measure_unsloth(folder: Path, data: list[list[Example]]) -> float:
    """Returns the seconds of the timed steps of TRL's trainer on a model that Unsloth has patched."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=False
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=LORA_RANK, target_modules=names, use_gradient_checkpointing=False, random_state=SEED
    )
    return measure_trl(folder, data, model)


def sides_of(arguments: argparse.Namespace) -> dict[str, Callable[[Path, list[list[Example]]], float]]:
    """Returns the programs to measure, and prints why one is missing."""
    sides: dict[str, Callable[[Path, list[list[Example]]], float]] = {
        "this engine": lambda folder, data: measure_engine(folder, data, arguments.compile)
    }
    if not (arguments.trl or arguments.trl_if_installed):
        return sides
    peers = {
        "TRL, packing and Liger": (measure_trl, ("trl", "liger_kernel", "flash_attn")),
        "Unsloth": (measure_unsloth, ("unsloth", "trl")),
    }
    for side, (measure, packages) in peers.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if not missing:
            sides[side] = measure
        elif arguments.trl_if_installed:
            print(f"{side} is not measured: {', '.join(missing)} is not installed.", flush=True)
        elif side != "Unsloth":
            raise SystemExit(f"--trl needs {', '.join(missing)}.")
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--real", action="store_true", help="sequences of 20 to 2,000 tokens")
    parser.add_argument(
        "--trl", action="store_true", help="measure TRL too, and Unsloth where it is installed"
    )
    parser.add_argument(
        "--trl-if-installed", action="store_true", help="the same, or say what is not installed"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each side")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; `benchmarks.train_step` runs on a CPU.")
    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in an 8,192-cubed bfloat16 product")
    data = make_batches(WARM_UP_STEPS + arguments.steps, arguments.real)
    tokens = sum(map(num_tokens, data[WARM_UP_STEPS:]))
    if not arguments.json:
        print("| model | side | tokens/s | MFU | peak GiB |\n|---|---|---|---|---|")
    for size in arguments.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_model_folder(size, Path(temporary, "model"))
            flops = 4 * linear_parameters(folder) * tokens
            for side, measure in sides_of(arguments).items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                seconds = measure(folder, data)
                peak = torch.cuda.max_memory_allocated() / 2**30
                mfu = flops / seconds / rate
                if arguments.json:
                    rates = {"tokens_per_second": round(tokens / seconds), "mfu": round(mfu, 3)}
                    result = {"model": size, "side": side, **rates, "peak_gib": round(peak, 1)}
                    print(json.dumps(result), flush=True)
                else:
                    print(f"| {size} | {side} | {tokens / seconds:,.0f} | {mfu:.0%} | {peak:.1f} |")


if __name__ == "__main__":
    main()
