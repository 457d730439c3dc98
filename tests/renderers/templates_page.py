"""Tries the renderer `chat_template` on every published template, and writes docs/templates.md.

    PYTHONPATH=tests/helpers python tests/renderers/templates_page.py            prints the page
    PYTHONPATH=tests/helpers python tests/renderers/templates_page.py --write    writes it

The templates are read from the folder beside COOKBOOK_TOKENIZERS (`chat_formats.py`), each with a small
tokenizer that has its tokens. The truth is what transformers prints for the conversations of `parity.py`,
under each value of the variables in `VALUES`.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import chat_formats
import conftest
import parity
from outside_world import day_of_transformers
from tokenizers import AddedToken

from cookbook.errors import RendererError
from renderers import Renderer, get_renderer
from renderers.jinja.today import TODAY
from renderers.messages import to_json

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
EXACT, AS_TEXT, ADDED, REFUSED, UNPRINTABLE, WRONG = "=", "= (text)", "= (added)", "refused", "–", "WRONG"

VALUES: Mapping[str, Sequence[Any]] = {
    "enable_thinking": (None, True, False),
    "thinking": (None, True, False),
    "skip_think": (None, False),
    "preserve_thinking": (None, True),
}
"""The variables of these templates that change how a reply is printed, written by hand. None is not given."""

_SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"{}]*?[|｜]>|<\|[a-z_\"\\]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?[A-Z][A-Z_]+\]"
    r"|\]~!?b[\[\]]|\[e~\[|\[\|[a-z]+\|\]|</?seed:[a-z_]+>|\[gMASK\]|<sop>"
)
_ORDINARY = re.compile(r"</?(?:think|tool_call|tool_response|minimax:tool_call|arg_key|arg_value)>")
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "[e~[", "[|endofturn|]", "<seed:eos>", "<|return|>")
_ENDS += ("<|END_OF_TURN_TOKEN|>", "<|assistant_end|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>")

_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))

_INTRODUCTION = """# Published chat templates

Written by `make parity` (`tests/renderers/templates_page.py`), which tries the renderer `chat_template` on
each template, over the conversations of the table in [renderers/README.md](../renderers/README.md). Each
template has a small tokenizer with its tokens.

- `=` the text is that of `apply_chat_template`, under values of the template's own variables if it has any
  (`template_kwargs_of` returns them); every trained turn's generation prompt is the template's own, and a
  prefix of the example; the trained text is what the template prints after that prompt, up to the whole end
  of the turn; and it parses to a message that renders to the same text.
- `= (text)` the same, but the reply's markup stays in the content when it is parsed.
- `= (added)` the same, with text that the template does not print in a conversation that ends there: an end
  of turn that it prints with the next message, an empty thought that only its prompt has or opens, the end of
  an empty reply ([renderers/jinja/README.md](../renderers/jinja/README.md)).
- `refused` an error; its number is that of the reason below.
- `–` the template itself refuses such a conversation.
"""


def tokenizer_for(source: str) -> Any:
    """Returns a small tokenizer with the tokens that a template spells."""
    special = {*_SPECIAL.findall(source), "<s>"}
    eos = next((end for end in _ENDS if end in source), "</s>")
    if "<｜User｜>" in source:
        eos = "<｜end▁of▁sentence｜>"
    made = copy.deepcopy(conftest.make_small_tokenizer(source, tuple(sorted({*special, eos}))))
    made.add_tokens(
        [AddedToken(tag, normalized=False, special=False) for tag in sorted(set(_ORDINARY.findall(source)))]
    )
    made.bos_token, made.eos_token = "<s>", eos
    return made


class Truth:
    """What transformers prints for messages, under each setting of a template's variables."""

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source = source
        self._tokenizer = tokenizer
        known = {*tokenizer.get_vocab(), "<think>"}
        inline = [partial(_inline, tags=tags) for tags in _TAGS if tags[0] in known]
        self._forms = (_named, _with_json, _with_empty, _with_parts, _in_parts, *inline)
        names = [name for name in VALUES if re.search(rf"\b{name}\b", source)]
        self.settings: list[dict[str, Any]] = [
            {name: value for name, value in zip(names, chosen, strict=True) if value is not None}
            for chosen in product(*(VALUES[name] for name in names))
        ]

    def texts(
        self,
        messages: Sequence[Any],
        tools: Any,
        settings: Sequence[Mapping[str, Any]],
        prompt: bool = False,
    ) -> list[str]:
        """Returns what the template prints for each form in which the messages can be given.

        Raises what the template raises if it refuses every form.
        """
        printed: list[str] = []
        refusal: Exception | None = None
        for form, setting in product(self._forms, settings):
            try:
                with day_of_transformers(TODAY):
                    text = self._tokenizer.apply_chat_template(
                        [form(message) for message in messages],
                        tools=tools,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **setting,
                    )
            except Exception as error:  # whatever a template raises is its refusal
                refusal = refusal or error
            else:
                printed.append(str(text))
        if refusal is not None and not printed:
            raise refusal
        return printed


