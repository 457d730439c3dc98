"""Where the host waits for a CUDA device, and where the device computes in float64, with the reason for each.

A function is named by its file and its qualified name. A training step has none of either, unless the model's
own code in transformers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAMPLING = "cookbook/engine/sampling/"
_TRAINING = "cookbook/engine/training/"
_MODEL = "cookbook/engine/model/"
_JETMOE_ROUTER = "JetMoeTopKGating.forward"

WAITS: Mapping[str, str] = {
    f"{_SAMPLING}packed_decoder.py:PackedDecoder._run_row": "what has nan is not kept: once a prefill",
    f"{_SAMPLING}packed_decoder.py:PackedDecoder._compute": "places of log-probabilities are copied",
    f"{_SAMPLING}packed_decoder.py:_PromptText.note_logprobs": "log-probabilities of a prompt are an answer",
    f"{_SAMPLING}decoders.py:WholeModelDecoder.prefill": "a model's own cache takes prompts one by one",
    f"{_SAMPLING}decoders.py:WholeModelDecoder.decode": "a model's own cache takes groups one by one",
    f"{_SAMPLING}decoders.py:_logprobs_of": "log-probabilities of a prompt are an answer",
    "transformers/cache_utils.py:DynamicLayer.lazy_initialization": "an empty cache: once a layer and group",
    "transformers/cache_utils.py:DynamicSlidingWindowLayer.lazy_initialization": "as above",
    "transformers/cache_utils.py:DynamicIndexedLayer.lazy_initialization_indexer": "as above",
    f"{_SAMPLING}decode_graphs.py:DecodeGraphs.hidden_of": "nothing runs when a capture begins: once a size",
    f"{_SAMPLING}decode_graphs.py:_check_equal": "what was captured is compared: once a size",
    f"{_SAMPLING}sampler.py:_RunningBatch._draw": "a token may end its sequence: once a token for all",
    f"{_SAMPLING}sampler.py:_RunningBatch._score": "scores of whole texts are answers: once a pass",
    f"{_TRAINING}state_checks.py:check_finite": "a checkpoint with nan is refused: one read",
    f"{_TRAINING}trainer.py:Trainer.load": "a checkpoint is copied to the device",
    f"{_TRAINING}optimizer.py:Optimizer.restore": "a checkpoint is copied to the device",
    "cookbook/engine/checkpoint.py:": "a checkpoint is copied to the host, to be written",
    "cookbook/engine/tensor_files.py:": "a checkpoint is copied to the host, to be written",
    f"{_MODEL}published_files.py:": "weights are copied to the host, to be written",
    f"{_MODEL}full_weights.py:": "weights are copied to the host, to be written",
}
"""Why a function waits. A name that ends with a colon is for all functions of the file."""

WAITS_OF_MODELS: Mapping[str, str] = {
    "transformers/models/phimoe/modeling_phimoe.py:PhimoeRotaryEmbedding.forward": (
        "the largest position chooses a scale: once a pass"
    ),
    "transformers/models/longcat_flash/modeling_longcat_flash.py:LongcatFlashExperts.forward": (
        "its own loop over experts, where these are trained"
    ),
    "transformers/models/chameleon/modeling_chameleon.py:ChameleonForConditionalGeneration.forward": (
        "its list of tokens of pictures, which text may not choose, is copied: once a pass"
    ),
    "transformers/models/falcon/modeling_falcon.py:FalconAttention._split_heads": (
        "the place of the keys is a list, which is copied: once a layer"
    ),
    "transformers/models/step3p7/modeling_step3p7.py:Step3p7Experts.forward": "as above",
    "transformers/models/dbrx/modeling_dbrx.py:DbrxExperts.forward": "its own loop over experts",
    "transformers/models/gpt_neo/modeling_gpt_neo.py:GPTNeoSelfAttention._attn": "a number is copied",
    "transformers/models/glm5_next/modeling_glm5_next.py:Glm5NextTextIndexer.get_pooled_states": (
        "it drops pools of keys by a mask: once a layer"
    ),
    "transformers/models/gemma3n/modeling_gemma3n.py:Gemma3nTextMLP._gaussian_topk": "a number is copied",
    "transformers/models/qwen4_exp/modeling_qwen4_exp.py:Qwen4ExpTextQSAIndexer.forward": (
        "its indexer is a loop over tokens, with a wait for each"
    ),
    f"transformers/models/jetmoe/modeling_jetmoe.py:{_JETMOE_ROUTER}": (
        "its layers take the number of rows of each expert as a list: once a layer"
    ),
    f"{_MODEL}expert_lora.py:Groups.of_sizes": "the list of JetMoE is copied to the device",
}
"""The same for code of transformers, by the folder of the model."""

NOT_CAPTURED: Mapping[str, str] = {
    "gemma3n_text": "its MLP copies a number to the device in each pass",
    "phimoe": "its RoPE reads the largest position in each pass",
    "dbrx": "its own loop over experts",
    "jetmoe": "its layers take the number of rows of each expert as a list",
}
"""Why the passes that decode a family's model are no CUDA graphs, where that shows only in a capture."""

DOUBLES: Mapping[str, str] = {
    f"{_SAMPLING}choice.py:": "sums of a vocabulary's terms must not depend on their order",
}
"""Why a function makes tensors of float64."""


def _rows_of_experts(local: Mapping[str, Any]) -> list[int]:
    """Returns a possible number of rows for each expert of JetMoE: all rows are the first one's."""
    return [local["top_k_indices"].numel()] + [0] * (local["self"].num_experts - 1)


ANSWERS: Mapping[str, Any] = {
    f"{_MODEL}backward_trial.py:gradient_of_embeddings": True,
    f"{_TRAINING}state_checks.py:check_finite": True,
    f"{_SAMPLING}packed_decoder.py:PackedDecoder._run_row": True,
    f"transformers/models/jetmoe/modeling_jetmoe.py:{_JETMOE_ROUTER}": _rows_of_experts,
}
"""The values that these functions read from the device; all others read 0."""


def reason(table: Mapping[str, str], place: str) -> str | None:
    """Returns the reason of a table for a function, or None."""
    path, _, function = place.partition(":")
    names = (f"{path}:{function}", f"{path}:{function.removesuffix('.<listcomp>')}", f"{path}:")
    return next((table[name] for name in names if name in table), None)
