"""What distinguishes each family of chat models: the data of `families`, which builds a tiny model of each.

`SIZES` and `TOWER_SIZES` are common to all. A size that a family's config does not have is not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 384
"""Is above the tokenizer's 373 entries, as most published vocabularies are padded."""
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO = 380, 381, 382, 383, 379

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "initializer_factor": 1.0,
    # mixtures
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    # multi-head latent attention
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 32,  # with few heads, many scores are 0: topk breaks such ties by the text's length
    # gated delta net and its kin
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # Mamba
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
}
TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "image_size": 56,
    "out_hidden_size": 32,
    "projection_dim": 16,
    "num_position_embeddings": 16,
    "initializer_range": 0.2,
    "layer_scale_init_value": 0.5,
    # towers for sound
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "output_dim": 32,
    # query transformers
    "encoder_hidden_size": 16,
    "vocab_size": 32,
}


@dataclass(frozen=True)
class TinyFamily:
    model_type: str
    config: Mapping[str, Any]
    """What differs from `SIZES`, and from the defaults of the model type."""
    text: Mapping[str, Any] | None = None
    """For a multimodal model: likewise for its text model."""
    vision: Mapping[str, Any] | None = None
    extra_tensor: str | None = None
    """The name of a published tensor that transformers does not load, such as of multi-token prediction."""


def text_model(model_type: str, extra_tensor: str | None = None, **config: Any) -> TinyFamily:
    return TinyFamily(model_type, config, extra_tensor=extra_tensor)