def _named(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], list):
        message = {**message, "content": "".join(part["text"] for part in message["content"])}
    thought = message.get("reasoning_content")
    if thought is None:
        return message
    return {**message, **dict.fromkeys(("thinking", "reasoning", "thought", "thinking_content"), thought)}


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    named = _named(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": to_json(call["function"]["arguments"])}}
        for call in named.get("tool_calls", ())
    ]
    return {**named, "tool_calls": calls} if calls else named


def _with_empty(message: dict[str, Any]) -> dict[str, Any]:
    return {"content": "", **_with_json(message)}


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a reply with its thinking as a part of the content."""
    if not message.get("reasoning_content"):
        return message
    thought = {"type": "thinking", "thinking": message["reasoning_content"]}
    return {**message, "content": [thought, {"type": "text", "text": message["content"]}]}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with its text as the only part of the content, which some templates need."""
    text = _named(message)["content"]
    return {**message, "content": [{"type": "text", "text": text}]} if text else message


def _inline(message: dict[str, Any], tags: tuple[str, str]) -> dict[str, Any]:
    """Returns a reply with its thinking in the text of the content."""
    if not message.get("reasoning_content"):
        return _named(message)
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    thought = f"{tags[0]}\n{message['reasoning_content']}\n{tags[1]}\n\n"
    return {**rest, "content": f"{thought}{message['content']}"}


def check(renderer: Renderer, truth: Truth, case: Any) -> tuple[str, str]:
    """Returns the kind of cell that a conversation gives, and the reason of a refusal."""
    is_kimi = "kimi" in truth.source.lower()  # its models have ids of this form, Mistral's of the other
    form = "functions.{name}:{number}" if is_kimi else "call{number:05}"
    messages = parity.with_call_ids(case.messages, form)
    tools = case.tools if renderer.takes_tools else None
    try:
        wholes = truth.texts(messages, tools, truth.settings)
    except Exception:
        return UNPRINTABLE, ""
    try:
        examples = renderer.build_supervised_examples(messages, tools=tools if tools else case.tools)
    except RendererError as error:
        return REFUSED, str(error)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(examples) not in (1, len(turns)):
        return f"{WRONG}: {len(examples)} examples of {len(turns)} turns", ""
    kinds = {
        _check_turn(renderer, truth, (messages, tools), index, examples[min(number, len(examples) - 1)])
        for number, index in enumerate(turns)
    }
    last = renderer.tokenizer.decode(examples[-1][0].to_ints())
    if last not in wholes:
        kinds.add(ADDED)
    for kind in sorted(kinds, key=lambda kind: not kind.startswith(WRONG)):
        if kind.startswith(WRONG):
            return kind, ""
    return next(kind for kind in (ADDED, AS_TEXT, EXACT) if kind in kinds), ""


