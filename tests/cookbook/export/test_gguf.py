"""GGUF files, read with llama.cpp's own reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_formats
import numpy as np
import pytest
import torch
from outside_world import remove_package
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cookbook.errors import ConfigError
from cookbook.export import gguf_weights, llama_quantize
from cookbook.export.chat_format import chat_format_of, find_chat_format
from cookbook.export.gguf_vocabulary import pre_tokenizer_name
from cookbook.export.merge import base_model_folder, merged_weights
from cookbook.export.updates import read_updates
from cookbook.runs.find import find_trained_model

gguf = pytest.importorskip("gguf")

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "rope_parameters": ROPE, "attention_bias": True},
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def name_there(name: str) -> str:
    """Returns transformers' name of a weight by llama.cpp's name, from its documentation of the format."""
    if not name.startswith("blk."):
        stem, kind = name.rsplit(".", 1)
        return f"{TOP[stem]}.{kind}"
    _, layer, stem, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[stem]}.{kind}"


def values_of(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def numbers_of(tensor: Any) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def with_neighbours_paired(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Interleaves the rows of the two halves of each head."""
    rows = []
    for head in weight.chunk(num_heads):
        half = len(head) // 2
        for i in range(half):
            rows += [head[i], head[half + i]]
    return torch.stack(rows)


@pytest.fixture(params=FAMILIES, scope="module")
def written(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model_folder: Callable[..., Path],
    make_adapted: Callable[..., Any],
) -> tuple[str, Path, Any, Path]:
    """A family, its base, the weights merged by PEFT, and a folder with GGUF files of all types."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_model_folder(folder / "base", **FAMILIES[request.param])
    adapted = make_adapted(base, folder / "adapter")
    source = find_trained_model(str(folder / "adapter"))
    chat_format, config = find_chat_format(source), AutoConfig.from_pretrained(base)
    assert gguf_weights.why_not(config, chat_format.tokenizer) is None
    weights = merged_weights(source, base_model_folder(source))
    for kind in ("f32", "f16", "bf16", "q8_0"):
        gguf_weights.write_model(weights, config, chat_format, folder / f"{kind}.gguf", kind, "tuned")
    return request.param, base, _merged_by_peft(adapted), folder


def _merged_by_peft(adapted: Any) -> dict[str, torch.Tensor]:
    """Returns weights by name, with a tied head separate: PEFT's merge would change the embeddings too."""
    truth = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            truth[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    for name, weight in adapted.base_model.model.state_dict().items():
        if "lora_" not in name:
            truth.setdefault(name.replace(".base_layer.", "."), weight)
    return {name: weight.detach() for name, weight in truth.items()}


def test_every_tensor_equals_that_of_the_merged_model(written: tuple[str, Path, Any, Path]) -> None:
    family, _, truth, folder = written
    heads = {"q_proj": 4, "k_proj": 2}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "f32.gguf").tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    assert (factors is not None) == (family == "llama")
    assert {name_there(name) for name in tensors} == truth.keys()
    for name, tensor in tensors.items():
        expected = truth[name_there(name)]
        module = name_there(name).split(".")[-2]
        if family == "llama" and module in heads:
            expected = with_neighbours_paired(expected, heads[module])
        assert list(tensor.shape) == list(reversed(expected.shape))  # GGUF lists the fastest axis first
        np.testing.assert_allclose(numbers_of(tensor), expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2**-10), ("bf16", 2**-7), ("q8_0", 2**-6)])
def test_smaller_types_round_the_numbers_and_keep_vectors_in_float32(
    written: tuple[str, Path, Any, Path], kind: str, tolerance: float
) -> None:
    folder = written[3]
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "f32.gguf").tensors}
    small = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / f"{kind}.gguf").tensors}
    assert small.keys() == exact.keys()
    for name, tensor in small.items():
        is_vector = len(tensor.shape) == 1
        assert tensor.tensor_type.name == ("F32" if is_vector else kind.upper())
        truth = numbers_of(exact[name])
        largest = np.abs(truth).max()
        np.testing.assert_allclose(numbers_of(tensor), truth, atol=0 if is_vector else tolerance * largest)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(llama_quantize.PROGRAM) is None, reason="llama-quantize is not on the path")
def test_the_tool_of_llama_cpp_reads_the_file(written: tuple[str, Path, Any, Path], tmp_path: Path) -> None:
    """The values of a block are an eighth of its largest number apart."""
    larger = Path(shutil.copy(written[3] / "f32.gguf", tmp_path / "f32.gguf"))
    smaller = llama_quantize.quantize(larger, "q4_0")
    assert smaller is not None
    exact = {tensor.name: numbers_of(tensor) for tensor in gguf.GGUFReader(larger).tensors}
    rounded = {tensor.name: numbers_of(tensor) for tensor in gguf.GGUFReader(smaller).tensors}
    assert rounded.keys() == exact.keys()
    for name, numbers in exact.items():
        np.testing.assert_allclose(rounded[name], numbers, rtol=0, atol=abs(numbers).max() / 8)
    assert any((rounded[name] != numbers).any() for name, numbers in exact.items())


