"""The custom evaluator of tinker-cookbook on a base model: custom_evaluators.py LOG."""

import asyncio

import tinker
from tinker_cookbook.eval.custom_evaluators import QA_DATASET, CustomEvaluator, grader_fn

evaluator = CustomEvaluator(QA_DATASET, grader_fn, "Qwen/Qwen3-8B", "qwen3")
client = tinker.ServiceClient().create_sampling_client(base_model="Qwen/Qwen3-8B").result()
result = asyncio.run(evaluator(client))
print(result)
assert 0 <= result["accuracy"] <= 1
