"""Small models with adapters created by PEFT, a run, and every renderer with its template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import chat_formats
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cookbook import embedded
from cookbook.data import NamedChatDatasetBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.export.chat_format import ChatFormat, chat_format_of
from cookbook.supervised import train

SYSTEM_PROMPT = 'You are a "pirate" {{ of }}\nfew words \\ 🦜.'
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _adapted(base: Path, folder: Path, targets: list[str] | None = None) -> Any:
    """Returns a PEFT model with a LoRA of large effect, which is also saved in the folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets or [*LINEAR, "lm_head"]
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.fixture(scope="session")
def make_adapted() -> Callable[..., Any]:
    """A function of (base, folder, targets) that returns a PEFT model and saves it with PEFT."""
    return _adapted


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of the embedded model, with a system prompt."""
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    rows = embedded.PIRATE_PATH.read_text(encoding="utf-8").splitlines()[:40]
    data = tmp_path_factory.mktemp("data") / "pirate.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = "cookbook/tiny-chat"
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, batch_size=4, system_prompt=SYSTEM_PROMPT
    )
    config = train.Config(
        log_path=str(folder),
        model_name=model,
        dataset_builder=NamedChatDatasetBuilder(dataset=str(data), common_config=common, test_size=8),
        system_prompt=SYSTEM_PROMPT,
        lora_rank=4,
        max_steps=4,
        save_every=2,
        eval_every=2,
    )
    asyncio.run(train.main(config))
    return folder


# -- chat formats -------------------------------------------------------------------------------

_LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_CHATML = ("", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
_GPT_OSS = (
    "<|startoftext|>",
    "<|return|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|constrain|>",
)
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

_GLM = (
    "", "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "/nothink", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
_KIMI = (
    "", "<|im_end|>", "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<think>", "</think>",
)  # fmt: skip
_GEMMA4 = (
    "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
)  # fmt: skip

FORMATS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3": ("qwen3", "qwen3", _CHATML),
    "qwen3_disable_thinking": ("qwen3_disable_thinking", "qwen3", _CHATML),
    "qwen3_instruct": ("qwen3_instruct", "qwen3_instruct_2507", _CHATML),
    "qwen2_5": ("qwen2_5", "qwen2_5", _CHATML),
    "llama3": ("llama3", "llama3", _LLAMA),
    "llama3_1": ("llama3", "llama3_1", _LLAMA),
    "llama3_2 by its template": ("chat_template", "llama3_2", _LLAMA),
    "gemma3": ("gemma3", "gemma3", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "phi3": ("phi3", "phi3", ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "gpt_oss": ("gpt_oss", "gptoss", _GPT_OSS),
    "gpt_oss_low": ("gpt_oss_low", "gptoss", _GPT_OSS),
    "gpt_oss_high": ("gpt_oss_high", "gptoss", _GPT_OSS),
    "deepseekv3": ("deepseekv3", "deepseekv3", _DEEPSEEK),
    "deepseekv3_thinking": ("deepseekv3_thinking", "deepseekv3", _DEEPSEEK),
    **{
        f"qwen3_5{mode}": (f"qwen3_5{mode}", "qwen3_5", _CHATML)
        for mode in ("", "_disable_thinking", "_preserve_thinking")
    },
    **{
        f"qwen3_6{mode}": (f"qwen3_6{mode}", "qwen3_6", _CHATML)
        for mode in ("", "_disable_thinking", "_preserve_thinking")
    },
    **{
        f"qwen3_8{mode}": (f"qwen3_8{mode}", "qwen3_8", _CHATML)
        for mode in ("", "_xhigh_reasoning", "_medium_reasoning", "_low_reasoning", "_disable_thinking")
    },
    **{name: (name, "qwen3_vl", _CHATML) for name in ("qwen3_vl", "qwen3_vl_instruct")},
    **{name: (name, "glm4_5", _GLM) for name in ("glm4_5", "glm4_5_disable_thinking")},
    **{name: (name, "glm5", _GLM) for name in ("glm5", "glm5_disable_thinking")},
    **{
        f"nemotron3{mode}": (f"nemotron3{mode}", "nemotron3_nano", _CHATML)
        for mode in ("", "_disable_thinking", "_preserve_thinking")
    },
    "kimi_k2": ("kimi_k2", "kimi_k2", _KIMI),
    **{
        name: (name, "kimi_k2_5", _KIMI)
        for name in ("kimi_k25", "kimi_k26", "kimi_k25_disable_thinking", "kimi_k26_disable_thinking")
    },
    "kimi_k26_preserve_thinking": ("kimi_k26_preserve_thinking", "kimi_k2_5", _KIMI),
    **{name: (name, "deepseek_v3_1", _DEEPSEEK) for name in ("deepseekv3_1", "deepseekv3_1_thinking")},
    **{
        f"{name} of {size}": (name, f"gemma4_{size}", _GEMMA4)
        for name in ("gemma4", "gemma4_thinking", "gemma4_preserve_thinking")
        for size in ("12b", "e2b")
    },
    "role_colon": ("role_colon", "", ("<s>", "</s>")),
    "role_colon over a template": ("role_colon", "qwen3", _CHATML),
}
"""By test name: the renderer, the name of the template, and BOS, EOS and other control tokens."""
_OTHERS = {
    "gemma3 under another template": (
        *("gemma3", "phi3"),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    )
}


@cache
def _tokenizer_of(name: str) -> Any:
    """Returns a tokenizer of bytes with the control tokens and the template of the format."""
    _, template, (bos, eos, *others) = (FORMATS | _OTHERS)[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in (bos, eos, *others) if token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos or None, eos_token=eos)
    tokenizer.chat_template = chat_formats.template(template) if template else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], Any]:
    """A function of a name in FORMATS that returns a tokenizer with its template."""
    return _tokenizer_of


@pytest.fixture(params=FORMATS, scope="session")
def formatted(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The name of a renderer and a tokenizer for it, for all renderers."""
    return FORMATS[request.param][0], _tokenizer_of(request.param)


@pytest.fixture(scope="session")
def format_of_each(formatted: tuple[str, Any]) -> ChatFormat:
    """The exported format of each `formatted`, without a system prompt."""
    return chat_format_of(*formatted)


@pytest.fixture(scope="session")
def exported_names() -> set[str]:
    """The names of the renderers in `formatted`."""
    return {name for name, _, _ in FORMATS.values()}


@pytest.fixture
def go_render(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], str]:
    """A function of (template, data) that returns what Go's text/template prints."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import go_template

    return go_template.render