def test_the_hyperparameters_are_those_of_the_config(written: tuple[str, Path, Any, Path]) -> None:
    family, base, _, folder = written
    reader = gguf.GGUFReader(folder / "f32.gguf")
    config = AutoConfig.from_pretrained(base)
    assert values_of(reader, "general.architecture") == family
    expected = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": config.head_dim if family != "qwen2" else 8,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    assert {key: values_of(reader, f"{family}.{key}") for key in expected} == expected


def test_tokens_types_and_merges_are_those_of_the_tokenizer(
    written: tuple[str, Path, Any, Path],
) -> None:
    family, base, _, folder = written  # transformers replaces the pre-tokenizer of every Qwen2
    reader, tokenizer = gguf.GGUFReader(folder / "f32.gguf"), AutoTokenizer.from_pretrained(base)
    tokens = values_of(reader, "tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = values_of(reader, "tokenizer.ggml.token_type")
    special = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert (
        special == sorted([*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|im_start|>")])[:3]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert values_of(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert values_of(reader, "tokenizer.ggml.pre") == ("qwen2" if family == "qwen2" else "gpt-2")
    assert values_of(reader, "tokenizer.ggml.eos_token_id") == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert values_of(reader, "tokenizer.chat_template") == tokenizer.chat_template
    assert values_of(reader, "tokenizer.ggml.add_bos_token") is False


def test_rows_beyond_the_vocabulary_are_marked_unused(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base", vocab_size=416)
    make_adapted(base, tmp_path / "adapter")
    source = find_trained_model(str(tmp_path / "adapter"))
    weights = merged_weights(source, base)
    config = AutoConfig.from_pretrained(base)
    gguf_weights.write_model(weights, config, find_chat_format(source), tmp_path / "x.gguf", "auto", "x")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert values_of(reader, "tokenizer.ggml.tokens")[400:] == [f"[PAD{i}]" for i in range(400, 416)]
    assert set(values_of(reader, "tokenizer.ggml.token_type")[400:]) == {gguf.TokenType.UNUSED}


def test_scaled_rope_frequencies_are_those_of_transformers(written: tuple[str, Path, Any, Path]) -> None:
    family, base, _, folder = written
    factors = [t for t in gguf.GGUFReader(folder / "f32.gguf").tensors if t.name == "rope_freqs.weight"]
    assert len(factors) == (family == "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    for tensor in factors:
        stretched = model.model.rotary_emb.inv_freq.numpy()
        np.testing.assert_allclose(plain / tensor.data, stretched, rtol=1e-6)


def test_an_adapter_is_written_in_the_weight_order_of_llama_cpp(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapted = make_adapted(base, tmp_path / "adapter")
    source = find_trained_model(str(tmp_path / "adapter"))
    config, adapter = AutoConfig.from_pretrained(base), read_updates(source)
    gguf_weights.write_adapter(adapter, config, tmp_path / "adapter.gguf", source.info.lora.alpha, "tuned")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert values_of(reader, "general.type") == "adapter"
    assert values_of(reader, "adapter.type") == "lora"
    assert values_of(reader, "adapter.lora.alpha") == 6
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    merged = adapted.merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(names) == 2 * 7 + 1
    assert len(tensors) == 2 * len(names)
    for name in names:
        there = name_there(name)
        change = merged[there] - plain[there]
        if "_proj" in there and there.split(".")[-2] in ("q_proj", "k_proj"):
            change = with_neighbours_paired(change, 4 if "q_proj" in there else 2)
        product = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]  # alpha / rank = 6 / 4
        torch.testing.assert_close(6 / 4 * product, change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model_type": "gemma2", "query_pre_attn_scalar": 8}, "Gemma2ForCausalLM"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding-window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ],
)
def test_an_architecture_that_was_not_compared_with_llama_cpp_is_not_supported(
    make_model_folder: Callable[..., Path], tmp_path: Path, overrides: dict[str, Any], reason: str
) -> None:
    base = make_model_folder(tmp_path / "base", **overrides)
    found = gguf_weights.why_not(AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    assert reason in str(found)


@pytest.mark.parametrize(("name", "expected"), [("qwen3", "qwen2"), ("llama3_1", "llama-bpe")])
@pytest.mark.parametrize(
    "load",
    [
        chat_formats.tokenizer,
        pytest.param(chat_formats.published_tokenizer, marks=pytest.mark.published),
    ],
)
def test_a_pre_tokenizer_is_identified_by_its_regular_expression(
    load: Callable[[str], Any], name: str, expected: str
) -> None:
    assert pre_tokenizer_name(load(name)) == expected


def test_a_tokenizer_with_another_pre_tokenizer_is_not_supported(tiny_tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    assert pre_tokenizer_name(tiny_tokenizer) == "gpt-2"
    tiny_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pre_tokenizer_name(tiny_tokenizer) is None


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_package(monkeypatch, "gguf")
    with pytest.raises(ConfigError, match=r"pip install 'sft-cookbook\[gguf\]'"):
        gguf_weights.package()


def test_all_stop_tokens_are_written(tokenizer_of: Callable[[str], Any], tmp_path: Path) -> None:
    from cookbook.export.gguf_vocabulary import add_vocabulary

    chat_format = chat_format_of("gpt_oss", tokenizer_of("gpt_oss"))
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_vocabulary(writer, chat_format, len(chat_format.tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "vocabulary.gguf")
    found = [values_of(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    assert found == list(chat_format.stop_token_ids)
