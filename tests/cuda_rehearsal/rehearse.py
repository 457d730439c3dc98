"""Runs what the engine does on a CUDA device, on the fake one, for the tiny models of families.

    PYTHONPATH=.:tests/helpers python tests/cuda_rehearsal/rehearse.py FOLDER FAMILY ... [--planted]

Prints a line of JSON for each family and activity: what was launched, where the host waited, where tensors of
float64 were made, and the error if there was one. With `--planted` each defect of `planted` is tried too.
Each family has a process of its own, forked from this one, which has imported everything.
"""

from __future__ import annotations

from benchmarks.fake_cuda import library

library.load()  # before torch is imported

import os  # noqa: E402

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the fake device is that of one thread

import argparse  # noqa: E402
import asyncio  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from concurrent.futures import Future  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import families  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402, F401 - bitsandbytes, which it imports, asks for a CUDA device
import transformers  # noqa: E402
from planted import DEFECTS  # noqa: E402
from waits import ANSWERS, NOT_CAPTURED  # noqa: E402

from benchmarks.fake_cuda.device import FakeCuda, Recording  # noqa: E402
from cookbook.engine.model.base_model import BaseModel  # noqa: E402
from cookbook.engine.model.kernels import NAMES  # noqa: E402
from cookbook.engine.options import EngineOptions, OptimizerBits, Quantization  # noqa: E402
from cookbook.engine.sampling import decode_graphs  # noqa: E402
from cookbook.engine.sampling.decoder_probe import make_decoder  # noqa: E402
from cookbook.engine.sampling.requests import ScoreRequest, sample_request  # noqa: E402
from cookbook.engine.sampling.sampler import Sampler  # noqa: E402
from cookbook.engine.training.losses import Loss  # noqa: E402
from cookbook.engine.training.trainer import Trainer  # noqa: E402
from cookbook.errors import ConfigError  # noqa: E402
from cookbook.export import export  # noqa: E402
from cookbook.export.config import ExportConfig  # noqa: E402
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams  # noqa: E402

LENGTHS = (40, 3, 17, 90)
NUM_SHARED = 32
"""Two sequences begin with so many equal tokens, which are in a row once where they can be."""


def make_data() -> list[Datum]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 370, length + 1) for length in LENGTHS]
    sequences[3][:NUM_SHARED] = sequences[0][:NUM_SHARED]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


