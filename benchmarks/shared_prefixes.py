"""Measures a training step on sequences that share beginnings: once for each beginning, or once for each
sequence.

    python -m benchmarks.shared_prefixes [--cases turns20 group] [--rounds 3] [--trl] [--hybrid lfm2] \
        --folder FOLDER

The model is that of `step_model`: Qwen3 with 4 layers, hidden size 256 and the real vocabulary, in float32.
With `--hybrid` it is a model of `hybrids`, of hidden size 128 or with `--wide` 1,024, on the same sequences
with ids of its own vocabulary. Each case is one batch:

turns5, turns20, turns100   the examples of a conversation under the renderer `qwen3`, which removes the
thinking of
                            earlier replies, so that each turn is an example with its whole history
turns20_all                 the same with every position scored, which is the default of the API
pairs                       4 preference pairs: prompts of 1,000 tokens with two answers of 150
group                       16 samples of 100 tokens for a prompt of 500
nothing                     16 sequences of 256 tokens that share nothing

Sides: `shared` is this project. `each` is the same engine without sharing. `line` is the conversation as one
sequence, which a model that keeps its history would see. `body` columns leave out the projection to the
vocabulary. With `--trl`, TRL's `SFTTrainer` runs the same examples in the faster of two settings, or in that
of `--trl-setting`. With `--trl-every 4` it runs the last of each four examples alone, and its seconds are
scaled by the tokens, since it computes every example by itself: 100 turns take it many minutes. The sides run
in turns in one process, each round in the opposite order of the one before, TRL after them; the table has
the least CPU time of each side's rounds, and the peak of its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import hybrids, peer_trl, step_model
from benchmarks.process_memory import begin_peak, peak_bytes, resident_bytes
from benchmarks.step_data import NUM_TEXT_TOKENS, Example
from cookbook.clients.service import ServiceClient
from cookbook.engine.model import unembedding
from cookbook.engine.model.loading import return_freed_memory
from cookbook.engine.model.prefix_tree import MIN_SHARED_TOKENS, families
from cookbook.types import Datum, ModelInput
from renderers import Message, get_renderer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boil",
    "bright",
    "kettles",
    "of",
    "soup",
]


def conversation(tokenizer: Any, num_turns: int, num_words: int, renderer_name: str) -> list[Example]:
    rng = np.random.default_rng(0)

    def said(role: str) -> Message:
        return {"role": role, "content": " ".join(rng.choice(WORDS, num_words))}

    messages = [message for _ in range(num_turns) for message in (said("user"), said("assistant"))]
    renderer = get_renderer(renderer_name, tokenizer)
    return [
        (example.tokens_T.tolist(), [int(weight) for weight in example.weights_T])
        for example in renderer.render_conversation(messages)
    ]


def branches(num_prompts: int, prompt: int, num_answers: int, answer: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(num_prompts):
        beginning = rng.integers(NUM_TEXT_TOKENS, size=prompt).tolist()
        for _ in range(num_answers):
            end = rng.integers(NUM_TEXT_TOKENS, size=answer).tolist()
            examples.append((beginning + end, [0] * prompt + [1] * answer))
    return examples


@dataclass(frozen=True)
class Case:
    make: Callable[[Any], list[Example]]
    """Returns the examples, given the tokenizer."""
    line: Callable[[Any], list[Example]] | None = None
    trained_only: bool = True


def _turns(num_turns: int, num_words: int, trained_only: bool = True) -> Case:
    return Case(
        lambda tokenizer: conversation(tokenizer, num_turns, num_words, "qwen3"),
        lambda tokenizer: conversation(tokenizer, num_turns, num_words, "qwen3_instruct"),
        trained_only,
    )


CASES = {
    "turns5": _turns(5, 40),
    "turns20": _turns(20, 40),
    "turns20_all": _turns(20, 40, trained_only=False),
    "turns100": _turns(100, 10),
    "pairs": Case(lambda _: branches(4, 1000, 2, 150)),
    "group": Case(lambda _: branches(1, 500, 16, 100)),
    "nothing": Case(lambda _: branches(16, 200, 1, 56)),
}


@dataclass
class Times:
    """The CPU seconds of a side's rounds, those in the projection, and its peak in bytes."""

    total: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    peak: int = 0

    def best(self) -> float:
        return min(self.total)

    def best_of_body(self) -> float:
        return min(total - head for total, head in zip(self.total, self.head, strict=True))


class SharingEngine:
    def __init__(self, folder: Path, hybrid: str | None = None, is_wide: bool = False) -> None:
        adapter_folder = None
        if hybrid is None:
            model_folder, adapter_folder = step_model.make_folders(folder)
        else:
            step_model.make_folders(folder)  # for its tokenizer
            model_folder = hybrids.make_model(hybrid, folder / hybrid, is_wide)
        service = ServiceClient(device="cpu", dtype="float32")
        client = service.create_lora_training_client(
            str(model_folder),
            rank=step_model.LORA_RANK,
            alpha=step_model.LORA_ALPHA,
            seed=0,
            train_unembed=False,
        )
        if adapter_folder is not None:
            client.load_state(adapter_folder).result()
        self.tokenizer = client.get_tokenizer() if hybrid is None else step_model.load_tokenizer(folder)
        self.trainer: Any = client._trainer
        self._min_shared = self.trainer.base.min_shared_tokens

    def step(self, data: list[Datum], case: Case, shares: bool, times: Times) -> float:
        """Runs one forward and backward pass, and returns its loss."""
        head = _Clock()
        self.trainer.base.min_shared_tokens = self._min_shared if shares else None
        self.trainer.discard_gradients()
        gc.collect()
        return_freed_memory()
        begin_peak()
        before, started = resident_bytes(), time.process_time()
        with head.timing(unembedding, ("score", "score_and_backpropagate")):
            request = self.trainer.check(data, "cross_entropy", None, case.trained_only)
            loss = self.trainer.forward_backward(request).output().metrics["loss:sum"]
        times.total.append(time.process_time() - started)
        times.head.append(head.seconds)
        times.peak = max(times.peak, peak_bytes() - before)
        return float(loss)