def multimodal(
    model_type: str,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    extra_tensor: str | None = None,
    **config: Any,
) -> TinyFamily:
    return TinyFamily(model_type, config, text or {}, vision or {}, extra_tensor)


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
_WINDOWS = {"sliding_window": 8, "layer_types": [SLIDING, FULL]}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 1, 1]}
_PARTIAL_MROPE = {**_PARTIAL, "mrope_section": [1, 1, 0]}
_QWEN3_5_ROPE = {**_PARTIAL_MROPE, "mrope_interleaved": True}
_HYBRID = {"num_hidden_layers": 4, "layer_types": [LINEAR, LINEAR, LINEAR, FULL]}
_MLA = {"num_key_value_heads": 4, "head_dim": 4}
"""Multi-head latent attention has no grouped heads, and `head_dim` is the part that RoPE rotates."""
_DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_DENSE_FIRST_BY_TYPE = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
}
_GEMMA4_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000000.0},
}
_GEMMA4 = {"sliding_window": 8, "rope_parameters": _GEMMA4_ROPE, "final_logit_softcapping": 3.0}
_GEMMA4_WINDOWS = {
    **_GEMMA4,
    "layer_types": [SLIDING, FULL],
    "attention_k_eq_v": True,
    "per_layer_config": {"1": {"head_dim": 16, "num_key_value_heads": 1}},
}
_QWEN_VISION = {"patch_size": 14, "spatial_merge_size": 2}
_SIGLIP = {"patch_size": 14}
_NEMOTRON_H = {
    "num_hidden_layers": 4,
    "layers_block_type": [LINEAR, "moe", FULL, "mlp"],
    "n_groups": 2,
    "moe_shared_expert_intermediate_size": 24,
}
_TINY_VQ = {
    "embed_dim": 8,
    "num_embeddings": 8,
    "latent_channels": 8,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
_DOTS3 = {
    **_MLA,
    "num_hidden_layers": 3,
    "layer_types": [FULL, SLIDING, FULL],
    "sliding_window": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "shared_experts_intermediate_size": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 12,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 8,
    "swa_qk_nope_head_dim": 4,
    "swa_v_head_dim": 8,
}
_QWEN4_EXP = {
    "rope_parameters": _QWEN3_5_ROPE,
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, LINEAR, LINEAR, "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [2],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 101,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 32,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_MINIMAX_M3 = {
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 24,
    "rotary_dim": 4,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": [FULL, "minimax_m3_sparse"],
    "index_n_heads": 2,
    "index_block_size": 4,
    "index_topk_blocks": 2,
}
_SWA_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
_INKLING = {
    **_SWA_HEADS,
    "local_layer_ids": [1],
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 32,
    "logits_mup_width_multiplier": 2.0,
}
_INKLING2 = {
    **_SWA_HEADS,
    "sliding_window_size": 16,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "d_rel": 4,
    "rel_extent": 32,
    "final_logit_softcapping": 3.0,
}
_SAM = {"mlp_dim": 24, "patch_size": 14, "output_channels": 8, "global_attn_indexes": [1]}
_TINY_CODEC = {"depths": [1, 1], "downsampling_ratios": [2], "num_filters": 4}
_MTP = "mtp.layers.0.eh_proj.weight"
_MTP_LAYER = "model.layers.61.eh_proj.weight"

FAMILIES: dict[str, TinyFamily] = {
    # -- Llama and its kin
    "llama2": text_model("llama", num_key_value_heads=4),
    "llama3": text_model("llama", rope_parameters=_LLAMA3_ROPE, eos_token_id=[2, 0]),
    "llama3_2": text_model("llama", rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True),
    "llama4": multimodal(
        "llama4",
        text={
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "moe_layers": [1, 3],
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["chunked_attention"] * 3 + [FULL],
            "attention_chunk_size": 16,
            "floor_scale": 8,
        },
        vision={
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "intermediate_size": 64,
        },
    ),
    "mistral": text_model("mistral", sliding_window=8),
    "mistral_nemo": text_model("mistral", sliding_window=None, head_dim=16),
    "ministral": text_model("ministral", **_WINDOWS),
    "mistral3": multimodal("mistral3", text={"model_type": "mistral"}, vision=_SIGLIP),
    "ministral3": multimodal(
        "mistral3",
        text={
            "model_type": "ministral3",
            "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
            "tie_word_embeddings": True,
        },
        vision=_SIGLIP,
        tie_word_embeddings=True,
    ),
    "mistral4": multimodal(
        "mistral3",
        text={
            "model_type": "mistral4",
            "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5},
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 4,
        },
        vision=_SIGLIP,
    ),
    "mixtral": text_model("mixtral"),
    "arcee": text_model("arcee", rope_parameters=_YARN),
    "apertus": text_model("apertus", rope_parameters=_LLAMA3_ROPE),
    "smollm3": text_model("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "smolvlm": multimodal("smolvlm", text={"model_type": "llama"}, vision={"patch_size": 14}),
    "idefics3": multimodal("idefics3", text={"model_type": "llama"}, vision={"patch_size": 14}),
    "llava": multimodal("llava", text={"model_type": "llama"}, vision=_SIGLIP),
    "llava_next": multimodal("llava_next", text={"model_type": "mistral"}, vision=_SIGLIP),
    "helium": text_model("helium"),
    "diffllama": text_model("diffllama"),
    "seed_oss": text_model("seed_oss", attention_bias=True),
    "internlm3": text_model("internlm3"),
    "cwm": text_model("cwm", rope_parameters=_LLAMA3_ROPE, **_WINDOWS),
    "nanochat": text_model("nanochat", final_logit_softcapping=3.0),
    # -- Qwen
    "qwen2": text_model("qwen2"),
    "qwen2_tied": text_model("qwen2", tie_word_embeddings=True),
    "qwen2_moe": text_model("qwen2_moe"),
    "qwen2_vl": multimodal(
        "qwen2_vl", text={"rope_parameters": _MROPE}, vision={**_QWEN_VISION, "hidden_size": 32}
    ),
    "qwen2_5_vl": multimodal(
        "qwen2_5_vl",
        text={"rope_parameters": _MROPE},
        vision={**_QWEN_VISION, "fullatt_block_indexes": [1]},
    ),
    "qwen3": text_model("qwen3"),
    "qwen3_tied": text_model("qwen3", tie_word_embeddings=True),
    "qwen3_moe": text_model("qwen3_moe", norm_topk_prob=True),
    "qwen3_next": text_model("qwen3_next", _MTP, rope_parameters=_PARTIAL, **_HYBRID),
    "qwen3_vl": multimodal(
        "qwen3_vl",
        text={"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "tie_word_embeddings": True},
        vision={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
    ),
    "qwen3_vl_moe": multimodal(
        "qwen3_vl_moe",
        text={"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        vision={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": multimodal(
        "qwen3_5",
        text={"rope_parameters": _QWEN3_5_ROPE, "tie_word_embeddings": True, **_HYBRID},
        vision=_QWEN_VISION,
        extra_tensor=_MTP,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": multimodal(
        "qwen3_5_moe",
        text={"rope_parameters": _QWEN3_5_ROPE, **_HYBRID},
        vision=_QWEN_VISION,
        extra_tensor=_MTP,
    ),
    "internvl": multimodal(
        "internvl",
        text={"model_type": "qwen3"},
        vision={"patch_size": [14, 14], "image_size": [56, 56]},
    ),
    # -- Gemma
    "gemma": text_model("gemma"),
    "gemma2": text_model(
        "gemma2",
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,  # small enough to change the values
        final_logit_softcapping=3.0,
        **_WINDOWS,
    ),
    "gemma3_text": text_model("gemma3_text", query_pre_attn_scalar=8, **_WINDOWS),
    "gemma3": multimodal(
        "gemma3", text={"query_pre_attn_scalar": 8, **_WINDOWS}, vision=_SIGLIP, mm_tokens_per_image=4
    ),
    # The vision tower of Gemma 3n is a model of the package timm, so this is the class of its text model.
    "gemma3n_text": text_model(
        "gemma3n_text",
        num_hidden_layers=4,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        sliding_window=8,
        num_kv_shared_layers=2,
        intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        vocab_size_per_layer_input=VOCAB_SIZE - 8,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        final_logit_softcapping=3.0,
    ),
    "gemma4": multimodal(
        "gemma4",
        text={
            **_GEMMA4,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL],
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
        },
    ),
    "gemma4_e2b": multimodal(
        "gemma4",
        text={
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
            "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        },
    ),
    "gemma4_moe": multimodal(
        "gemma4",
        text={
            **_GEMMA4_WINDOWS,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
        },
    ),
    # -- Phi
    "phi": text_model("phi", rope_parameters=_PARTIAL, num_key_value_heads=4),
    "phi3": text_model("phi3", sliding_window=8),
    "phi4_mini": text_model(
        "phi3",
        rope_parameters=_LONGROPE,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "phimoe": text_model("phimoe", lm_head_bias=True, attention_bias=True),
    # -- OpenAI
    "gpt_oss": text_model("gpt_oss", rope_parameters=_YARN, swiglu_limit=7.0, **_WINDOWS),
    "gpt2": text_model("gpt2"),
    # -- DeepSeek and models of its design
    "deepseek_v2": text_model("deepseek_v2", q_lora_rank=None, n_shared_experts=2, **_DENSE_FIRST, **_MLA),
    "deepseek_v3": text_model(
        "deepseek_v3",
        _MTP_LAYER,
        rope_parameters=_YARN,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        **_DENSE_FIRST,
        **_MLA,
    ),
    "deepseek_v32": text_model("deepseek_v32", _MTP_LAYER, **_DENSE_FIRST_BY_TYPE, **_MLA),
    "deepseek_v4": text_model(
        "deepseek_v4",
        "mtp.0.e_proj.weight",
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=[SLIDING, "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        partial_rotary_factor=0.25,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
    ),
    "kimi_k2": text_model("deepseek_v3", rope_parameters=_YARN, n_routed_experts=8, **_DENSE_FIRST, **_MLA),
    "kimi_k25": multimodal(
        "kimi_k25",
        text={"rope_parameters": _YARN, "model_type": "deepseek_v3", **_DENSE_FIRST, **_MLA},
        vision={"patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=16,
    ),
    "kimi_linear": text_model(
        "kimi_linear",
        num_hidden_layers=4,
        q_lora_rank=None,
        layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        **_MLA,
    ),
    "glm4_moe_lite": text_model("glm4_moe_lite", **_DENSE_FIRST_BY_TYPE, **_MLA),
    "glm_moe_dsa": text_model("glm_moe_dsa", **_DENSE_FIRST_BY_TYPE, **_MLA),
    "longcat_flash": text_model(
        "longcat_flash", num_layers=2, moe_topk=2, zero_expert_num=2, expert_ffn_hidden_size=16, **_MLA
    ),
    "dots1": text_model("dots1", n_shared_experts=1, sliding_window=None, **_DENSE_FIRST),
    "youtu": text_model("youtu", **_MLA),
    # -- GLM
    "glm": text_model("glm", rope_parameters=_PARTIAL, attention_bias=True),
    "glm4": text_model("glm4", rope_parameters=_PARTIAL),
    "glm4_moe": text_model(
        "glm4_moe",
        "model.layers.92.eh_proj.weight",
        rope_parameters=_PARTIAL,
        attention_bias=True,
        use_qk_norm=True,
        **_DENSE_FIRST,
    ),
    "glm4v": multimodal(
        "glm4v",
        text={"rope_parameters": _PARTIAL_MROPE},
        vision=_QWEN_VISION,
    ),
    "glm4v_moe": multimodal(
        "glm4v_moe",
        text={"rope_parameters": _PARTIAL_MROPE, **_DENSE_FIRST},
        vision=_QWEN_VISION,
    ),
    # -- MiniMax
    "minimax": text_model("minimax", layer_types=[LINEAR, FULL], block_size=16),
    "minimax_m2": text_model(
        "minimax_m2",
        rope_parameters=_PARTIAL,
    ),
    # -- hybrids with Mamba
    "nemotron_h": text_model("nemotron_h", **_NEMOTRON_H),
    "falcon_h1": text_model(
        "falcon_h1",
        mamba_d_ssm=64,
        mamba_rms_norm=True,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        mlp_multipliers=[0.9, 0.5],
        key_multiplier=0.5,
        attention_out_multiplier=0.9,
        ssm_multipliers=[0.9, 0.8, 0.7, 1.1, 0.6],
        ssm_in_multiplier=1.2,
        ssm_out_multiplier=0.6,
    ),
    "granitemoehybrid": text_model(
        "granitemoehybrid",
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
        shared_intermediate_size=24,
        intermediate_size=16,
        tie_word_embeddings=True,
        **_GRANITE,
    ),
    "granitemoehybrid_dense": text_model(
        "granitemoehybrid",
        layer_types=[LINEAR, FULL],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=48,
        position_embedding_type="rope",
        **_GRANITE,
    ),
    "bamba": text_model("bamba", num_hidden_layers=3, attn_layer_indices=[1]),
    "zamba2": text_model(
        "zamba2",
        num_hidden_layers=4,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
        n_mamba_heads=4,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=4,
        use_shared_attention_adapter=True,
        use_mem_rope=True,
        num_key_value_heads=4,
        head_dim=16,
    ),
    "jamba": text_model(
        "jamba",
        num_hidden_layers=4,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "falcon_mamba": text_model("falcon_mamba", time_step_rank=4),
    # -- hybrids with short convolutions
    "lfm2": text_model(
        "lfm2", num_hidden_layers=3, layer_types=["conv", "conv", FULL], block_auto_adjust_ff_dim=False
    ),
    "lfm2_moe": text_model(
        "lfm2_moe", num_hidden_layers=3, layer_types=["conv", "conv", FULL], num_dense_layers=1
    ),
    "lfm2_vl": multimodal(
        "lfm2_vl",
        text={"layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False},
        vision={"patch_size": 14, "num_patches": 16},
        projector_hidden_size=16,
    ),
    "lfm3": text_model("lfm3", num_hidden_layers=3, layer_types=["conv", SLIDING, FULL], sliding_window=8),
    # -- OLMo
    "olmo": text_model("olmo", clip_qkv=3.0),
    "olmo2": text_model("olmo2"),
    "olmo3": text_model("olmo3", **_WINDOWS),
    "olmoe": text_model("olmoe"),
    "flex_olmo": text_model("flex_olmo"),
    "olmo_hybrid": text_model("olmo_hybrid", **_HYBRID),
    # -- Granite
    "granite": text_model("granite", **_GRANITE),
    "granitemoe": text_model("granitemoe", **_GRANITE),
    "granitemoeshared": text_model("granitemoeshared", shared_intermediate_size=24, **_GRANITE),
    # -- others
    "cohere": text_model("cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": text_model("cohere2", logit_scale=0.25, **_WINDOWS),
    "cohere2_vision": multimodal(
        "cohere2_vision",
        text={"logit_scale": 0.25, **_WINDOWS},
        vision=_SIGLIP,
        alignment_intermediate_size=32,
    ),
    "exaone4": text_model("exaone4", **_WINDOWS),
    "exaone_moe": text_model(
        "exaone_moe",
        layer_types=[SLIDING, SLIDING, FULL],
        sliding_window=8,
        **_DENSE_FIRST_BY_TYPE,
    ),
    "ernie4_5": text_model("ernie4_5"),
    "ernie4_5_moe": text_model(
        "ernie4_5_moe",
        "model.mtp_block.0.mlp.weight",
        num_hidden_layers=3,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "hunyuan_v1_dense": text_model("hunyuan_v1_dense", tie_word_embeddings=True),
    "hunyuan_v1_moe": text_model("hunyuan_v1_moe", moe_topk=2),
    "nemotron": text_model("nemotron", rope_parameters=_PARTIAL),
    "starcoder2": text_model("starcoder2", sliding_window=8),
    "stablelm": text_model("stablelm", rope_parameters=_PARTIAL, use_qkv_bias=True),
    "gpt_neox": text_model("gpt_neox", num_key_value_heads=4),
    "opt": text_model("opt", ffn_dim=48, word_embed_proj_dim=32, dropout=0.1),
    "bloom": text_model("bloom"),
    "mpt": text_model("mpt"),
    "falcon": text_model("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "bitnet": text_model("bitnet"),
    "doge": text_model("doge", keep_window_size=2048),
    "solar_open": text_model("solar_open"),
    "mimo_v2_flash": text_model(
        "mimo_v2_flash",
        layer_types=[FULL, SLIDING, SLIDING],
        sliding_window=8,
        head_dim=12,
        **_DENSE_FIRST_BY_TYPE,
    ),
    # -- further ones
    "pixtral": multimodal(
        "llava", text={"model_type": "mistral"}, vision={"model_type": "pixtral", "patch_size": 14}
    ),
    "llava_onevision": multimodal("llava_onevision", text={"model_type": "qwen2"}, vision=_SIGLIP),
    "deepseek_vl": multimodal("deepseek_vl", text={"model_type": "llama"}, vision={"patch_size": 14}),
    "aya_vision": multimodal("aya_vision", text={"logit_scale": 0.25, **_WINDOWS}, vision=_SIGLIP),
    "exaone4_5": multimodal(
        "exaone4_5", text=_WINDOWS, vision={**_QWEN_VISION, "fullatt_block_indexes": [1]}, extra_tensor=_MTP
    ),
    "glm46v": multimodal("glm46v", text={"rope_parameters": _PARTIAL_MROPE}, vision=_QWEN_VISION),
    "glm5_next": multimodal(
        "glm5_next",
        text={
            "num_hidden_layers": 4,
            "layer_types": [LINEAR, LINEAR, LINEAR, "indexed_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "indexer_types": ["full"] * 4,
            "hc_mult": 2,
            "index_kpool": 2,
            **_MLA,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
        },
        vision={**_QWEN_VISION, "projection_intermediate_size": 24},
    ),
    "hy_v3": text_model("hy_v3", num_shared_experts=1, **_DENSE_FIRST_BY_TYPE),
    "hy_v4": text_model(
        "hy_v4",
        layer_types=["indexed_attention"] * 3,
        indexer_types=["full", "full", "shared"],
        hc_mult=2,
        **_DENSE_FIRST_BY_TYPE,
        **_MLA,
    ),
    "lfm3_vl": multimodal(
        "lfm3_vl",
        text={"layer_types": ["conv", SLIDING, FULL], "num_hidden_layers": 3, "sliding_window": 8},
        vision={"patch_size": 14, "layer_types": ["conv", FULL]},
        projector_hidden_size=16,
    ),
    "minicpm3": text_model("minicpm3", dim_model_base=16, **_MLA),
    "bailing_hybrid": text_model(
        "bailing_hybrid",
        num_hidden_layers=4,
        layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        num_expert_group=1,
        short_conv_kernel_size=4,
        **_MLA,
    ),
    "laguna": text_model(
        "laguna",
        layer_types=[FULL, SLIDING, SLIDING],
        sliding_window=8,
        num_attention_heads_per_layer=[4, 4, 4],
        **_DENSE_FIRST_BY_TYPE,
    ),
    "afmoe": text_model(
        "afmoe",
        num_hidden_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
        sliding_window=8,
        num_dense_layers=1,
        num_shared_experts=1,
        mup_enabled=True,
    ),
    "jais2": text_model("jais2"),
    "hyperclovax": text_model("hyperclovax", **_GRANITE),
    "step3p7": multimodal(
        "step3p7",
        text={
            **_DENSE_FIRST_BY_TYPE,
            "layer_types": [FULL, SLIDING, FULL],
            "sliding_window": 8,
            "share_expert_dim": 16,
            "num_sliding_attention_heads": 4,
            "query_pre_attn_scalar": 8,
        },
        vision=_SIGLIP,
    ),
    "zaya": text_model("zaya", layer_types=["hybrid"] * 2, router_hidden_size=16, num_experts_per_tok=1),
    "persimmon": text_model("persimmon", num_key_value_heads=4),
    "jetmoe": text_model("jetmoe", kv_channels=8, num_key_value_heads=2),
    "recurrent_gemma": text_model(
        "recurrent_gemma",
        num_hidden_layers=3,
        block_types=["recurrent", "recurrent", "attention"],
        lru_width=32,
        attention_window_size=8,
        num_key_value_heads=1,
    ),
    "mamba2": text_model("mamba2", num_heads=4, head_dim=16, n_groups=1),
    "vaultgemma": text_model(
        "vaultgemma",
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_WINDOWS,
    ),
    "muse_glimmer": multimodal(
        "muse_glimmer",
        text={**_WINDOWS, "layer_rope_theta": [10000.0, 0], "final_logit_softcapping": 3.0},
        vision={
            "patch_size": 14,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "layer_types": ["window_attention", FULL],
        },
        projector_hidden_size=16,
        out_hidden_size=64,
    ),
    "granite_swa": text_model("granite_swa", layer_rope_theta=[10000.0, 10000.0], **_WINDOWS, **_GRANITE),
    "granitemoe_swa": text_model(
        "granitemoe_swa",
        layer_rope_theta=[10000.0, 10000.0],
        shared_intermediate_size=24,
        **_WINDOWS,
        **_GRANITE,
    ),
    "cohere2_moe": text_model(
        "cohere2_moe",
        logit_scale=0.25,
        mlp_layer_types=["dense", "sparse"],
        prefix_dense_intermediate_size=48,
        num_shared_experts=1,
        **_WINDOWS,
    ),
    "mellum": text_model("mellum", mlp_layer_types=["sparse", "sparse"], **_WINDOWS),
    "axk1": text_model("axk1", **_DENSE_FIRST_BY_TYPE, **_MLA),
    "axk2": text_model(
        "axk2", layer_types=["indexed_attention"] * 3, gated_norm_rank=4, **_DENSE_FIRST_BY_TYPE, **_MLA
    ),
    "gpt_bigcode": text_model("gpt_bigcode"),
    "gptj": text_model("gptj", rotary_dim=4),
    "gpt_neo": text_model("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    "minimax_m3_vl": multimodal(
        "minimax_m3_vl",
        text=_MINIMAX_M3,
        vision={"patch_size": 14},
        projector_hidden_size=16,
    ),
    "gemma4_unified": multimodal("gemma4_unified", text=_GEMMA4_WINDOWS),
    "mistral_large4": multimodal(
        "mistral_large4",
        text={
            **_DENSE_FIRST_BY_TYPE,
            "layer_types": ["indexed_attention"] * 3,
            "indexer_types": ["full"] * 3,
            "no_rope_layers": [1, 1, 0],
            "kv_source_layers": [0, 1, 2],
            "n_shared_experts": 1,
            "rope_parameters": _YARN,
            **_MLA,
        },
        vision=_SIGLIP,
    ),
    "flint": text_model(
        "flint", num_hidden_layers=3, layer_types=[FULL, SLIDING, FULL], sliding_window=9, mlp_only_layers=[0]
    ),
    "beam": text_model(
        "beam",
        layer_types=[SLIDING, SLIDING, FULL],
        sliding_window=8,
        **_DENSE_FIRST_BY_TYPE,
    ),
    "kolibri1": text_model("kolibri1", sliding_window=9, layer_types=[SLIDING, FULL]),
    "inkling_text": text_model("inkling_text", **_INKLING),
    "iquestcoder": text_model("iquestcoder"),
    "nemotron_h_omni": multimodal(
        "nemotron_h_omni",
        text=_NEMOTRON_H,
        vision={"patch_size": 14, "video_temporal_patch_size": 2},
    ),
    "minicpmv4_6": multimodal(
        "minicpmv4_6",
        text={"rope_parameters": _PARTIAL, **_HYBRID},
        vision={"patch_size": 14, "insert_layer_id": 0},
        insert_layer_id=0,
    ),
    "mllama": multimodal(
        "mllama",
        text={"cross_attention_layers": [1], "num_hidden_layers": 3},
        vision={
            "patch_size": 14,
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
    ),
    # -- published for text alone, or long ago
    "gemma4_text": text_model("gemma4_text", hidden_size_per_layer_input=0, **_GEMMA4_WINDOWS),
    "qwen3_5_text": text_model("qwen3_5_text", rope_parameters=_PARTIAL, **_HYBRID),
    "qwen3_5_moe_text": text_model("qwen3_5_moe_text", rope_parameters=_PARTIAL, **_HYBRID),
    "modernbert_decoder": text_model("modernbert-decoder", local_attention=16, **_WINDOWS),
    "dbrx": text_model(
        "dbrx",
        attn_config={"kv_n_heads": 2, "clip_qkv": 3.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        max_seq_len=512,
    ),
    "hrm_text": text_model("hrm_text"),
    "mamba": text_model("mamba", time_step_rank=4),
    "zamba": text_model(
        "zamba",
        num_hidden_layers=4,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
        n_mamba_heads=2,
        mamba_dt_rank=2,  # these weights are 4% of a Mamba layer at published sizes
        mamba_d_state=2,
        attention_head_dim=16,
        num_key_value_heads=4,
        use_mamba_kernels=False,
    ),
    "xlstm": text_model("xlstm", num_blocks=2, num_heads=4, chunk_size=16, hidden_size=64, qk_dim_factor=1.0),
    "rwkv": text_model(
        "rwkv", context_length=512, attention_hidden_size=32, num_hidden_layers=4, rescale_every=2
    ),
    "biogpt": text_model("biogpt"),
    "codegen": text_model("codegen", rotary_dim=4, n_ctx=512),
    "xglm": text_model("xglm", ffn_dim=48),
    # -- further ones for pictures
    "ernie4_5_vl_moe": multimodal(
        "ernie4_5_vl_moe",
        text={
            "moe_intermediate_size": [16, 16],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
            **_DENSE_FIRST_BY_TYPE,
        },
        vision=_QWEN_VISION,
    ),
    "aria": multimodal("aria", text={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "glm_ocr": multimodal("glm_ocr", text={"rope_parameters": _PARTIAL_MROPE}, vision=_QWEN_VISION),
    "hunyuan_vl": multimodal(
        "hunyuan_vl",
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [1] * 4}},
    ),
    "hyperclovax_vision_v2": multimodal("hyperclovax_vision_v2"),
    "lighton_ocr": multimodal("lighton_ocr", text={"model_type": "qwen3"}),
    "llava_next_video": multimodal("llava_next_video", text={"model_type": "llama"}, vision=_SIGLIP),
    "vipllava": multimodal("vipllava", text={"model_type": "llama"}, vision=_SIGLIP),
    "idefics2": multimodal("idefics2", text={"model_type": "mistral"}, vision={"patch_size": 14}),
    "granite_docling": multimodal(
        "granite_docling",
        text={"model_type": "llama", "pad_token_id": 0},
        vision={"patch_size": 14},
        pad_token_id=0,
    ),
    "minicpm_ocr": multimodal("minicpm_ocr", text=_HYBRID),
    "minicpmv4_7": multimodal(
        "minicpmv4_7",
        text={"rope_parameters": _PARTIAL, **_HYBRID},
        vision={"patch_size": 14, "insert_layer_id": 0},
        insert_layer_id=0,
    ),
    "paddleocr_vl": multimodal("paddleocr_vl", text={"rope_parameters": _MROPE}),
    "qianfan_ocr": multimodal("qianfan_ocr"),
    "ovis2": multimodal(
        "ovis2",
        text={"model_type": "qwen2"},
        vision={"vocab_size": 32},
        hidden_size=32,
        vocab_size=VOCAB_SIZE,
    ),
    "got_ocr2": multimodal(
        "got_ocr2",
        text={"model_type": "qwen2"},
        vision=_SAM,
    ),
    "video_llama_3": multimodal("video_llama_3", text={"model_type": "qwen2"}),
    "cohere_compass": multimodal(
        "cohere_compass",
        text={"logit_scale": 0.25, "rope_parameters": {SLIDING: _MROPE, FULL: _MROPE}, **_WINDOWS},
        vision={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "cosmos3_edge": multimodal("cosmos3_edge", text={"rope_parameters": _MROPE}),
    "cosmos3_omni": multimodal("cosmos3_omni"),
    "glmga": multimodal("glmga", text={"rope_parameters": _PARTIAL_MROPE}, vision=_QWEN_VISION),
    "phi4_multimodal": text_model(
        "phi4_multimodal",
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
        },
    ),
    # -- further ones, mostly for pictures or sound
    "molmo2": multimodal(
        "molmo2",
        text={"additional_vocab_size": 8},
        vision={"num_key_value_heads": 2, "image_size": [56, 56], "patch_size": 14},
        adapter_config={"num_key_value_heads": 2, "text_hidden_size": 32, "vision_feature_layer": [-1]},
        image_patch_id=IMAGE,
    ),
    "chameleon": text_model(
        "chameleon",
        intermediate_size=256,
        vq_config=_TINY_VQ,
        vocabulary_map={f"IMGIMG{letter}Z": i + 374 for i, letter in enumerate("ABCD")},
    ),
    "emu3": multimodal(
        "emu3", vq_config=_TINY_VQ, vocabulary_map={"<image>": IMAGE, "<|extra_200|>": VISION_END}
    ),
    "fuyu": multimodal("fuyu"),
    "inkling2_text": text_model("inkling2_text", **_INKLING2),
    "kosmos2_5": multimodal("kosmos-2.5"),
    "video_llava": multimodal("video_llava", text={"model_type": "llama"}, vision=_SIGLIP),
    "qwen2_5_omni_thinker": multimodal(
        "qwen2_5_omni_thinker",
        vision_start_token_id=VISION_START,
        text={"rope_parameters": _MROPE},
        vision={**_QWEN_VISION, "fullatt_block_indexes": [1]},
    ),
    "qwen2_audio": multimodal("qwen2_audio"),
    "qwen3_asr": multimodal("qwen3_asr", audio_config={"downsample_hidden_size": 8}),
    "voxtral": multimodal("voxtral"),
    "granite_speech": multimodal("granite_speech"),
    "granite_speech_plus": multimodal("granite_speech_plus"),
    "glmasr": multimodal("glmasr"),
    "moss_transcribe_diarize": multimodal("moss_transcribe_diarize"),
    "audioflamingo3": multimodal("audioflamingo3"),
    "musicflamingo": multimodal("musicflamingo"),
    "fun_asr_nano": multimodal(
        "fun_asr_nano",
        audio_config={"num_timestamp_prediction_layers": 1, "num_stacked_frames": 2, "num_hidden_layers": 3},
        adaptor_config={"hidden_size": 32, "intermediate_size": 8, "projector_hidden_size": 24},
    ),
    "granite4_vision": multimodal(
        "granite4_vision",
        text={**_GRANITE, "num_hidden_layers": 4},
        vision={**_SIGLIP, "hidden_size": 64},
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2, 3],
        qformer_config={"num_hidden_layers": 1},
    ),
    "nemo_speechlm": multimodal(
        "nemo_speechlm",
        text=_NEMOTRON_H,
        audio_config={
            "diarization_config": {
                "audio_config": {"hidden_size": 16},
                "head_config": {"audio_hidden_size": 16},
            }
        },
        word_timestamp_config={"blank_token_id": 31},
    ),
    "gpt_neox_japanese": text_model("gpt_neox_japanese"),
    "openai_gpt": text_model("openai-gpt"),
    "gpt_sw3": text_model("gpt-sw3"),
    "ctrl": text_model("ctrl"),
    "cohere_compass_text": text_model(
        "cohere_compass_text", rope_parameters={SLIDING: _MROPE, FULL: _MROPE}, logit_scale=0.25, **_WINDOWS
    ),
    "gemma4_unified_text": text_model("gemma4_unified_text", **_GEMMA4_WINDOWS),
    "llama4_text": text_model("llama4_text", intermediate_size_mlp=48),
    # -- published in the second half of 2026, and others for pictures or sound
    "qwen4_exp": multimodal("qwen4_exp", text=_QWEN4_EXP, vision=_QWEN_VISION),
    "qwen4_exp_text": text_model("qwen4_exp_text", **_QWEN4_EXP),
    "dots3_note": multimodal(
        "dots3_note",
        text=_DOTS3,
        vision={
            "patch_size": 14,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
        },
        audio_config={
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
            "feature_size": 8,
            "downsample_hidden_size": 8,
        },
    ),
    "dots3_note_text": text_model("dots3_note_text", **_DOTS3),
    "muse_spark": multimodal(
        "muse_spark",
        text={
            **_WINDOWS,
            "layer_rope_theta": [10000.0, 0.0],
            "moe_hidden_size": 24,
            "mlp_layer_types": ["sparse", "sparse"],
        },
        vision={"patch_size": 14},
        audio_config={
            "patch_sizes": [4, 4],
            "hidden_sizes": [16, 16],
            "depths": [1, 1],
            "out_hidden_size": 32,
        },
        out_hidden_size=32,
        projector_hidden_size=16,
    ),
    "inkling": multimodal(
        "inkling_mm_model",
        text=_INKLING,
        vision={"patch_size": 8, "text_hidden_size": 32},
        audio_config={"text_hidden_size": 32, "mel_vocab_size": 8, "n_mel_bins": 8},
    ),
    "inkling2": multimodal(
        "inkling2",
        text=_INKLING2,
        vision={
            "patch_size": 14,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 16,
            "text_hidden_size": 32,
        },
    ),
    "minimax_m3_text": text_model("minimax_m3_vl_text", **_MINIMAX_M3),
    "qwen3_omni_thinker": multimodal(
        "qwen3_omni_moe_thinker",
        text={"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        vision={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        audio_config={"downsample_hidden_size": 8},
        vision_start_token_id=VISION_START,
    ),
    "deepseek_vl_hybrid": multimodal(
        "deepseek_vl_hybrid",
        text={"model_type": "llama"},
        vision={"patch_size": 14},
        high_res_vision_config={**_SAM, "num_pos_feats": 8},
    ),
    "deepseek_ocr2": multimodal(
        "deepseek_ocr2",
        text={"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4},
        vision={
            "sam_config": {**_SAM, "downsample_channels": [8, 16]},
            "encoder_config": {"num_key_value_heads": 2, "layer_types": [FULL, FULL]},
        },
    ),
    "unlimited_ocr": multimodal(
        "unlimited_ocr",
        text={
            "mlp_layer_types": ["dense", "sparse"],
            "num_key_value_heads": 4,
            "sliding_window": 8,
            "layer_types": ["reference_sliding_attention"] * 2,
        },
        vision={
            "sam_config": {**_SAM, "downsample_channels": [8, 16]},
            "encoder_config": {"patch_size": 14},
        },
    ),
    "aria_text": text_model("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "janus": multimodal(
        "janus",
        text={"model_type": "llama"},
        vision={"patch_size": 14, "projection_dim": 32},
        vq_config={**_TINY_VQ, "projection_dim": 32, "image_token_embed_dim": 32},
    ),
    "vibevoice_asr": multimodal(
        "vibevoice_asr",
        text={"model_type": "qwen2"},
        semantic_tokenizer_encoder_config=_TINY_CODEC,
        acoustic_tokenizer_encoder_config=_TINY_CODEC,
    ),
}

REFUSED: dict[str, TinyFamily] = {
    "paligemma": multimodal("paligemma", vision=_SIGLIP, hidden_size=32, projection_dim=32),
    "blip2": multimodal("blip-2", text={"ffn_dim": 48, "word_embed_proj_dim": 32}, vision=_SIGLIP),
    "instructblip": multimodal(
        "instructblip", text={"ffn_dim": 48, "word_embed_proj_dim": 32}, vision=_SIGLIP
    ),
    "kosmos2": multimodal("kosmos-2"),
    "voxtral_realtime": multimodal("voxtral_realtime"),
    "qwen2_5_omni": multimodal(
        "qwen2_5_omni",
        thinker_config={
            "text_config": {"rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1]},
        },
        enable_audio_output=False,
    ),
}
"""Families that are refused when they are loaded, with a reason."""

WITHOUT_ROW: dict[str, str] = {
    "An encoder reads the whole prompt, so they do not continue a text": "bart bigbird_pegasus blenderbot "
    "blenderbot-small canary cohere_asr dia encoder-decoder florence2 fsmt led longt5 m2m_100 marian mbart "
    "moonshine moonshine_streaming mt5 musicgen musicgen_melody mvp nllb-moe pegasus pegasus_x pix2struct "
    "plbart pop2piano pp_formulanet prophetnet seamless_m4t seamless_m4t_v2 speech-encoder-decoder "
    "speech_to_text speecht5 switch_transformers t5 t5gemma t5gemma2 trocr udop umt5 "
    "vision-encoder-decoder whisper",
    "Encoders with a class that continues text, which no chat model was published in; not tried": "bert "
    "bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    "Decoders older than chat models, or that read bytes; not tried": "blt cpmant reformer xlm xlnet",
    "They write sound, or move robots": "moshi pi0 vibevoice",
    "Text follows sound, step by step; not tried": "kyutai_speech_to_text",
    "Captions and answers about pictures, videos and proteins; not tried on text alone": "blip evolla git "
    "idefics instructblipvideo",
    "A block of text is written at once, by diffusion": "diffusion_gemma",
    "Drafts for another model, whose states they read": "gemma4_assistant gemma4_unified_assistant",
    "Their towers need timm and torchvision, which the environment of the tests does not have": "fast_vlm "
    "gemma3n perception_lm",
    "Their class has a row under another name": "pp_chart2table shieldgemma2",
    "It joins several models, and is refused with how to save the part that has a row": "qwen3_omni_moe",
}
"""The model types of transformers with a class that writes text, and why they have no row, by reason."""
