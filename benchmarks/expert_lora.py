"""Times a layer of experts without an adapter, with this project's LoRA, and with PEFT's, side by side.

Each is a forward and a backward pass with frozen weights, as in training. The bytes are those that autograd
keeps in between, besides the weights. `python -m benchmarks.expert_lora` prints a line for each layer and
number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from cookbook.engine.model import expert_lora

SIZES = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32}
TOP_K, RANK, ROUNDS = 4, 16, 7
NUM_TOKENS = (128, 2048)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config: Any = Qwen3MoeConfig(**SIZES)
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.experts(*inputs)
        return out


def with_adapter() -> Any:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return PeftModel(Layer(), LoraConfig(r=RANK, target_modules=[], target_parameters=names))


def inputs_of(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens_ND = torch.randn(num_tokens, SIZES["hidden_size"], requires_grad=True)
    weights_NK, chosen_NK = torch.rand(num_tokens, SIZES["num_experts"]).topk(TOP_K)
    return tokens_ND, chosen_NK, weights_NK.requires_grad_()


def bytes_kept(layer: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    held = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step_of(layer: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    def step() -> None:
        layer(*inputs).square().mean().backward()

    return step


def main() -> None:
    torch.manual_seed(0)
    ours = with_adapter()
    expert_lora.fuse(ours)
    layers = {"no adapter": Layer(), "grouped": ours, "PEFT": with_adapter()}
    print(f"{SIZES}, {TOP_K} experts a token, rank {RANK}, {torch.get_num_threads()} threads, fp32")
    for num_tokens in NUM_TOKENS:
        inputs = inputs_of(num_tokens)
        steps = {name: step_of(layer, inputs) for name, layer in layers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_number in range(ROUNDS + 1):
            for name, step in steps.items():
                layers[name].zero_grad()
                start = time.perf_counter()
                step()
                if round_number:
                    seconds[name].append(time.perf_counter() - start)
        best = {name: min(times) for name, times in seconds.items()}
        for name, layer in layers.items():
            print(
                f"{num_tokens:5d} tokens, {name:10s}: {best[name] * 1e3:7.1f} ms "
                f"({best[name] / best['no adapter']:.2f}x), "
                f"{bytes_kept(layer, inputs) / 2**20:6.1f} MiB kept"
            )


if __name__ == "__main__":
    main()