class _Clock:
    """Sums the CPU seconds of some functions of a module."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, module: Any, names: tuple[str, ...]) -> Any:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                started = time.process_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.seconds += time.process_time() - started

            return run

        stack = contextlib.ExitStack()
        for name in names:
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
        return stack


def datums_of(examples: list[Example], vocab_size: int) -> list[Datum]:
    examples = [([token % vocab_size for token in tokens], mask) for tokens, mask in examples]
    return [
        Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": mask[1:]})
        for tokens, mask in examples
    ]


TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "padding-free": {"padding_free": True, "gradient_checkpointing": False, "loss_type": "nll"},
    "one at a time": {"gradient_checkpointing": False, "loss_type": "nll"},
}


def trl_step(folder: Path, examples: list[Example], names: Iterable[str]) -> tuple[float, int, str]:
    """Returns the CPU seconds of TRL's step on the examples, its peak in bytes, and its fastest setting."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    found: dict[str, tuple[float, int]] = {}
    for name in names:
        settings = TRL_SETTINGS[name]
        at_once = 2 if settings.get("padding_free") else 1
        ends: list[float] = []

        class StepEnds(TrainerCallback):
            def on_train_begin(self, *_: Any, _ends: list[float] = ends, **__: Any) -> None:
                _ends.append(time.process_time())

            def on_step_end(self, *_: Any, _ends: list[float] = ends, **__: Any) -> None:
                _ends.append(time.process_time())

        with tempfile.TemporaryDirectory() as output:
            batching = {
                "per_device_train_batch_size": at_once,
                "gradient_accumulation_steps": -(-len(examples) // at_once),
            }
            trainer = SFTTrainer(
                model=step_model.load_adapted_model(folder, attn_implementation="sdpa"),
                args=SFTConfig(**(peer_trl.fixed_options(output, 1) | batching | settings)),
                train_dataset=peer_trl.as_dataset([examples]),
                processing_class=step_model.load_tokenizer(folder),
                callbacks=[StepEnds()],
            )
            begin_peak()
            before = resident_bytes()
            trainer.train()
        found[name] = ends[1] - ends[0], peak_bytes() - before
    best = min(found, key=lambda name: found[name])
    return *found[best], best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--trl-setting", choices=list(TRL_SETTINGS))
    parser.add_argument("--trl-every", type=int, default=1)
    parser.add_argument("--hybrid", choices=list(hybrids.FAMILIES), help="a hybrid model, not Qwen3")
    parser.add_argument("--wide", action="store_true", help="a hybrid of hidden size 1,024")
    parser.add_argument("--folder", type=Path, help="where model and adapter are, or are put")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        engine = SharingEngine(folder, given.hybrid, given.wide)
        print(
            "| case | tokens -> computed | shared s | each / shared | the same, body | shared / line "
            "| MiB shared, each | loss error |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for name in given.cases:
            examples = _run(name, CASES[name], engine, given.rounds)
            if given.trl:
                names = [given.trl_setting] if given.trl_setting else list(TRL_SETTINGS)
                run = examples[:: -given.trl_every]
                seconds, peak, setting = trl_step(folder, run, names)
                seconds *= sum(len(tokens) for tokens, _ in examples) / sum(len(tokens) for tokens, _ in run)
                print(
                    f"  TRL on {name}: {seconds:.1f} s, {peak / 2**20:.0f} MiB ({setting}; {len(run)} of "
                    f"{len(examples)} examples run)",
                    flush=True,
                )


def _run(name: str, case: Case, engine: SharingEngine, rounds: int) -> list[Example]:
    """Prints a line of the table. Returns the examples of the case."""
    examples, vocab_size = case.make(engine.tokenizer), engine.trainer.base.vocab_size
    data = datums_of(examples, vocab_size)
    line = None if case.line is None else datums_of(case.line(engine.tokenizer), vocab_size)
    times = {side: Times() for side in ("shared", "each", "line")}
    losses = {}
    for number in range(rounds):
        sides = [("shared", True), ("each", False)]
        for side, shares in sides if number % 2 == 0 else reversed(sides):
            losses[side] = engine.step(data, case, shares, times[side])
        if line is not None:
            engine.step(line, case, True, times["line"])
    arrays = [np.asarray(tokens[:-1]) for tokens, _ in examples]
    computed = sum(family.size() for family in families(arrays, MIN_SHARED_TOKENS))
    shared, each = times["shared"], times["each"]
    against_line = "" if line is None else f"{shared.best() / times['line'].best():.2f}"
    error = abs(losses["shared"] / losses["each"] - 1)
    ratios = (each.best() / shared.best(), each.best_of_body() / shared.best_of_body())
    cells = (
        *(name, f"{sum(map(len, arrays)):,} -> {computed:,}", f"{shared.best():.2f}"),
        *(f"{ratio:.2f}" for ratio in ratios),
        *(against_line, f"{shared.peak / 2**20:.0f}, {each.peak / 2**20:.0f}", f"{error:.0e}"),
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return examples


if __name__ == "__main__":
    main()
