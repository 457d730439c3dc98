"""Compares the projection to the vocabulary with torch's `F.linear_cross_entropy`, forward and backward.

    python -m benchmarks.linear_cross_entropy [--positions 512] [--hidden 256] [--rounds 3]
    python -m benchmarks.linear_cross_entropy --derived [--card h200]

Both compute the summed loss of the positions and its gradient by the hidden states; the weight is frozen, as
under a LoRA. torch runs it without options, which makes all logits, and with the chunks that its options
choose. The sides run in turns; the table has the least CPU time of the rounds, the peak of memory above the
inputs, and the largest difference of 16 positions from a float64 gradient, relative to its largest element.

With `--derived` they run on the fake CUDA device in bfloat16, with the roofline's rates: nothing is measured.
The project runs with its kernel and without, and Liger-Kernel's fused loss too if it is installed
(`make kernels`, `PYTHONPATH=build/kernels`).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.fake_cuda import library

if TYPE_CHECKING:
    from benchmarks.fake_cuda.costs import Costs

NUM_COMPARED = 16
"""The positions whose gradients are compared."""


def sides(weight_VD: Any, targets_S: Any) -> Mapping[str, Callable[[Any], tuple[Any, Any]]]:
    """Returns functions from hidden states to the summed loss and its gradient by them."""
    import torch
    import torch.nn.functional as F

    from cookbook.engine.model.unembedding import BlockSizes, Head, score_and_backpropagate

    def ours(hidden_SD: Any) -> tuple[Any, Any]:
        head = Head(weight_VD, BlockSizes.on(weight_VD.device))
        _, loss, grad_SD = score_and_backpropagate(
            head, hidden_SD, targets_S, lambda logprobs_C, part: -logprobs_C.sum()
        )
        return loss, grad_SD

    def theirs(hidden_SD: Any, **options: Any) -> tuple[Any, Any]:
        hidden_SD = hidden_SD.detach().requires_grad_()
        loss = F.linear_cross_entropy(hidden_SD, weight_VD, targets_S, reduction="sum", **options)
        (grad_SD,) = torch.autograd.grad(loss, hidden_SD)
        return loss.detach(), grad_SD

    chunks = torch.nn.LinearCrossEntropyOptions()
    return {
        "this project": ours,
        "torch, all logits": theirs,
        "torch, chunks": lambda hidden_SD: theirs(hidden_SD, options=chunks),
    }


def measure(positions: int, hidden: int, vocabulary: int, rounds: int) -> None:
    import torch

    from benchmarks.process_memory import begin_peak, peak_bytes, resident_bytes
    from cookbook.engine.model.loading import return_freed_memory

    torch.manual_seed(0)
    weight_VD = torch.randn(vocabulary, hidden) * hidden**-0.5
    hidden_SD, targets_S = torch.randn(positions, hidden), torch.randint(vocabulary, (positions,))
    exact_SD = _exact_gradient(hidden_SD, weight_VD, targets_S)
    found = sides(weight_VD, targets_S)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    peaks, errors = dict.fromkeys(found, 0), dict.fromkeys(found, 0.0)
    for number in range(rounds):
        for name in found if number % 2 == 0 else reversed(found):
            gc.collect()
            return_freed_memory()
            begin_peak()
            before, started = resident_bytes(), time.process_time()
            _, grad_SD = found[name](hidden_SD)
            seconds[name].append(time.process_time() - started)
            peaks[name] = max(peaks[name], peak_bytes() - before)
            errors[name] = float((grad_SD[:NUM_COMPARED] - exact_SD).abs().max() / exact_SD.abs().max())
    print(f"{positions} positions, {hidden} x {vocabulary}, float32, {torch.get_num_threads()} threads")
    for name in found:
        print(
            f"{name:20}{min(seconds[name]):8.2f} s{peaks[name] / 2**20:8.0f} MiB   error {errors[name]:.0e}"
        )


def _exact_gradient(hidden_SD: Any, weight_VD: Any, targets_S: Any) -> Any:
    """Returns the gradient by the first hidden states, in float64."""
    import torch

    weight_VD, targets_S = weight_VD.double(), targets_S[:NUM_COMPARED]
    grad_SV = (hidden_SD[:NUM_COMPARED].double() @ weight_VD.T).softmax(1)
    grad_SV[torch.arange(len(targets_S)), targets_S] -= 1
    return grad_SV @ weight_VD


def derive(card_name: str) -> None:
    library.load()  # before torch is imported
    import peft  # noqa: F401 - bitsandbytes, which it imports, asks for a CUDA device
    import torch

    from benchmarks import roofline
    from benchmarks.fake_cuda.costs import Costs
    from benchmarks.fake_cuda.device import FakeCuda

    card, device = roofline.CARDS[card_name], FakeCuda()
    kernels = device.kernels
    with device:
        weight_VD = torch.empty(151_936, 1024, dtype=torch.bfloat16, device="cuda")
        hidden_SD = torch.empty(16_384, 1024, dtype=torch.bfloat16, device="cuda")
        targets_S = torch.zeros(16_384, dtype=torch.long, device="cuda")
        ours, *others = sides(weight_VD, targets_S).items()
        cases = [("this project", ours[1]), ("without its kernel", ours[1]), *others]
        costs = Costs()
        if importlib.util.find_spec("liger_kernel") is not None:
            cases.append(("Liger-Kernel", lambda hidden_SD: _liger(hidden_SD, weight_VD, targets_S, costs)))
        for name, run in cases:
            if "chunks" in name:  # an operator that the fake device sees as one launch without work
                continue
            device.kernels = () if name == "without its kernel" else kernels
            costs.launches.clear()
            with device.recording(costs):
                run(hidden_SD)
            spent = sum(card.seconds(cost) * number for cost, number in costs.launches.items())
            num_bytes = sum(cost.num_bytes * number for cost, number in costs.launches.items())
            number = sum(costs.launches.values())
            print(f"{name:20}{number:6} launches{num_bytes / 1e9:8.1f} GB{spent * 1e3:8.1f} ms")
    print(roofline.LABEL)


def _liger(hidden_SD: Any, weight_VD: Any, targets_S: Any, costs: Costs) -> Any:
    """Runs Liger's loss on the fake device, where its kernel, which reads rows twice, only counts."""
    from liger_kernel.ops import fused_linear_cross_entropy as module

    from benchmarks.fake_cuda.costs import Cost

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda X_ptr, **_: costs.launches.update([Cost("loss", "memory", 3 * X_ptr.nbytes, 0)])

    module.liger_cross_entropy_kernel = Kernel()
    return module.fused_linear_cross_entropy_forward(
        hidden_SD.detach().requires_grad_(), weight_VD, targets_S, reduction="sum"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--derived", action="store_true")
    parser.add_argument("--card", default="h200")
    given = parser.parse_args()
    if given.derived:
        derive(given.card)
    else:
        measure(given.positions, given.hidden, given.vocabulary, given.rounds)


if __name__ == "__main__":
    main()
