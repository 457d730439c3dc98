"""Tokens and masks of the last reply, compared with those of other packages' renderers.

`make peers` makes the environments of the packages; without them these tests are skipped.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import chat_formats
import pytest

from renderers import TrainOnWhat, get_renderer

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.published, pytest.mark.timeout(600)]

DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
MORE_TOKENS = {
    "deepseek": DEEPSEEK,
    "gemma4": (
        "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>",
        "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|image>", "<image|>",
    ),
    "glm": (
        "[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    ),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
}  # fmt: skip
"""Tokens that a template does not spell as the rest, BOS and EOS first, by a part of its name."""
TAG_NAMES = ("think", "tool_call", "tool_response", "arg_key", "arg_value")
TAGS = [f"<{mark}{tag}>" for tag in TAG_NAMES for mark in ("", "/")]
TAGS += ["<|endoftext|>"]
ASK: dict[str, Any] = {"role": "user", "content": "2 + 2?\n"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "It is 4. 天気"}
THOUGHT: dict[str, Any] = {**REPLY, "reasoning_content": "Two and two."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
PLAIN = [[SYSTEM, ASK, REPLY], [SYSTEM, ASK, REPLY, ASK, REPLY]]

CALL: dict[str, Any] = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
ASKED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT: dict[str, Any] = {
    "role": "tool", "name": "weather", "tool_call_id": "functions.weather:0", "content": "Rain."
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks up the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Which city"}},
                "required": ["city"],
            },
        },
    }
]
CALLED = [[SYSTEM, ASK, ASKED], [SYSTEM, ASK, ASKED, RESULT, REPLY]]
THOUGHT_AND_CALLED = [
    [SYSTEM, ASK, {**ASKED, "reasoning_content": "Look."}],
    [SYSTEM, ASK, {**ASKED, "reasoning_content": "Look."}, RESULT, THOUGHT],
]

# In these formats tinker-cookbook treats white space around a text otherwise than the templates do.
TRIMMED_ASK: dict[str, Any] = {"role": "user", "content": "2 + 2?"}
TRIMMED = [[SYSTEM, TRIMMED_ASK, REPLY], [SYSTEM, TRIMMED_ASK, REPLY, TRIMMED_ASK, REPLY]]

# Neither package has Gemma 3. `renderers` reads gpt-oss's vocabulary from the network, and tinker-cookbook
# prints today's date in it, so gpt-oss is not compared.
FAMILIES = [
    # peer, its renderer, ours, template, conversations
    ("renderers", "qwen3", "qwen3", "qwen3", PLAIN),
    ("renderers", "kimi-k2", "kimi_k2", "kimi_k2", PLAIN),
    # This peer prints a last reply as the template does, without its thinking, so thinking is not compared.
    ("renderers", "kimi-k2.5", "kimi_k25", "kimi_k2_5", PLAIN),
    ("renderers", "qwen3.5", "qwen3_5", "qwen3_5", [[SYSTEM, ASK, THOUGHT]]),
    ("renderers", "qwen3.6", "qwen3_6", "qwen3_6", [[SYSTEM, ASK, THOUGHT]]),
    ("renderers", "qwen3", "qwen3", "qwen3", CALLED),
    ("renderers", "qwen3.6", "qwen3_6", "qwen3_6", THOUGHT_AND_CALLED),
    ("renderers", "glm-4.5", "glm4_5", "glm4_5", [*PLAIN, [SYSTEM, ASK, THOUGHT], *THOUGHT_AND_CALLED]),
    ("renderers", "glm-5", "glm5", "glm5", [[SYSTEM, ASK, THOUGHT], *THOUGHT_AND_CALLED]),
    ("renderers", "nemotron-3", "nemotron3", "nemotron3_nano", [[SYSTEM, ASK, THOUGHT], *THOUGHT_AND_CALLED]),
    ("renderers", "llama-3", "llama3", "llama3_1", [*PLAIN, *CALLED]),
    ("renderers", "gemma4", "gemma4", "gemma4_e2b", [*PLAIN, *CALLED]),
    ("renderers", "gemma4", "gemma4", "gemma4_12b", [PLAIN[0], CALLED[0]]),
    ("renderers", "deepseek-v3", "deepseekv3", "deepseekv3", PLAIN),
    ("renderers", "qwen3-vl", "qwen3_vl", "qwen3_vl", [*PLAIN, *CALLED]),
    ("tinker-cookbook", "llama3", "llama3", "llama3", TRIMMED),
    ("tinker-cookbook", "nemotron3", "nemotron3", "nemotron3_nano", [[SYSTEM, TRIMMED_ASK, THOUGHT]]),
    (
        "tinker-cookbook",
        "nemotron3_disable_thinking",
        "nemotron3_disable_thinking",
        "nemotron3_nano",
        TRIMMED,
    ),
    ("tinker-cookbook", "qwen3_vl_instruct", "qwen3_vl_instruct", "qwen3_vl", PLAIN),
    ("tinker-cookbook", "qwen3_5", "qwen3_5", "qwen3_5", [[SYSTEM, ASK, THOUGHT]]),
    ("tinker-cookbook", "qwen3_instruct", "qwen3_instruct", "qwen3", PLAIN),
    ("tinker-cookbook", "kimi_k25", "kimi_k25", "kimi_k2_5", [*PLAIN, [SYSTEM, ASK, THOUGHT]]),
    ("tinker-cookbook", "kimi_k25_disable_thinking", "kimi_k25_disable_thinking", "kimi_k2_5", PLAIN),
    ("tinker-cookbook", "kimi_k2", "kimi_k2_thinking", "kimi_k2_5", [*PLAIN, [SYSTEM, ASK, THOUGHT]]),
    ("tinker-cookbook", "deepseekv3", "deepseekv3_1", "deepseek_v3_1", PLAIN),
    (
        "tinker-cookbook",
        "deepseekv3_thinking",
        "deepseekv3_1_thinking",
        "deepseek_v3_1",
        [[SYSTEM, ASK, THOUGHT]],
    ),
]

DIFFERENCES = {
    # The prompt of K2.5 ends with it, so the model never writes it; both peers train it all the same.
    ("renderers", "kimi-k2.5"): "<think>",
    ("renderers", "qwen3.5"): "<think>\n",  # likewise for Qwen3.5 and Qwen3.6
    ("renderers", "qwen3.6"): "<think>\n",
    ("renderers", "nemotron-3"): "<think>\n",
    ("renderers", "glm-5"): "<think>",
    # The empty channel of Gemma 4 12B is in the prompt not to think.
    ("renderers", "gemma4"): "<|channel>thought\n<channel|>",
    ("tinker-cookbook", "kimi_k25"): "<think>",
    ("tinker-cookbook", "kimi_k25_disable_thinking"): "<think></think>",
    # The same for the tag with which the prompt of DeepSeek V3.1 ends.
    ("tinker-cookbook", "deepseekv3"): "</think>",
    ("tinker-cookbook", "deepseekv3_thinking"): "<think>",
}
"""The text that a peer trains and the renderer here does not, with the reason."""


UNTRAINED = {
    # The prompt of GLM-4.5 ends before the newline, so the model writes it.
    ("renderers", "glm-4.5"): "\n",
}
"""The text that the renderer here trains and a peer does not, with the reason."""


@pytest.fixture(scope="module")
def load(small_tokenizer: Any) -> Any:
    def tokenizer_for(name: str) -> Any:
        if (chat_formats.PUBLISHED_TOKENIZERS / name).is_dir():
            return chat_formats.published_tokenizer(name)
        template = chat_formats.template(name) if name == "glm5" else chat_formats.published_template(name)
        found = {*re.findall(r"<[|｜][^<> ]*?[|｜]>", template), "<|tool_call_argument_begin|>"}
        more = next((MORE_TOKENS[kind] for kind in MORE_TOKENS if kind in name), ())
        tokenizer = small_tokenizer(template, tuple(sorted({*found, *more, *TAGS})))
        if more:
            tokenizer.bos_token, tokenizer.eos_token = more[:2]
        return tokenizer

    return tokenizer_for


def answers(peer: str, folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tokens and the masks of a package's renderer, run in the package's environment."""
    python = ROOT / f".venv-peers-{peer}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"needs {python.parents[1].name}: make peers")
    done = subprocess.run(
        [str(python), "-I", str(ROOT / "tests" / "helpers" / "peer.py"), peer.replace("-", "_")],
        input=json.dumps({"tokenizer": str(folder), "cases": cases}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _end_of_glm(reply: dict[str, Any]) -> str:
    """Returns the token that ends a turn of GLM. The peer prints none behind a last reply."""
    return "<|observation|>" if reply.get("tool_calls") else "<|user|>"


def tools_of(chat: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    return TOOLS if any(message.get("tool_calls") for message in chat) else None


@pytest.mark.parametrize(("peer", "theirs", "ours", "template", "chats"), FAMILIES)
def test_the_last_reply_has_the_tokens_and_the_mask_of_the_peer(
    load: Any, tmp_path: Path, peer: str, theirs: str, ours: str, template: str, chats: list[list[Any]]
) -> None:
    tokenizer = load(template)
    tokenizer.save_pretrained(tmp_path)
    renderer = get_renderer(ours, tokenizer)
    cases = [{"renderer": theirs, "messages": chat, "tools": tools_of(chat)} for chat in chats]
    for chat, answer in zip(chats, answers(peer, tmp_path, cases), strict=True):
        assert "error" not in answer, answer
        tokens, weights = renderer.build_supervised_examples(
            chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE, tools_of(chat)
        )[-1]
        ids = tokens.to_ints()
        # Behind the end of the turn some formats have a newline, which not every peer prints.
        theirs_T = answer["tokens"]
        more_text = tokenizer.decode(ids).rstrip("\n").removeprefix(tokenizer.decode(theirs_T).rstrip("\n"))
        assert more_text == (_end_of_glm(chat[-1]) if theirs.startswith("glm") else "")
        assert ids[: len(theirs_T)] == theirs_T[: len(ids)]
        mask = [bool(weight) for weight in weights]
        more = [i for i, trained in enumerate(answer["mask"][: len(ids)]) if trained and not mask[i]]
        less = [i for i, trained in enumerate(mask[: len(theirs_T)]) if trained and not answer["mask"][i]]
        assert tokenizer.decode([ids[i] for i in more]) in ("", DIFFERENCES.get((peer, theirs), ""))
        assert tokenizer.decode([ids[i] for i in less]) in ("", UNTRAINED.get((peer, theirs), ""))