class Rehearsal:
    """A family's tiny model on the fake device, with the choices that its trial on the CPU led to."""

    def __init__(self, name: str, folder: Path, device: FakeCuda) -> None:
        self._name = name
        self._folder = folder
        self._device = device
        self._published = str(families.save(name, folder / "published"))
        self._truth = BaseModel(self._published, EngineOptions(device="cpu"))
        self._is_in_8_bits = False

    @functools.cached_property
    def base(self) -> BaseModel:
        """The model on the device. It carries no adapter between two activities."""
        return self._load()

    def activities(self) -> Iterator[tuple[str, Callable[[], Recording | None]]]:
        yield "load", lambda: self.base and None
        yield "train", lambda: self.train(rank=4)
        yield "train without kernels of Triton", self.train_without_kernels
        yield "train without the head", lambda: self.train(rank=4, train_unembed=False)
        yield "train with checkpointed layers", lambda: self.train(rank=4, is_checkpointed=True)
        yield "train with inputs in host memory", lambda: self.train(rank=4, is_offloaded=True)
        yield "sample", self.sample
        yield "save, load and export", lambda: self.save_and_load(rank=4)
        yield "train all weights", lambda: self.train(rank=0)
        yield "train all weights with moments in 8 bits", lambda: self.train(rank=0, optimizer_bits=8)
        yield "save, load and export all weights", lambda: self.save_and_load(rank=0)
        yield "load in 8 bits", self.load_in_8_bits
        yield "train over weights in 8 bits", lambda: self.train(rank=4) if self._is_in_8_bits else None
        yield "sample with weights in 8 bits", lambda: self.sample() if self._is_in_8_bits else None

    def load_in_8_bits(self) -> None:
        """Takes a model whose frozen weights are in 8 bits for what follows, unless these are refused."""
        try:
            self.base = self._load("fp8")
            self._is_in_8_bits = True
        except ConfigError as error:
            if not str(error).startswith("quantization "):
                raise

    def sample(self) -> Recording:
        """Samples with and without limits on the tokens, continues a prompt, and scores a text."""
        make_decoder(self._truth)
        base, decoder = self.base, self._truth.make_decoder
        base.make_decoder, base.decodes_packed = decoder, self._truth.decodes_packed
        base.cache_bytes, base.reuses_prompts = self._truth.cache_bytes, self._truth.reuses_prompts
        params = [
            SamplingParams(max_tokens=8, seed=0, stop=[]),
            SamplingParams(max_tokens=3, seed=1, stop=[], temperature=0.7, top_p=0.9, top_k=20),
            SamplingParams(max_tokens=2, stop=[], temperature=0.0),
        ]
        prompt = list(range(20, 60))
        requests: list[Any] = [
            sample_request(base, prompt[: 40 - number], 2, each, include_prompt_logprobs=number == 0)
            for number, each in enumerate(params)
        ]
        requests.append(ScoreRequest(np.array(prompt)))
        next_turn = sample_request(base, [*prompt[:38], *range(9, 14)], 2, params[1])
        prepared: Future[Any] = Future()
        prepared.set_result((None, 0))
        waiting = [requests[1:]]

        def work() -> None:
            sampler = Sampler(base, prepared)
            sampler.run(requests[0], lambda: waiting.pop() if waiting else [])
            sampler.run(next_turn, list)
            for request in [*requests, next_turn]:
                request.future.result(timeout=0)

        record = self._record(work)
        if bool(next_turn.prompt_cache_hit_tokens) != base.reuses_prompts:
            raise AssertionError(
                f"{next_turn.prompt_cache_hit_tokens} tokens of a next turn were not computed"
            )
        graphs = base.decode_graphs
        is_captured = graphs is not None and graphs.num_replays > 0
        is_expected = base.decodes_packed and decode_graphs.why_not(base) is None
        if is_captured != (is_expected and self._name not in NOT_CAPTURED):
            raise AssertionError(f"its passes that decode were captured and replayed: {is_captured}")
        return record

    def save_and_load(self, rank: int) -> Recording:
        """Saves a state with its optimizer, loads it again, and merges what was saved on the CPU."""
        path = self._folder / f"rank{rank}"
        with self._trainer(rank) as trainer:
            trainer.forward_backward(trainer.check(make_data(), "cross_entropy", None, trained_only=True))
            trainer.optim_step(AdamParams())

            def work() -> None:
                trainer.save(path, with_optimizer=True)
                trainer.load(str(path), with_optimizer=True)

            record = self._record(work)
        with self._device.switched_off():
            asyncio.run(export.main(ExportConfig(checkpoint=str(path), to=f"{path}-merged", format="merged")))
        return record

    def planted(self) -> Iterator[tuple[str, Callable[[], Recording | None]]]:
        with self._trainer(rank=4) as trainer:
            request = trainer.check(make_data(), "cross_entropy", None, trained_only=True)
            for defect, loss_fn in DEFECTS.items():
                with_defect = dataclasses.replace(request, loss=Loss(loss_fn, ("target_tokens",), {}))
                work = functools.partial(trainer.forward_backward, with_defect)
                yield f"planted: {defect}", functools.partial(self._record, work)

    def train(
        self,
        rank: int,
        train_unembed: bool = True,
        is_checkpointed: bool = False,
        is_offloaded: bool = False,
        optimizer_bits: OptimizerBits = 32,
    ) -> Recording:
        """Takes a step."""
        with self._trainer(rank, train_unembed, optimizer_bits) as trainer:
            trainer.base.mlp_tile = 64 if is_checkpointed or is_offloaded else 0
            if is_checkpointed or is_offloaded:
                trainer.limits.current = dataclasses.replace(
                    trainer.limits.current, max_tokens_without_checkpointing=0
                )
            if is_offloaded:
                trainer.limits.current = dataclasses.replace(
                    trainer.limits.current, max_tokens_without_offloading=0
                )
            request = trainer.check(make_data(), "cross_entropy", None, trained_only=True)

            def step() -> None:
                trainer.forward_backward(request)
                trainer.optim_step(AdamParams(grad_clip_norm=1.0))

            return self._record(step)

    def train_without_kernels(self) -> Recording:
        self._device.kernels = ()
        try:
            return self.train(rank=4)
        finally:
            self._device.kernels = NAMES

    @contextlib.contextmanager
    def _trainer(
        self, rank: int, train_unembed: bool = True, optimizer_bits: OptimizerBits = 32
    ) -> Iterator[Trainer]:
        options = self.base.options
        self.base.options = dataclasses.replace(options, optimizer_bits=optimizer_bits)
        trainer = Trainer(self.base, LoraConfig(rank=rank, seed=0, train_unembed=train_unembed))
        try:
            yield trainer
        finally:
            self.base.options = options
            self.base.adapters.remove(trainer.adapter)

    def _record(self, work: Callable[[], Any]) -> Recording:
        with self._device.recording() as record:
            work()
        return record

    def _load(self, quantization: Quantization | None = None) -> BaseModel:
        """Returns the model on the device.

        Its trial there compares numbers that do not exist, so the result of the trial on the CPU is used.
        """
        options = EngineOptions(
            device="cuda",
            max_tokens_per_microbatch=1024,
            gradient_checkpointing="off",
            quantization=quantization,
        )
        base = BaseModel(self._published, options)
        if self._truth.is_packed and not base.is_packed:
            raise AssertionError("it is not packed on the device, because a pass of its trial failed there")
        base.is_packed, base.is_padded = self._truth.is_packed, self._truth.is_padded
        base.has_plain_head = self._truth.has_plain_head
        base.min_shared_tokens = self._truth.min_shared_tokens
        base.logit_scaling = self._truth.logit_scaling
        base.recurrent.passes_borders = self._truth.recurrent.passes_borders
        base.recurrent.hands_states_on = self._truth.recurrent.hands_states_on
        base.model.set_attn_implementation(self._truth.model.config._attn_implementation)
        return base


