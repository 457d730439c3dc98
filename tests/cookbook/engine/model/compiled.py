"""Compiles the kernels for a GPU that is not there: sizes of Qwen3-0.6B, and the largest block of logits.

    PYTHONPATH=. python tests/cookbook/engine/model/compiled.py 90

The argument is the compute capability. Prints a line of JSON for each kernel: its name, the bytes of
registers that a thread keeps in memory, the bytes of shared memory, and whether it rounds to the nearest.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from cookbook.engine.model import kernels, triton_kernels
from cookbook.engine.model.unembedding import BlockSizes


def compile_for(capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> None:
    """Compiles a kernel. Arguments that are neither pointers nor constants are integers."""
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }
    num_warps = 4 if "ACTIVATION" in constants else triton_kernels._num_warps(constants.get("BLOCK", 0))
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(made.asm["ptx"], encoding="utf-8")
        assembler = get_ptxas(capability)
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        ended = subprocess.run(
            [getattr(assembler, "path", assembler), "-v", f"--gpu-name={name}", path, "-o", "/dev/null"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", ended.stderr)))
    rounds = re.search(r"cvt\.rn\.bf16", made.asm["ptx"]) is not None
    print(json.dumps([kernel.__name__, spilled, made.metadata.shared, rounds]))


def main(capability: int) -> None:
    halves = dict.fromkeys(("q", "k", "out_q", "out_k", "cos", "sin"), "*bf16")
    sizes = {"num_heads_q": 16, "num_heads_k": 8, "half": 64, "HEADS_Q": 16, "HEADS_K": 8, "HALF": 64}
    compile_for(capability, triton_kernels._rotate, halves, {**sizes, "IS_BACKWARD": True})
    pointers = dict.fromkeys(("logits", "target_logits", "highest", "total", "shrink"), "*fp32")
    pointers |= {"terms": "*bf16", "targets": "*i64", "softcap": "fp32"}
    block = BlockSizes.on(torch.device("cuda")).vocabulary
    for has_softcap in (False, True):
        constants = {"HAS_SOFTCAP": has_softcap, "WRITES": True, "BLOCK": block, "num_targets": 1}
        compile_for(capability, triton_kernels._softmax_block, pointers, constants)
    for activation in kernels.ACTIVATIONS:
        constants = {"ACTIVATION": activation, "BLOCK": triton_kernels._GATED_BLOCK}
        for kernel in (triton_kernels._gated_product, triton_kernels._gated_product_backward):
            compile_for(capability, kernel, dict.fromkeys(("gate", "up", "out", "grad"), "*bf16"), constants)


if __name__ == "__main__":
    main(int(sys.argv[1]))
