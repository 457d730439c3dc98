"""Measures sampling on one CUDA device against transformers' `generate`, on Qwen3-0.6B with random weights.

    python -m benchmarks.gpu_sampling [--prompts 64] [--tokens 64]

Prints a line of JSON for each side: prompts of 128 tokens in one batch, the same number of tokens sampled for
each. The second round counts. This engine samples with CUDA graphs and without.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step import make_model_folder
from benchmarks.sampling import Work, by_cookbook, make_work, seconds
from cookbook import ServiceClient
from cookbook.engine.sampling import decode_graphs
from cookbook.utils import pretrained


@torch.no_grad()
def by_generate(model: Any, work: Work) -> None:
    tokens = torch.tensor(work.prompts, device="cuda")
    model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        top_k=0,
        max_new_tokens=work.num_tokens[0],
        eos_token_id=None,
        pad_token_id=0,
    ).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model_folder("0.6B", Path(temporary, "model"))
        equal, _ = make_work(arguments.prompts, 150_000)
        work = Work(equal.name, equal.prompts, [arguments.tokens] * arguments.prompts)
        service, plain = ServiceClient(device="cuda"), ServiceClient(device="cuda")
        client = service.create_sampling_client(base_model=str(folder))
        without_graphs = plain.create_sampling_client(base_model=str(folder))
        model = pretrained.load_causal_lm(folder, dtype=torch.bfloat16).cuda().eval()
        model.generation_config.eos_token_id = None
        for side, run in (
            ("this engine", lambda: by_cookbook(client, work, 1.0)),
            ("this engine, top_p=0.95", lambda: by_cookbook(client, work, 0.95)),
            ("this engine, without CUDA graphs", lambda: by_cookbook(without_graphs, work, 1.0)),
            ("transformers, generate", lambda: by_generate(model, work)),
        ):
            # is read once, when a model is first sampled from
            os.environ[decode_graphs.SWITCH] = str(int("without" not in side))
            run()
            spent = seconds(run)
            rate = arguments.prompts * arguments.tokens / spent
            print(
                json.dumps({"side": side, "sequences": arguments.prompts, "tokens_per_second": round(rate)}),
                flush=True,
            )
        service.close()
        plain.close()


if __name__ == "__main__":
    main()
