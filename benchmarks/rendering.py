"""Measures the CPU time of rendering relative to bare tokenizer calls on the same final texts.

    python -m benchmarks.rendering [--tokenizer FOLDER] [--data FILE.jsonl] [--renderers qwen3,chat_template]
    python -m benchmarks.rendering --peer [--tokenizer FOLDER]      (after `make peers`)

Every renderer that suits the tokenizer builds the examples of the same conversations one by one, in turns
with `tokenizer(texts, add_special_tokens=False)` on the texts of some hundred conversations at a time; both
run on one thread. Without `--data` the conversations are random: 1 to 4 turns, some with a system message,
about 200 tokens in all. A renderer skips conversations that its format does not support. `best` counts the
fastest round of every batch, which other load on the machine disturbs least.

`--peer` compares `qwen3` and `chat_template` with the package `renderers` of the index instead, which renders
each conversation as one sequence; here Qwen3's format makes an example of each reply. The peer runs in a
process of its own, in turns with this one. The tokenizer is that of the folder, or the embedded model's with
the tokens and the template of Qwen3.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the first use of a tokenizer
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
from tokenizers import AddedToken

from benchmarks import long_conversations
from cookbook import embedded
from cookbook.errors import RendererError
from cookbook.models import get_tokenizer
from cookbook.utils import pretrained
from renderers import Renderer, get_renderer, renderer_names

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv-peers-renderers" / "bin" / "python"
QWEN3_TEMPLATE = ROOT / "tests" / "templates" / "qwen3.jinja"
SEED = 0
PART = 250
WORDS = """
the of and to in a is that for it as was with be by on not he this are or his from at which but have an
had they you were their one all we can her has there been if more when will would who so no out up said
what its about into than them only other new some could time these two may then do first any my now such
like our over man me even most made after also did many before must through back years where much your way
well down should because each just those people how too little state good very make world still own see
men work long get here between both life being under never day same another know while last might us great
old year off come since against go came right used take three states himself few house use during without
again place around however home small found thought went say part once general high upon school every does
got united left number course war until always away something fact water though less public put think
almost hand enough far took head yet government system better set told nothing night end why function
return value string integer parameter example explain temperature machine learning language model question
answer table column database network protocol 42 2024 3.14 e.g. (see below) café naïve
""".split()  # noqa: SIM905


def made_up_conversations(num_conversations: int) -> list[list[dict[str, Any]]]:
    choose = random.Random(SEED)
    weights = [1 / (rank + 10) for rank in range(len(WORDS))]

    def text(num_words: int) -> str:
        words = choose.choices(WORDS, weights, k=max(num_words, 1))
        ends = choose.choices(["", ",", ".", "?", ".\n\n", ":\n- "], [40, 3, 3, 1, 1, 1], k=len(words))
        return " ".join(map(str.__add__, words, ends)).replace("\n ", "\n").capitalize()

    conversations = []
    for _ in range(num_conversations):
        num_turns = choose.choice([1, 1, 2, 3, 4])
        num_words = choose.lognormvariate(4.8, 0.5) / num_turns
        messages = [{"role": "system", "content": text(12)}] if choose.random() < 0.3 else []
        for _ in range(num_turns):
            messages.append({"role": "user", "content": text(round(num_words * 0.3))})
            messages.append({"role": "assistant", "content": text(round(num_words * 0.7))})
        conversations.append(messages)
    return conversations


def conversations_of(path: Path, num_conversations: int) -> list[list[dict[str, Any]]]:
    """Returns conversations of the file, repeated if it has too few."""
    rows = [
        json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return list(itertools.islice(itertools.cycle(rows), num_conversations))


def fitting_renderers(tokenizer: Any, names: list[str]) -> dict[str, Renderer]:
    renderers = {}
    for name in names:
        try:
            renderers[name] = get_renderer(name, tokenizer)
        except RendererError as error:
            print(f"{name} does not fit: {error}")
    return renderers


@dataclass
class TimedPart:
    """Some conversations that a renderer supports, and the texts of their examples."""

    conversations: list[Any]
    texts: list[str]


def parts_for(renderer: Renderer, conversations: list[Any]) -> list[TimedPart]:
    parts = []
    for start in range(0, len(conversations), PART):
        part = TimedPart([], [])
        for messages in conversations[start : start + PART]:
            try:
                examples = renderer.build_supervised_examples(messages)
            except RendererError:
                continue
            part.conversations.append(messages)
            part.texts += [renderer.tokenizer.decode(tokens.to_ints()) for tokens, _ in examples]
        parts.append(part)
    return parts


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def seconds_of_both(renderer: Renderer, parts: list[TimedPart]) -> np.ndarray:
    """Returns the CPU seconds of the bare tokenizer and of the renderer for each part, measured in turns."""
    seconds = np.zeros((2, len(parts)))
    for number, part in enumerate(parts):
        tokenize = functools.partial(renderer.tokenizer, part.texts, add_special_tokens=False)
        build = functools.partial(render_all, renderer, part.conversations)
        gc.collect()
        for side in (number % 2, 1 - number % 2):
            seconds[side, number] = seconds_of((tokenize, build)[side])
    return seconds


# -- beside the package `renderers` -----------------------------------------------------------


def qwen3_tokenizer() -> Any:
    """Returns the embedded model's tokenizer with the template of Qwen3, and the tokens that it prints."""
    tokenizer: Any = get_tokenizer(embedded.MODEL_NAME)
    tokenizer.chat_template = QWEN3_TEMPLATE.read_text(encoding="utf-8")
    tags = (f"<{mark}{name}>" for name in ("think", "tool_call", "tool_response") for mark in ("", "/"))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    return tokenizer


