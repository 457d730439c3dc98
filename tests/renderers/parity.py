"""Compares every renderer with its model's published template and writes the table in renderers/README.md.

    PYTHONPATH=tests/helpers python tests/renderers/parity.py            prints the table
    PYTHONPATH=tests/helpers python tests/renderers/parity.py --write    writes it to renderers/README.md

The published files are read from COOKBOOK_TOKENIZERS (`chat_formats.py`). A cell represents some
conversations; for each of them

- the tokens of the last example are those of `apply_chat_template`, or if a token would span the end of a
  prompt and the start of a reply, those of the two encoded separately;
- the generation prompt of every trained turn is a prefix of the example that trains it;
- the trained text is what the template prints after that prompt, up to its end-of-turn token;
- `parse_response` of the trained tokens returns a message that renders to the same tokens again.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import chat_formats
import conftest

from cookbook.errors import RendererError
from renderers import Renderer, get_renderer
from renderers.formats.gpt_oss import CURRENT_DATE

README = Path(__file__).parents[2] / "renderers" / "README.md"
BEGIN, END = "<!-- parity: written by tests/renderers/parity.py -->", "<!-- end of parity -->"

EXACT, EXACT_AS_TEXT, REFUSED, UNPRINTABLE, WRONG = "=", "= (text)", "refused", "–", "WRONG"


@dataclass(frozen=True)
class Family:
    """A model's template, the renderers for it, and the form of messages that its template takes."""

    template: str
    renderers: Sequence[str]
    tokenizer: str | None = None
    thinking_key: str = "reasoning_content"
    arguments_as_text: bool = False
    prompt_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template for prompts and conversations; `prompt_options` are for prompts alone."""
    call_ids: bool = False
    """Whether the template prints ids of calls, which are then given as `functions.NAME:NUMBER`."""
    more_tokens: tuple[str, ...] = ()
    """The BOS and EOS tokens, and others that the template does not spell as the rest."""
    end_behind: Callable[[Mapping[str, Any]], str] = lambda reply: ""
    """The token that ends the turn of a last reply, where the template prints none."""
    inline_thinking: bool = False
    """Whether the template prints thinking only in the text of a reply, between tags of the tokenizer."""
    opening: str = ""
    """What the template prints at the end of its prompt, and not before the reply that follows it."""
    other_mode: tuple[str, Mapping[str, Any]] | None = None
    """The renderer, and the options of the template, whose prompt a reply without thinking follows."""


GEMMA4_TOKENS = (
    "<bos>", "<turn|>", "<|turn>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>",
)  # fmt: skip
GLM_TOKENS = ("[gMASK]", "<|endoftext|>", "<sop>")


def end_of_glm(reply: Mapping[str, Any]) -> str:
    """Returns the token that GLM ends a turn with: the one that begins the next message."""
    return "<|observation|>" if reply.get("tool_calls") else "<|user|>"


FAMILIES = {
    "Qwen3": Family("qwen3", ["qwen3", "chat_template"], "qwen3"),
    "Qwen3, not thinking": Family(
        "qwen3", ["qwen3_disable_thinking"], "qwen3", prompt_options={"enable_thinking": False}
    ),
    "Qwen3 Instruct 2507": Family(
        "qwen3_instruct_2507", ["qwen3_instruct", "chat_template"], "qwen3", inline_thinking=True
    ),
    "Qwen3.5": Family("qwen3_5", ["qwen3_5"], "qwen3"),
    "Qwen3.5, not thinking": Family(
        "qwen3_5", ["qwen3_5_disable_thinking"], "qwen3", prompt_options={"enable_thinking": False}
    ),
    "Qwen3.6": Family("qwen3_6", ["qwen3_6"], "qwen3"),
    "Qwen3.6, not thinking": Family(
        "qwen3_6", ["qwen3_6_disable_thinking"], "qwen3", prompt_options={"enable_thinking": False}
    ),
    "Qwen2.5": Family("qwen2_5", ["qwen2_5", "chat_template"], "qwen3", inline_thinking=True),
    "Qwen3-VL Instruct, text": Family("qwen3_vl", ["qwen3_vl"], "qwen3"),
    "GLM-4.5": Family("glm4_5", ["glm4_5"], more_tokens=GLM_TOKENS, end_behind=end_of_glm),
    "GLM-4.5, not thinking": Family(
        "glm4_5",
        ["glm4_5_disable_thinking"],
        options={"enable_thinking": False},
        more_tokens=GLM_TOKENS,
        end_behind=end_of_glm,
    ),
    "Nemotron 3 Nano": Family(
        "nemotron3_nano",
        ["nemotron3"],
        "qwen3",
        other_mode=("nemotron3_disable_thinking", {"enable_thinking": False}),
    ),
    "Nemotron 3 Nano, not thinking": Family(
        "nemotron3_nano", ["nemotron3_disable_thinking"], "qwen3", options={"enable_thinking": False}
    ),
    "Llama 3": Family("llama3", ["llama3", "chat_template"], "llama3_1"),
    "Llama 3.1": Family("llama3_1", ["llama3", "chat_template"], "llama3_1"),
    "Gemma 3": Family("gemma3", ["gemma3", "chat_template"]),
    "Gemma 4 E2B": Family("gemma4_e2b", ["gemma4"], more_tokens=GEMMA4_TOKENS),
    "Gemma 4 12B": Family(
        "gemma4_12b", ["gemma4"], more_tokens=GEMMA4_TOKENS, opening="<|channel>thought\n<channel|>"
    ),
    "Gemma 4 12B, thinking": Family(
        "gemma4_12b", ["gemma4_thinking"], options={"enable_thinking": True}, more_tokens=GEMMA4_TOKENS
    ),
    "Phi 3": Family("phi3", ["phi3", "chat_template"]),
    "DeepSeek V3": Family(
        "deepseekv3",
        ["deepseekv3"],
        arguments_as_text=True,
        more_tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ),
    "DeepSeek V3.1": Family(
        "deepseek_v3_1",
        ["deepseekv3_1"],
        arguments_as_text=True,
        more_tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ),
    "Kimi K2": Family("kimi_k2", ["kimi_k2"]),
    "Kimi K2.5, K2.6": Family(
        "kimi_k2_5", ["kimi_k25", "kimi_k26"], options={"preserve_thinking": True}, call_ids=True
    ),
    "Kimi K2.5, K2.6, not thinking": Family(
        "kimi_k2_5",
        ["kimi_k25_disable_thinking", "kimi_k26_disable_thinking"],
        options={"thinking": False},
        call_ids=True,
    ),
    "Kimi K2.6, all thinking kept": Family(
        "kimi_k2_5", ["kimi_k26_preserve_thinking"], options={"preserve_thinking": True}, call_ids=True
    ),
    "gpt-oss": Family("gptoss", ["gpt_oss", "chat_template"], thinking_key="thinking"),
}


# -- conversations ----------------------------------------------------------------------------


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, name: str = "weather") -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": text}


SYSTEM = {"role": "system", "content": "You are brief."}
TURNS = [message for n in range(6) for message in (user(f"What is {n} + {n}?"), reply(f"It is {2 * n}."))]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up the {name}.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Which city"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "time")
]
ASK = user("How is the weather in Oslo and in 東京?")
ONE = [call("weather", city="Oslo")]
TWO = [*ONE, call("weather", city="東京")]


@dataclass(frozen=True)
class Case:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def with_call_ids(
    messages: Sequence[Mapping[str, Any]], form: str = "functions.{name}:{number}"
) -> list[dict[str, Any]]:
    """Returns the messages with numbered ids of calls and, in their order, of the results."""
    ids: list[str] = []
    num_results = 0
    changed: list[dict[str, Any]] = []
    for message in messages:
        calls = [
            {**one, "id": form.format(name=one["function"]["name"], number=len(ids) + number)}
            for number, one in enumerate(message.get("tool_calls", []))
        ]
        ids += [str(one["id"]) for one in calls]
        more = {"tool_calls": calls} if calls else {}
        if message["role"] == "tool":
            more = {"tool_call_id": ids[num_results]}
            num_results += 1
        changed.append({**message, **more})
    return changed


def around(texts: Sequence[str]) -> list[Case]:
    """Returns conversations with each text as a user message, as a reply, and in the history."""
    return [Case([user(text), reply(text), user("Go on."), reply(f"{text}!")]) for text in texts]


FEATURES: Mapping[str, Sequence[Case]] = {
    "1 to 6 turns": [Case(TURNS[: 2 * n]) for n in range(1, 7)],
    "system": [Case([SYSTEM, *TURNS[: 2 * n]]) for n in (1, 3)],
    "thinking": [
        Case([user("2 + 2?"), reply("4", reasoning_content="Two and two.")]),
        Case([*TURNS[:2], user("2 + 2?"), reply("4", reasoning_content="Two\n\nand two.")]),
    ],
    "tools": [Case(TURNS[:2], TOOLS), Case([SYSTEM, *TURNS[:4]], TOOLS)],
    "tool call": [
        Case([ASK, reply("", tool_calls=ONE)], TOOLS),
        Case([ASK, reply("", tool_calls=ONE), result("Rain."), reply("It rains.")], TOOLS),
    ],
    "several calls": [Case([ASK, reply("", tool_calls=TWO)], TOOLS)],
    "several results": [
        Case([ASK, reply("", tool_calls=TWO), result("Rain."), result("Sun."), reply("Mixed.")], TOOLS)
    ],
    "parts": [
        Case(
            [
                user([{"type": "text", "text": "Two "}, {"type": "text", "text": "parts"}]),
                reply([{"type": "text", "text": "One part."}]),
            ]
        )
    ],
    "empty": around([""]),
    "white space": around([" a ", "\na\n", "\n\n  a", "a \n\n", "\ta\t", "   "]),
    "scripts": around(["😀 👩‍👩‍👧", "天気は？", "naïve Ωμέγα", "مرحبا"]),
    "spelled tokens": around(
        ["<|im_end|> <|eot_id|>!", "<end_of_turn>!", "<|end|><|return|>!", "<｜User｜>"]
    ),
}


# -- one check --------------------------------------------------------------------------------


class Reference:
    """Renders messages with a model's template. Template and tokenizer are the published ones by default."""

    def __init__(
        self,
        family: Family,
        template: Callable[[str], str] = chat_formats.published_template,
        tokenizer: Callable[[str], Any] = chat_formats.published_tokenizer,
    ) -> None:
        self._family = family
        self._source = template(family.template)
        if family.tokenizer is not None:
            self.tokenizer = copy.deepcopy(tokenizer(family.tokenizer))
            self.tokenizer.chat_template = self._source
        else:
            found = re.findall(r"<[|｜][^<> ]*?[|｜]>|<(?:start|end)_of_turn>", self._source)
            tokens = tuple(sorted({*found, *family.more_tokens}))
            self.tokenizer = copy.deepcopy(conftest.make_small_tokenizer(self._source, tokens))
            if family.more_tokens:
                self.tokenizer.bos_token, self.tokenizer.eos_token = family.more_tokens[:2]
        self._dated = self._source.replace('strftime_now("%Y-%m-%d")', f'"{CURRENT_DATE}"')

    @property
    def others(self) -> list[Renderer]:
        """The renderer of the other mode, if the family has one."""
        mode = self._family.other_mode
        return [get_renderer(mode[0], self.tokenizer)] if mode else []

    def text(
        self,
        case: Case,
        num_messages: int | None = None,
        prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        messages = [self._adapted(message) for message in case.messages[:num_messages]]
        if self._family.call_ids:
            messages = with_call_ids(messages)
        given = self._family.prompt_options if options is None and prompt else options or {}
        printed = self.tokenizer.apply_chat_template(
            messages,
            tools=case.tools,
            chat_template=self._dated,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._family.options,
            **given,
        )
        is_reply = messages[-1]["role"] == "assistant" and not prompt
        if is_reply and self._family.opening:
            before = self.text(case, len(messages) - 1, prompt=True)
            begun = before.removesuffix(self._family.opening)
            printed = before + printed[len(begun) :] if printed.startswith(begun) else printed
        return f"{printed}{self._family.end_behind(messages[-1]) if is_reply else ''}"

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        adapted = {**message}
        if isinstance(adapted["content"], list):
            adapted["content"] = "".join(part["text"] for part in adapted["content"])
        if "reasoning_content" in adapted and self._family.inline_thinking:
            thought = adapted.pop("reasoning_content")
            adapted["content"] = f"<think>\n{thought}\n</think>\n\n{adapted['content']}"
        if "reasoning_content" in adapted:
            adapted[self._family.thinking_key] = adapted.pop("reasoning_content")
        if self._family.arguments_as_text and "tool_calls" in adapted:
            adapted["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": one["function"]["name"],
                        "arguments": json.dumps(one["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for one in adapted["tool_calls"]
            ]
        return adapted

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_apart(self, text: str, case: Case) -> list[int]:
        """Returns the tokens of the text, with a border between tokens wherever a prompt ends."""
        turns = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
        modes = [None, self._family.other_mode[1]] if self._family.other_mode else [None]
        prompts = [self.text(case, index, prompt=True, options=mode) for index in turns for mode in modes]
        cuts = [0, *(len(prompt) for prompt in prompts if text.startswith(prompt)), len(text)]
        return [token for start, end in pairwise(cuts) for token in self.encode(text[start:end])]


def check(
    renderer: Renderer,
    reference: Reference,
    case: Case,
    spells_tokens: bool,
    others: Sequence[Renderer] = (),
) -> str:
    """Returns EXACT, or how the renderer differs. A turn's prompt may be that of one of the other modes."""
    try:
        whole = reference.text(case)
    except Exception:  # any error of the template
        return UNPRINTABLE
    try:
        examples = renderer.build_supervised_examples(case.messages, tools=case.tools)
    except RendererError:
        return REFUSED
    decode = reference.tokenizer.decode
    found = EXACT
    turns = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
    last = examples[-1][0].to_ints()
    if decode(last) != whole:
        return f"{WRONG}: text"
    if len(examples) not in (1, len(turns)):
        return f"{WRONG}: {len(examples)} examples of {len(turns)} turns"
    for number, index in enumerate(turns):
        model_input, weights = examples[min(number, len(examples) - 1)]
        tokens = model_input.to_ints()
        for prompted in (renderer, *others):
            prompt = prompted.build_generation_prompt(case.messages[:index], tools=case.tools).to_ints()
            if tokens[: len(prompt)] == prompt:
                break
        else:
            return f"{WRONG}: prompt"
        trained = [t for t, w in zip(tokens[len(prompt) :], weights[len(prompt) :], strict=True) if w]
        run = next((i for i, w in enumerate(weights[len(prompt) :]) if not w), len(trained))
        said = tokens[len(prompt) : len(prompt) + run]
        printed = reference.text(case, index + 1)[len(decode(prompt)) :]
        ends = renderer.get_stop_sequences()
        if not said or said[-1] not in ends or not printed.startswith(decode(said)):
            return f"{WRONG}: mask"
        if printed[len(decode(said)) :].strip() not in ("", str(reference.tokenizer.eos_token)):
            return f"{WRONG}: mask ends early"
        if any(weights[: len(prompt)]) and len(examples) > 1:
            return f"{WRONG}: mask before the turn"
        if not comes_back(prompted, case, index, prompt, said):
            if renderer.name != "chat_template":
                return f"{WRONG}: parsed as {prompted.parse_response(said)}"
            found = EXACT_AS_TEXT
    if not spells_tokens and last not in (reference.encode(whole), reference.encode_apart(whole, case)):
        return f"{WRONG}: tokens"
    return found


def comes_back(renderer: Renderer, case: Case, index: int, prompt: list[int], said: list[int]) -> bool:
    """Returns whether the message parsed from the tokens of a reply renders to the same tokens."""
    message, is_whole = renderer.parse_response(said)
    try:
        again = renderer.build_supervised_examples([*case.messages[:index], message], tools=case.tools)[-1]
    except RendererError:
        return False
    return is_whole and again[0].to_ints()[len(prompt) : len(prompt) + len(said)] == said


def cell(renderer: Renderer, reference: Reference, feature: str) -> str:
    found = [
        check(
            renderer,
            reference,
            # A format with calls and results but no descriptions of tools is compared without tools.
            case if renderer.takes_tools or feature == "tools" else replace(case, tools=None),
            spells_tokens=feature == "spelled tokens",
            others=reference.others,
        )
        for case in FEATURES[feature]
    ]
    wrong = [one for one in found if one.startswith(WRONG)]
    if wrong:
        return wrong[0]
    return next(kind for kind in (EXACT_AS_TEXT, EXACT, REFUSED, UNPRINTABLE) if kind in found)


def make_table() -> str:
    lines = [
        "| model | renderer | " + " | ".join(FEATURES) + " |",
        "|---|---|" + "---|" * len(FEATURES),
    ]
    for name, family in FAMILIES.items():
        reference = Reference(family)
        for renderer_name in family.renderers:
            try:
                renderer = get_renderer(renderer_name, reference.tokenizer)
            except RendererError:
                cells = [REFUSED] * len(FEATURES)
            else:
                cells = [cell(renderer, reference, feature) for feature in FEATURES]
            lines.append(f"| {name} | `{renderer_name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    table = make_table()
    print(table)
    if options.write:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    sys.exit(WRONG in table)


if __name__ == "__main__":
    main()
