"""Chat templates and tokenizers of well-known models: equivalents, and published files if installed.

`tests/templates` holds a template for each format, written for these tests.
`tests/renderers/test_published.py` compares each with the one its model was published with. The tokenizers
are trained in-process. They split, normalise and frame text like the published ones, and have the same
control tokens, with small vocabularies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[1] / "templates"
PUBLISHED_TOKENIZERS = Path(
    os.environ.get("COOKBOOK_TOKENIZERS") or Path(__file__).parents[3] / "shared" / "tokenizers"
)
PUBLISHED_TEMPLATES = PUBLISHED_TOKENIZERS.parent / "chat_templates"

CORPUS = [
    "user\nWhat is the weather in Paris today? assistant\n\nIt is sunny, and 22 degrees.\n\n",
    "system\nYou are a helpful assistant.\nuser\n  hello   hello\n\n\nassistant\nHello! How can I help you?",
    "<think>\nLet me think about the question.\n</think>\n\nThe answer is 42. tool <tool_call> {} [] (1, 2)",
    "The capital of France is Paris, isn't it? They're 1234 km apart. naïve café, 東京の天気",
    '{"name": "weather", "arguments": {"city": "Oslo"}}\n{"type": "function", "parameters": {}}',
] * 4


def template(name: str) -> str:
    """Returns the source of this repository's own template for a format."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def published_template(name: str) -> str:
    """Returns the source of the template that a model was published with. Skips the test if there is none."""
    path = PUBLISHED_TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"needs {path}; set COOKBOOK_TOKENIZERS to the folder of published tokenizers next to it")
    return path.read_text(encoding="utf-8")


@cache
def published_tokenizer(name: str) -> Any:
    """Returns a tokenizer as it was published. Skips the test if there is none."""
    if not (PUBLISHED_TOKENIZERS / name).is_dir():
        pytest.skip(f"needs {PUBLISHED_TOKENIZERS / name}; set COOKBOOK_TOKENIZERS to a folder that has it")
    return AutoTokenizer.from_pretrained(PUBLISHED_TOKENIZERS / name)


@cache
def tokenizer(name: str) -> Any:
    """Returns a small tokenizer like the published `qwen3`, `llama3_1` or `glm`, with its chat template."""
    return _BUILDERS[name]()


def byte_level_bpe(
    numbers: str, vocab_size: int = 700, ignore_merges: bool = False, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """Returns a byte-level BPE trained on `CORPUS`. `numbers` is the regex for a run of digits."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _with_template(backend: Tokenizer, name: str, **special_tokens: str) -> Any:
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )
    built.chat_template = template(name)
    return built


def _qwen3() -> Any:
    backend = byte_level_bpe(r"\p{N}")
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = [f"<{mark}{tag}>" for tag in ("tool_call", "tool_response", "think") for mark in ("", "/")]
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return _with_template(backend, "qwen3", eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3_1() -> Any:
    bos = "<|begin_of_text|>"
    backend = byte_level_bpe(r"\p{N}{1,3}", ignore_merges=True)
    backend.add_special_tokens(
        [
            bos,
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ]
    )
    framed = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), framed])
    return _with_template(
        backend, "llama3_1", bos_token=bos, eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>"
    )


def _glm() -> Any:
    backend = byte_level_bpe(r"\p{N}{1,3}")
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant", "observation")]
    backend.add_special_tokens(["<|endoftext|>", "[gMASK]", "<sop>", *roles, "/nothink"])
    names = ("think", "tool_call", "tool_response", "arg_key", "arg_value")
    tags = [f"<{mark}{tag}>" for tag in names for mark in ("", "/")]
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return _with_template(backend, "glm4_5", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


_BUILDERS: dict[str, Callable[[], Any]] = {"qwen3": _qwen3, "llama3_1": _llama3_1, "glm": _glm}
