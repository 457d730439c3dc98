"""GGUF files of less than 8 bits a weight, made by llama.cpp's tool `llama-quantize` where it is installed.

Those types are llama.cpp's: blocks of blocks whose scales its program fits, and mixtures of them by layer.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cookbook.errors import FileError

PROGRAM = "llama-quantize"
QuantizedType: TypeAlias = Literal[
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "iq4_xs", "q3_k_m", "q2_k"
]
TYPES: tuple[str, ...] = get_args(QuantizedType)


def command(folder: str, file_name: str, kind: str) -> list[str]:
    """Returns the words of the command that makes the smaller file beside the larger one."""
    return [PROGRAM, f"{folder}/{file_name}", f"{folder}/{quantized_name(kind)}", kind.upper()]


def quantized_name(kind: str) -> str:
    return f"model-{kind}.gguf"


def quantize(path: Path, kind: str) -> Path | None:
    """Writes the smaller file beside `path` and returns it, or returns None where llama.cpp is not installed.

    Raises FileError with the end of the tool's output if it fails.
    """
    if shutil.which(PROGRAM) is None:
        return None
    ended = subprocess.run(
        command(str(path.parent), path.name, kind), capture_output=True, text=True, errors="replace"
    )
    made = path.with_name(quantized_name(kind))
    if ended.returncode or not made.is_file():
        last = "\n".join((ended.stdout + ended.stderr).splitlines()[-5:])
        raise FileError(f"{PROGRAM} could not make {made.name} (exit code {ended.returncode}):\n{last}")
    return made