def report(family: str, activity: str, run: Callable[[], Recording | None]) -> None:
    """Prints what happened in an activity."""
    found: dict[str, Any] = {"family": family, "activity": activity, "error": None}
    try:
        record = run()
        if record is not None:
            found["launches"] = record.num_launches
            found["operators"] = dict(record.operators)
            found["waits"] = [[*key, count] for key, count in record.waits.items()]
            found["doubles"] = [[*key, count] for key, count in record.doubles.items()]
    except Exception as error:
        found["error"] = _described(error)
    print(json.dumps(found), flush=True)


def _described(error: BaseException) -> str:
    """Returns the first cause of an error, with the functions of the project that led to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    places, traceback = [], error.__traceback__
    while traceback is not None:
        path = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in path and "fake_cuda" not in path:
            places.append(f"{Path(path).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]} ({' < '.join(places[::-1][:6])})"


def rehearse(name: str, folder: Path, is_planted: bool) -> None:
    """Prints what happens in each activity of a family."""
    device = FakeCuda(ANSWERS)
    rehearsal = Rehearsal(name, folder, device)
    with device:
        for activity, run in rehearsal.activities():
            report(name, activity, run)
        if is_planted:
            for activity, run in rehearsal.planted():
                report(name, activity, run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="+", choices=families.FAMILIES, metavar="FAMILY")
    parser.add_argument("--planted", action="store_true", help="train the first family with each defect")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # a collection of a forked process would traverse all that was imported
    fork = multiprocessing.get_context("fork")
    for number, name in enumerate(arguments.families):
        process = fork.Process(
            target=rehearse, args=(name, arguments.folder / name, arguments.planted and number == 0)
        )
        process.start()
        process.join()
        if process.exitcode:
            error = f"its process ended with {process.exitcode}"
            print(json.dumps({"family": name, "activity": "end", "error": error}), flush=True)


if __name__ == "__main__":
    main()
