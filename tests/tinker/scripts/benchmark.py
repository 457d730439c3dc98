"""A benchmark of tinker-cookbook on a few questions: benchmark.py LOG."""

import asyncio
import sys

import tinker
from tinker_cookbook import renderers
from tinker_cookbook.eval.benchmarks import BenchmarkConfig, run_benchmark
from tinker_cookbook.tokenizer_utils import get_tokenizer

client = tinker.ServiceClient().create_sampling_client(base_model="Qwen/Qwen3-8B").result()
renderer = renderers.get_renderer("qwen3", get_tokenizer("Qwen/Qwen3-8B"))
config = BenchmarkConfig(save_dir=sys.argv[1], max_examples=4, max_tokens=12)
result = asyncio.run(run_benchmark("gsm8k", client, renderer, config))
print(result)
assert result.num_examples == 4
