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
TAGS = [f"<{mark}{tag}>" for tag in ("think", "tool_call", "tool_response") for mark in ("", "/")]
TAGS += ["<|endoftext|>"]
ASK: dict[str, Any] = {"role": "user", "content": "2 + 2?\n"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "It is 4. 天気"}
THOUGHT: dict[str, Any] = {**REPLY, "reasoning_content": "Two and two."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
PLAIN = [[SYSTEM, ASK, REPLY], [SYSTEM, ASK, REPLY, ASK, REPLY]]

FAMILIES = [
    # peer, its renderer, ours, template, conversations
    ("renderers", "qwen3", "qwen3", "qwen3", PLAIN),
    ("renderers", "kimi-k2", "kimi_k2", "kimi_k2", PLAIN),
    # This peer prints a last reply as the template does, without its thinking, so thinking is not compared.
    ("renderers", "kimi-k2.5", "kimi_k25", "kimi_k2_5", PLAIN),
    ("renderers", "qwen3.5", "qwen3_5", "qwen3_5", [[SYSTEM, ASK, THOUGHT]]),
    ("renderers", "qwen3.6", "qwen3_6", "qwen3_6", [[SYSTEM, ASK, THOUGHT]]),
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
    ("tinker-cookbook", "kimi_k25"): "<think>",
    ("tinker-cookbook", "kimi_k25_disable_thinking"): "<think></think>",
    # The same for the tag with which the prompt of DeepSeek V3.1 ends.
    ("tinker-cookbook", "deepseekv3"): "</think>",
    ("tinker-cookbook", "deepseekv3_thinking"): "<think>",
}
"""The text that a peer trains and the renderer here does not, with the reason."""


@pytest.fixture(scope="module")
def load(small_tokenizer: Any) -> Any:
    def tokenizer_for(name: str) -> Any:
        if (chat_formats.PUBLISHED_TOKENIZERS / name).is_dir():
            return chat_formats.published_tokenizer(name)
        template = chat_formats.published_template(name)
        found = {*re.findall(r"<[|｜][^<> ]*?[|｜]>", template), "<|tool_call_argument_begin|>"}
        tokens = {*found, *(DEEPSEEK if "deepseek" in name else ()), *TAGS}
        tokenizer = small_tokenizer(template, tuple(sorted(tokens)))
        if "deepseek" in name:
            tokenizer.bos_token, tokenizer.eos_token = DEEPSEEK[:2]
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


@pytest.mark.parametrize(("peer", "theirs", "ours", "template", "chats"), FAMILIES)
def test_the_last_reply_has_the_tokens_and_the_mask_of_the_peer(
    load: Any, tmp_path: Path, peer: str, theirs: str, ours: str, template: str, chats: list[list[Any]]
) -> None:
    tokenizer = load(template)
    tokenizer.save_pretrained(tmp_path)
    renderer = get_renderer(ours, tokenizer)
    cases = [{"renderer": theirs, "messages": chat} for chat in chats]
    for chat, answer in zip(chats, answers(peer, tmp_path, cases), strict=True):
        assert "error" not in answer, answer
        tokens, weights = renderer.build_supervised_examples(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)[-1]
        ids = tokens.to_ints()
        # Behind the end of the turn some formats have a newline, which not every peer prints.
        theirs_T = answer["tokens"]
        assert tokenizer.decode(ids).rstrip("\n") == tokenizer.decode(theirs_T).rstrip("\n")
        assert ids[: len(theirs_T)] == theirs_T[: len(ids)]
        mask = [bool(weight) for weight in weights]
        more = [i for i, trained in enumerate(answer["mask"][: len(ids)]) if trained and not mask[i]]
        less = [i for i, trained in enumerate(mask[: len(theirs_T)]) if trained and not answer["mask"][i]]
        assert tokenizer.decode([ids[i] for i in more]) in ("", DIFFERENCES.get((peer, theirs), ""))
        assert not less, tokenizer.decode([ids[i] for i in less])
