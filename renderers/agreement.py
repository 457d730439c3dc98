"""Tells whether a renderer written in code prints the format of the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os.path import commonprefix
from typing import Any

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.jinja.template import Template
from renderers.messages import PlainMessage

_USER: PlainMessage = {"role": "user", "content": "Who are you?"}
_REPLY: PlainMessage = {"role": "assistant", "content": "A spoon."}
_CHATS = ([_USER], [_USER, _REPLY, _USER])

_MODES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
    {"thinking": False},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "medium"},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "xhigh"},
    {"preserve_thinking": True},
    {"low_effort": True},
)
"""Variables of published templates, whose modes have renderers of their own."""

_SHOWN = 60
"""The number of characters around a difference that are shown."""

_FRAME_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>")
_IGNORED_OPENING = {"deepseekv3": "<think>\n"}
"""The end of the template's prompt that a renderer leaves out on purpose, by its name."""


def disagreement(renderer: Renderer) -> str | None:
    """Returns a sentence on how a renderer differs from its tokenizer's format; None if nothing is known.

    The template may print the same in any of its modes.
    """
    if renderer.name == "chat_template":
        return None
    try:
        ours = [_prompt(renderer, chat) for chat in _CHATS]
    except RendererError:  # the format has no place for a conversation as plain as this
        return None
    vocabulary = renderer.tokenizer.get_vocab()
    missing = [token for token in _FRAME_TOKEN.findall(renderer.frame) if token not in vocabulary]
    if used := [token for token in missing if token in ours[-1]]:
        return f"its format has the token {used[0]}, which the tokenizer does not have"
    if not renderer.tokenizer.chat_template:
        return None
    ending = _IGNORED_OPENING.get(renderer.name, "")
    printed = [[text.removesuffix(ending) for text in prompts] for prompts in _prompts_of_template(renderer)]
    if not printed or ours in printed:
        return None
    pairs = zip(ours, printed[0], strict=True)
    one, other = next(pair for pair in pairs if pair[0] != pair[1])
    same = commonprefix([one, other])  # noqa: RUF071 - of characters, not of paths
    start = max(0, len(same) - _SHOWN // 2)
    shown, expected = (json.dumps(text[start : start + _SHOWN], ensure_ascii=False) for text in (one, other))
    return f"it prints {shown} where the tokenizer's chat template prints {expected}"


def warning_of(renderer: Renderer, model_name: str, recommended: str) -> str | None:
    """Returns a warning about a renderer that prints another format than its model's own; None without one.

    It says to use the `recommended` renderer, or the tokenizer's template if that is this one.
    """
    difference = disagreement(renderer)
    if difference is None:
        return None
    instead = "chat_template" if recommended == renderer.name else recommended
    return (
        f"Renderer `{renderer.name}` does not print the format of {model_name}: {difference}. "
        f"For this model use renderer_name={instead}."
    )


def _prompt(renderer: Renderer, chat: list[PlainMessage]) -> str:
    return _decoded(renderer, renderer.build_generation_prompt(chat).to_ints())  # type: ignore[arg-type]


def _decoded(renderer: Renderer, tokens: list[int]) -> str:
    text = renderer.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _prompts_of_template(renderer: Renderer) -> Iterator[list[str]]:
    """Yields the prompts for the chats in each mode of the template that prints them."""
    for mode in _MODES:
        template = Template(renderer.tokenizer, mode)
        if not mode.keys() <= template.variables_read:
            continue
        try:
            texts = [template.text(chat, prompt=True) for chat in _CHATS]
        except RendererError:
            continue
        encoded = [renderer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        yield [_decoded(renderer, tokens) for tokens in encoded]
