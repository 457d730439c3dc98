"""Loads a model onto the fake CUDA device, which has no memory, and prints what the host needed.

    PYTHONPATH=. python tests/cuda_rehearsal/load.py FOLDER DTYPE

Prints by how many bytes the peak of this process's memory rose, and the places and dtypes of the weights.
"""

from __future__ import annotations

from benchmarks.fake_cuda import library

library.load()  # before torch is imported

import os  # noqa: E402

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the fake device is that of one thread

import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402

import peft  # noqa: E402, F401 - bitsandbytes, which it imports, asks for a CUDA device
import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.fake_cuda.device import FakeCuda  # noqa: E402
from cookbook.engine.model.loading import load_model  # noqa: E402
from cookbook.utils import pretrained  # noqa: E402


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    folder, dtype = sys.argv[1:]
    pretrained.empty_causal_lm(pretrained.load_config(folder))  # imports the class of the model
    with FakeCuda():
        before = peak()
        model = load_model(folder, torch.device("cuda", 0), getattr(torch, dtype))
        rise = peak() - before
        places = sorted({f"{weight.device} {weight.dtype}" for weight in model.parameters()})
    print(json.dumps({"rise": rise, "weights": places}))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
