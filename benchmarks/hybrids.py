"""Measures training and sampling of models with recurrent layers, compared with plain transformers.

    python -m benchmarks.hybrids [--families qwen3_5 bamba] [--rounds 3] [--only sampling] [--wide]
    python -m benchmarks.hybrids --only lone --wide

The models are random: 4 layers and hidden size 128, or with `--wide` 1,024 and heads and states of published
sizes. Training is a forward and backward pass over 16 sequences of 32 to 256 tokens, with the gradients of
all weights; the peer gets one batch padded on the right. Sampling continues 16 such prompts by 32 tokens
each; the peer is `generate` on one batch padded on the left. `--only lone` continues the first prompt alone,
as in chat, with packed weights and without them. The sides run in turns in one process without kernels, and
the table has the median of the rounds. "error" is the largest relative difference of a weight's gradient from
one sequence at a time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cookbook.embedded import MODEL_PATH
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import TokenSequence, pack
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.requests import sample_request
from cookbook.engine.sampling.sampler import Sampler
from cookbook.types import SamplingParams
from cookbook.utils import pretrained

VOCAB_SIZE = 4096
NUM_SEQUENCES, SHORTEST, LONGEST, NUM_SAMPLED = 16, 32, 256, 32
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 32,
        },
    ),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 256}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA,
            **EXPERTS,
            "shared_intermediate_size": 64,
            "intermediate_size": 64,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [3]}),
    "zamba2": (
        "zamba2",
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 32,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            # The step of one token in transformers does not apply this lower bound. With one that matters
            # `generate` differs from the forward pass, and so from the tokens here.
            "time_step_min": 1e-6,
        },
    ),
    "jamba": (
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_dt_rank": 8,
            "mamba_d_state": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "conv", "conv", "full_attention"]}),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "kimi_linear": (
        "kimi_linear",
        {
            **EXPERTS,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "mlp_layer_types": ["dense"] * 4,
            "linear_head_dim": 32,
            "linear_num_heads": 8,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    "minimax": ("minimax", {**EXPERTS, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 32}),
    "falcon_mamba": ("falcon_mamba", {"time_step_rank": 8, "state_size": 16}),
}
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_head_dim": 128,
    "mamba_n_heads": 32,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_d_ssm": 2048,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
}
"""What `--wide` changes, if a family has the setting."""


def make_model(name: str, folder: Path, is_wide: bool = False) -> Path:
    from transformers import AutoConfig

    model_type, settings = FAMILIES[name]
    torch.manual_seed(0)
    settings = {**SIZES, **settings}
    if is_wide:
        settings |= {key: value for key, value in WIDE.items() if key in settings}
    config = AutoConfig.for_model(model_type, **settings)
    kind, config = pretrained.model_class(config)
    model = kind(config)
    model.save_pretrained(folder)
    pretrained.load_tokenizer(MODEL_PATH).save_pretrained(folder)
    return folder


def make_sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    texts = [
        rng.integers(3, VOCAB_SIZE, length + 1)
        for length in rng.integers(SHORTEST, LONGEST + 1, NUM_SEQUENCES)
    ]
    return [TokenSequence(text[:-1], text[1:], np.ones(len(text) - 1, np.float32), {}) for text in texts]


class Cookbook:
    def __init__(self, folder: Path, pack_weights: bool = False) -> None:
        options = EngineOptions(device="cpu", dtype="float32", pack_weights=pack_weights)
        self.base = BaseModel(str(folder), options)
        self.base.model.requires_grad_(True)

    def train(self, sequences: list[TokenSequence]) -> None:
        batch = pack(sequences, self.base.device, trained_only=True)
        self.base.backpropagate(batch, lambda logprobs_S, part: -logprobs_S.sum(), checkpoint_layers=False)

    def sample(self, prompts: list[np.ndarray]) -> list[list[int]]:
        settings = SamplingParams(max_tokens=NUM_SAMPLED, temperature=0, stop_token_ids=[-1])
        requests = [sample_request(self.base, prompt.tolist(), 1, settings) for prompt in prompts]
        prepared: Future[Any] = Future()
        prepared.set_result((None, 0))
        waiting = requests[1:]
        Sampler(self.base, prepared).run(requests[0], lambda: [waiting.pop(0) for _ in range(len(waiting))])
        return [request.future.result().sequences[0].tokens for request in requests]


class Plain:
    def __init__(self, folder: Path) -> None:
        self.model = pretrained.load_causal_lm(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def train(self, sequences: list[TokenSequence]) -> None:
        shape = len(sequences), max(map(len, sequences))
        tokens, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        mask = torch.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.from_numpy(sequence.tokens_T)
            targets[row, : len(sequence)] = torch.from_numpy(sequence.targets_T)
            mask[row, : len(sequence)] = 1
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    @torch.no_grad()
    def sample(self, prompts: list[np.ndarray]) -> list[list[int]]:
        shape = len(prompts), max(map(len, prompts))
        tokens = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.from_numpy(prompt), 1
        found = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NUM_SAMPLED,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[:, shape[1] :].tolist()  # type: ignore[no-any-return]


def gradient_error(ours: nn.Module, plain: nn.Module) -> float:
    """Returns the largest relative difference, of the weights whose gradient is more than rounding."""
    expected = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    found = {name: each.grad for name, each in ours.named_parameters()}
    smallest = 1e-5 * max(float(gradient.norm()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
        if gradient.norm() > smallest
    )


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["training", "sampling", "lone"])
    parser.add_argument("--wide", action="store_true")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else ["training", "sampling"]
    sequences = make_sequences()
    heads = {
        "training": ("training, s", "plain", "ratio", "error"),
        "sampling": ("sampling, s", "generate", "ratio", "same tokens"),
        "lone": ("packed, s", "not packed", "ratio", "same tokens"),
    }
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} rounds, hidden size ", end="")
    print(WIDE["hidden_size"] if arguments.wide else SIZES["hidden_size"])
    print(f"\n{'':18}" + "".join(f"{head:>13}" for kind in kinds for head in heads[kind]))
    for name in arguments.families:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_model(name, Path(temporary), arguments.wide)
            ours = Cookbook(folder, pack_weights=arguments.only == "lone")
            other = Cookbook(folder) if arguments.only == "lone" else Plain(folder)
        line = f"{name:18}"
        for kind in kinds:
            if isinstance(other, Plain) and kind == "training":
                line += training(ours, other, sequences, arguments.rounds)
            else:
                line += sampling(ours, other, sequences[: 1 if kind == "lone" else None], arguments.rounds)
        print(line, flush=True)


def training(ours: Cookbook, plain: Plain, sequences: list[TokenSequence], num_rounds: int) -> str:
    ours.train(sequences)
    for sequence in sequences:
        plain.train([sequence])
    error = gradient_error(ours.base.model, plain.model)
    runs = lambda: ours.train(sequences), lambda: plain.train(sequences)
    return f"{columns(runs, num_rounds)}{error:13.1e}"


def sampling(ours: Cookbook, other: Cookbook | Plain, sequences: list[TokenSequence], num_rounds: int) -> str:
    prompts = [sequence.tokens_T for sequence in sequences]
    pairs = zip(ours.sample(prompts), other.sample(prompts), strict=True)
    num_same = sum(found == expected for found, expected in pairs)
    runs = lambda: ours.sample(prompts), lambda: other.sample(prompts)
    return f"{columns(runs, num_rounds)}{num_same:10}/{len(prompts)}"


def columns(runs: Sequence[Callable[[], Any]], num_rounds: int) -> str:
    """Returns the median seconds of both sides, which run in turns, and their ratio."""
    rounds = [[seconds(run) for run in runs] for _ in range(num_rounds)]
    ours, plain = map(statistics.median, zip(*rounds, strict=True))
    return f"{ours:13.3f}{plain:13.3f}{ours / plain:13.2f}"


if __name__ == "__main__":
    main()