def compare_with_peer(tokenizer: Any, num_rounds: int) -> None:
    """Prints the peer's CPU seconds over ours, the median of the rounds, by kind of conversation."""
    chats = made_up_conversations(400)
    one_turn = [[{"role": "user", "content": "Go on."}, messages[-1]] for messages in chats]
    sets = {"one turn": one_turn, "1 to 4 turns": chats}
    for num_turns in (100, 400):
        sets[f"{num_turns} turns"] = [long_conversations.chat(2 * num_turns)]
    ours = fitting_renderers(tokenizer, ["qwen3", "chat_template"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        peer = subprocess.Popen(
            [str(PEER), "-I", str(Path(__file__).with_name("peer_renderers.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert peer.stdin is not None
        assert peer.stdout is not None
        asked = {"tokenizer": folder, "renderer": "qwen3", "sets": list(sets.values())}
        print(json.dumps(asked), file=peer.stdin, flush=True)
        print(f"{'conversations':<16}" + "".join(f"{name:>24}" for name in ours))
        for number, (kind, conversations) in enumerate(sets.items()):
            ratios: dict[str, list[float]] = {name: [] for name in ours}
            for turn in range(num_rounds + 1):  # the first one is for warming up
                print(number, file=peer.stdin, flush=True)
                theirs = float(peer.stdout.readline())
                for name, renderer in ours.items():
                    seconds = seconds_of(functools.partial(render_all, renderer, conversations))
                    ratios[name] += [theirs / seconds] if turn else []
            cells = (
                f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in ratios.values()
            )
            print(f"{kind:<16}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
        peer.stdin.close()
        peer.wait()


def render_all(renderer: Renderer, conversations: list[Any]) -> list[Any]:
    return [renderer.build_supervised_examples(messages) for messages in conversations]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", help="a folder with a tokenizer, in place of the embedded model's")
    parser.add_argument("--data", type=Path, help='rows of {"messages": [...]}')
    parser.add_argument("--renderers", default=",".join(renderer_names()))
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="compare with the package `renderers`")
    arguments = parser.parse_args()
    if arguments.peer:
        if not PEER.exists():
            raise SystemExit(f"{PEER} does not exist. Make the environment of the package: make peers")
        given = pretrained.load_tokenizer(arguments.tokenizer) if arguments.tokenizer else qwen3_tokenizer()
        compare_with_peer(given, arguments.rounds)
        return
    tokenizer: Any = (
        pretrained.load_tokenizer(arguments.tokenizer)
        if arguments.tokenizer
        else get_tokenizer(embedded.MODEL_NAME)
    )
    number = arguments.conversations
    conversations = (
        conversations_of(arguments.data, number) if arguments.data else made_up_conversations(number)
    )
    renderers = fitting_renderers(tokenizer, arguments.renderers.split(","))
    print(f"{number} conversations, medians of {arguments.rounds} rounds\n")
    print(
        f"{'renderer':<24} rendered  examples  tokens each  bare s  rendered s  ratio (rounds)         best"
    )
    for name, renderer in renderers.items():
        parts = parts_for(renderer, conversations)
        texts = [text for part in parts for text in part.texts]
        if not texts:
            print(f"{name:<24} refuses every conversation")
            continue
        num_tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        seconds = np.array([seconds_of_both(renderer, parts) for _ in range(arguments.rounds)])
        rounds = seconds.sum(axis=2)
        ratios = rounds[:, 1] / rounds[:, 0]
        bare, rendered = np.median(rounds, axis=0)
        best_bare, best_rendered = seconds.min(axis=0).sum(axis=1)
        num_rendered = sum(len(part.conversations) for part in parts)
        print(
            f"{name:<24} {num_rendered:>8}  {len(texts):>8}  {num_tokens / len(texts):>11.0f}  "
            f"{bare:>6.2f}  {rendered:>10.2f}  {rendered / bare:>5.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})  {best_rendered / best_bare:>5.2f}"
        )


if __name__ == "__main__":
    main()
