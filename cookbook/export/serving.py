"""Formats the commands that serve an export for a terminal of 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cookbook.export.chat_format import ChatFormat
from cookbook.runs.find import TrainedModel

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank accepts."""

WIDTH = 79


def command(words: Sequence[str]) -> str:
    """Returns a shell command, broken into lines with backslashes if it is long."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"  # an option with its value
        else:
            parts.append(word)
    lines = [""]
    for word in parts:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > WIDTH:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def vllm_merged(folder: str) -> str:
    return command(["vllm", "serve", folder, "--chat-template", f"{folder}/chat_template.jinja"])


def vllm_adapter(source: TrainedModel, base: str, folder: str, name: str) -> str | None:
    """Returns the command, or None if vLLM does not support the adapter."""
    rank = _largest_rank(source)
    served = next((limit for limit in _VLLM_RANKS if limit >= rank), None)
    if served is None or _unserved_parts(source):
        return None
    return command(
        [
            *("vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={folder}"),
            *("--max-lora-rank", str(served), "--chat-template", f"{folder}/chat_template.jinja"),
        ]
    )


def _largest_rank(source: TrainedModel) -> int:
    """Returns the largest rank of the adapter's layers."""
    peft = source.info.lora.peft
    return max([source.info.lora.rank, *(peft.explicit["rank_pattern"].values() if peft else ())])


def _unserved_parts(source: TrainedModel) -> list[str]:
    """Returns the settings of the adapter that vLLM refuses."""
    peft = source.info.lora.peft
    settings = ("modules_to_save", "trainable_token_indices", "use_dora")
    return [name for name in settings if peft is not None and peft.explicit[name]]


def vllm_notes(source: TrainedModel, chat_format: ChatFormat, is_adapter: bool) -> list[str]:
    """Returns notes for users of vLLM on settings that avoid errors and endless replies."""
    notes = []
    if is_adapter and (unserved := _unserved_parts(source)):
        notes.append(f"vLLM serves no adapter with {unserved[0]}: export format=merged for it.")
    elif is_adapter and _largest_rank(source) > _VLLM_RANKS[-1]:
        notes.append(f"vLLM serves adapters of rank {_VLLM_RANKS[-1]} at most: export format=merged for it.")
    elif is_adapter and source.info.lora.train_unembed:
        notes.append(
            "This adapter is on the projection to the vocabulary (lm_head) too. vLLM takes that for a few "
            "architectures, Llama among them, and refuses it for others: export format=merged for those."
        )
    if chat_format.stop_strings:
        stops = ", ".join(repr(stop) for stop in chat_format.stop_strings)
        notes.append(f"Every request to vLLM must name what ends a reply: stop=[{stops}].")
    return notes