def _check_turn(
    renderer: Renderer, truth: Truth, given: tuple[list[Any], Any], index: int, example: Any
) -> str:
    messages, tools = given
    decode = renderer.tokenizer.decode
    tokens, weights = example[0].to_ints(), example[1]
    variables = renderer.template_kwargs_of(messages[: index + 1], tools)
    sampled = renderer.with_template_kwargs(variables)
    prompt = sampled.build_generation_prompt(messages[:index], tools=tools).to_ints()
    if decode(prompt) not in truth.texts(messages[:index], tools, [variables], prompt=True):
        return f"{WRONG}: prompt"
    if tokens[: len(prompt)] != prompt:
        return f"{WRONG}: the prompt is no prefix"
    rest = weights[len(prompt) :]
    run = next((at for at, weight in enumerate(rest) if not weight), len(rest))
    said = tokens[len(prompt) : len(prompt) + run]
    stops = renderer.get_stop_sequences()
    if not said or weights[len(prompt) - 1] or said[-1] not in stops or set(said[:-1]) & set(stops):
        return f"{WRONG}: mask"
    message = _named(messages[index])
    # A prompt may have the tag that a reply's text begins with, and a template strip what is between tags.
    if not all(part.strip() in decode(said) for part in re.split("</?think>", message["content"])):
        return f"{WRONG}: the reply is not trained"
    printed = truth.texts(messages[: index + 1], tools, truth.settings)
    whole = decode([*prompt, *said])
    rests = [text[len(whole) :].strip() for text in printed if text.startswith(whole)]
    if rests and not {"", str(renderer.tokenizer.eos_token)}.intersection(rests):
        return f"{WRONG}: mask ends early"
    kind = EXACT if rests else ADDED
    found, is_whole = sampled.parse_response(said)
    if not is_whole:
        return f"{WRONG}: parsed as {found}"
    try:
        again = sampled.build_supervised_examples([*messages[:index], found], tools=tools)[-1]
    except RendererError:
        return AS_TEXT if kind == EXACT else kind
    is_back = again[0].to_ints()[len(prompt) : len(prompt) + len(said)] == said
    return kind if kind == ADDED or (is_back and _markup_is_parsed(messages[index], found)) else AS_TEXT


def _markup_is_parsed(message: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    fields = ("reasoning_content", "tool_calls")
    return all(bool(message.get(field)) <= bool(found.get(field)) for field in fields)


def make_page() -> str:
    lines = ["| template | " + " | ".join(parity.FEATURES) + " |", "|---|" + "---|" * len(parity.FEATURES)]
    reasons: dict[str, int] = {}
    for path in sorted(chat_formats.PUBLISHED_TEMPLATES.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        tokenizer = tokenizer_for(source)
        renderer = get_renderer("chat_template", tokenizer)
        truth = Truth(source, tokenizer)
        cells = [_cell(renderer, truth, cases, reasons) for cases in parity.FEATURES.values()]
        lines.append(f"| {path.stem} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([_INTRODUCTION, *lines, "", "## Reasons", "", *notes, ""])


def _cell(renderer: Renderer, truth: Truth, cases: Sequence[Any], reasons: dict[str, int]) -> str:
    found = [check(renderer, truth, case) for case in cases]
    kinds = [kind for kind, _ in found]
    if wrong := [kind for kind in kinds if kind.startswith(WRONG)]:
        return wrong[0]
    kind = next(kind for kind in (REFUSED, ADDED, AS_TEXT, EXACT, UNPRINTABLE) if kind in kinds)
    if kind != REFUSED:
        return kind
    numbers = sorted(
        {reasons.setdefault(_reason(why), len(reasons) + 1) for kind, why in found if kind == REFUSED}
    )
    return f"{REFUSED} ({', '.join(map(str, numbers))})"


def _reason(error: str) -> str:
    """Returns an error without what differs between conversations."""
    text = re.sub(r"message \d+", "a message", error.replace("\n", "\\n"))
    quoted = re.search(r"prompt ends with '(.*?)', but", text)
    if quoted is not None:
        markup = re.search(r"(?:<[^<>]*>){1,2}(?:\\n)*$", quoted[1])
        text = text.replace(f"'{quoted[1]}'", f"`{markup[0] if markup else quoted[1]}`")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    page = make_page()
    print(page)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    sys.exit(WRONG in page)


if __name__ == "__main__":
    main()
