"""The functions of the project that one value passes: a row, a key of the config, a sampled token.

Each walk runs in this process on the embedded model: once without a profiler, which loads modules and finds
the values to look for, and once with a profiler on every thread. The functions are those in `cookbook`,
`renderers` and `recipes` that are written as such, methods and lambdas among them, each counted once;
comprehensions, class bodies and the methods that `dataclass` generates do not count.

row     From the line of a JSONL file to the line of `metrics.jsonl`. A function is on the walk if an
        argument, or what it returns or yields, holds the row's text, its token ids or its loss: as the value
        itself, or at most two levels down in lists, dicts and objects of this project. What `self` holds
        does not count: every method of a dataset or of the loop would be on the walk by it. The text is
        found in any string that contains it, the ids in order among integers, and the loss as its mean, its
        sum, or an array of that sum. The row is the only one of its file and is rendered in this process.
key     From `learning_rate=...` in argv to `param_groups` of the optimizer, by the same rule for that text
        and that number, one level down. A config that is passed on as a whole does not count: what takes
        the number out of it does.
token   One more token of a sequence that is being sampled: the functions that are called more often where
        seven tokens are asked for than where six are. Submission, prefill and completion are the same in
        both; the choice, the stop rule, the cache and the model's own functions remain.

Checks that are given the value count like any other function. A value that lies deeper is not seen, so the
figures serve to compare one version of the project with another.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
FOLDERS = tuple(str(ROOT / package) + os.sep for package in ("cookbook", "renderers", "recipes"))

ROW_DEPTH = 2
KEY_DEPTH = 1
MAX_ITEMS = 64
"""Items of a container, and attributes of an object, that are looked at."""
MAX_NUMBERS = 65_536
"""An array of more numbers is a weight, a cache or logits, not the tokens or losses of one row."""

MARKER = "Quizzical vultures fix my jukebox"
ROW = {
    "messages": [
        {"role": "user", "content": "Say something."},
        {"role": "assistant", "content": f"{MARKER}."},
    ]
}
LEARNING_RATE = "0.000123457"

Test = Callable[[Any], bool]
"""Says whether a string, a number, a sequence of numbers or an array is the value looked for."""


def row_walk() -> list[str]:
    """From the line in a JSONL file to the line in `metrics.jsonl`."""
    from cookbook import embedded
    from cookbook.models import get_tokenizer

    tokenizer = get_tokenizer(embedded.MODEL_NAME)
    ids = tokenizer.encode(f" {MARKER}", add_special_tokens=False)[1:-1]
    with tempfile.TemporaryDirectory() as folder, _quiet_and_cached_in(folder):
        data = Path(folder, "rows.jsonl")
        data.write_text(json.dumps(ROW) + "\n", encoding="utf-8")

        def run(name: str) -> dict[str, float]:
            _train(f"log_path={folder}/{name}", f"dataset={data}", f"seed={len(name)}")
            lines = Path(folder, name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return next(row for row in map(json.loads, lines) if "train/nll" in row)

        found = run("first")
        mean, total = found["train/nll"], found["train/nll"] * found["data/trained_tokens"]
        Path(os.environ["COOKBOOK_CACHE"]).rename(Path(folder, "cache of the first run"))
        is_row = _any_of(_contains_text(MARKER), _contains_ids(ids), _is_loss(mean, total))
        metrics = Path(folder, "third", "metrics.jsonl")
        with _Walk(
            _handles(is_row, ROW_DEPTH), lambda: metrics.exists() and metrics.stat().st_size > 0
        ) as walk:
            assert run("third")["train/nll"] == mean
    return [_name(code) for code in walk.calls]


def key_walk() -> list[str]:
    """From argv to the parameter groups of the optimizer."""
    with tempfile.TemporaryDirectory() as folder, _quiet_and_cached_in(folder):
        rate = float(LEARNING_RATE)
        reached: list[float] = []

        class Optimizer(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                reached.extend(group["lr"] for group in self.param_groups)
                return super().step(closure)

        _train(f"log_path={folder}/first")
        is_rate = _any_of(_is_text(LEARNING_RATE, f"learning_rate={LEARNING_RATE}"), _is_number(rate))
        plain, torch.optim.AdamW = torch.optim.AdamW, Optimizer  # type: ignore[misc]
        try:
            with _Walk(_handles(is_rate, KEY_DEPTH), lambda: bool(reached)) as walk:
                _train(f"log_path={folder}/second", f"learning_rate={LEARNING_RATE}")
        finally:
            torch.optim.AdamW = plain  # type: ignore[misc]
        assert reached == [rate], reached
    return [_name(code) for code in walk.calls]


def token_walk() -> list[str]:
    """From the call of `sample` to the sequence that its future returns."""
    from cookbook import ModelInput, SamplingParams, ServiceClient, embedded

    calls: list[Counter[CodeType]] = []
    with _Walk(lambda frame, event, result: event == "call") as walk:
        service = ServiceClient(device="cpu")
        client = service.create_sampling_client(base_model=embedded.MODEL_NAME)
        prompt = ModelInput.from_ints(client.get_tokenizer().encode("The"))
        for num_tokens in (6, 6, 7):  # the first sample starts the engine
            walk.calls.clear()
            params = SamplingParams(max_tokens=num_tokens, seed=0, stop_token_ids=[-1])
            (sequence,) = client.sample(prompt, 1, params).result().sequences
            assert len(sequence.tokens) == num_tokens
            time.sleep(0.5)  # the engine has cleaned up behind it
            calls.append(walk.calls.copy())
        service.close()
    return [_name(code) for code, number in calls[2].items() if number > calls[1][code]]


def _train(*argv: str) -> None:
    from recipes import sft

    sft.main([
        *("max_steps=1", "batch_size=1", "test_size=0", "eval_every=0", "infrequent_eval_every=0"),
        *("lr_schedule=constant", "device=cpu", "infrequent_evaluator_builders=[]"),
        *argv,
    ])  # fmt: skip


@contextlib.contextmanager
def _quiet_and_cached_in(folder: str) -> Iterator[None]:
    before = os.environ.get("COOKBOOK_CACHE")
    os.environ["COOKBOOK_CACHE"] = str(Path(folder, "cache"))
    try:
        with contextlib.redirect_stdout(printed := io.StringIO()):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise
    finally:
        if before is None:
            del os.environ["COOKBOOK_CACHE"]
        else:
            os.environ["COOKBOOK_CACHE"] = before


# -- the functions that are entered ------------------------------------------------------------


class _Walk:
    """Collects the project's functions that are on the walk while it is entered.

    It sees the thread that enters it and every thread that starts afterwards.
    """

    def __init__(
        self, is_on_walk: Callable[[FrameType, str, Any], bool], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self._is_on_walk = is_on_walk
        self._is_ours: dict[CodeType, bool] = {}
        self.calls: Counter[CodeType] = Counter()
        self._is_over = is_over
        self._is_at_end = False

    def __enter__(self) -> _Walk:
        threading.setprofile(self._look)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _look(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if self._is_at_end or event not in ("call", "return"):
            return
        is_ours = self._is_ours.get(code)
        if is_ours is None:
            is_ours = self._is_ours[code] = _is_function_of_project(code)
        if is_ours and self._is_on_walk(frame, event, result):
            self.calls[code] += 1
            self._is_at_end = self._is_over()


def _name(code: CodeType) -> str:
    module = Path(code.co_filename).relative_to(ROOT).with_suffix("")
    return f"{'.'.join(module.parts)}:{code.co_qualname}"


def _is_function_of_project(code: CodeType) -> bool:
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
    is_comprehension = code.co_name.startswith("<") and code.co_name != "<lambda>"
    return is_function and not is_comprehension and code.co_filename.startswith(FOLDERS)


def _handles(is_value: Test, depth: int) -> Callable[[FrameType, str, Any], bool]:
    """Says whether a call is given the value, or a return gives it."""

    def handles(frame: FrameType, event: str, result: Any) -> bool:
        if event == "return":
            return _holds(result, is_value, depth)
        code, values = frame.f_code, frame.f_locals
        num = code.co_argcount + code.co_kwonlyargcount
        num += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        given = [name for name in code.co_varnames[:num] if name not in ("self", "cls")]
        return any(_holds(values.get(name), is_value, depth) for name in given)

    return handles


# -- the values that are looked for ---------------------------------------------------------


def _holds(value: Any, is_value: Test, depth: int) -> bool:
    if value is None or isinstance(value, bool | type):
        return False
    if is_value(value):
        return True
    if depth == 0 or isinstance(value, str | int | float | bytes | np.ndarray | torch.Tensor):
        return False
    if isinstance(value, dict):
        inner = _first(dict.values(value))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        inner = _first(value)
    elif hasattr(type(value), "__chz_fields__"):
        return False
    elif type(value).__module__.split(".")[0] in ("cookbook", "renderers", "recipes"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        inner = [*_first(getattr(value, "__dict__", {}).values())]
        inner += [getattr(value, name, None) for name in slots if not name.startswith("__")]
    else:
        return False
    return any(_holds(one, is_value, depth - 1) for one in inner)


def _first(values: Any) -> list[Any]:
    return list(itertools.islice(values, MAX_ITEMS))


def _any_of(*tests: Test) -> Test:
    return lambda value: any(test(value) for test in tests)


def _contains_text(text: str) -> Test:
    def test(value: Any) -> bool:
        if isinstance(value, bytes):
            return text.encode() in value
        return isinstance(value, str) and text in value

    return test


def _is_text(*texts: str) -> Test:
    return lambda value: isinstance(value, str) and value in texts


def _contains_ids(ids: list[int]) -> Test:
    wanted = np.asarray(ids)

    def test(value: Any) -> bool:
        array = _numbers(value, "iu")
        if array is None or len(array) < len(wanted):
            return False
        windows = np.lib.stride_tricks.sliding_window_view(array, len(wanted))
        return bool((windows == wanted).all(1).any())

    return test


def _is_loss(mean: float, total: float) -> Test:
    def test(value: Any) -> bool:
        if isinstance(value, int | str | bytes):
            return False
        if isinstance(value, float):
            found = value
        else:
            array = _numbers(value, "f")
            if array is None:
                return False
            found = float(array.sum())
        return any(math.isclose(abs(found), one, rel_tol=1e-5) for one in (mean, total))

    return test


def _is_number(number: float) -> Test:
    return lambda value: isinstance(value, float) and value == number


def _numbers(value: Any, kinds: str) -> np.ndarray | None:
    """A flat array of the numbers of a sequence, an array or a tensor of that kind; None for all else."""
    if isinstance(value, torch.Tensor):
        if value.numel() > MAX_NUMBERS or value.is_floating_point() != (kinds == "f"):
            return None
        value = value.detach().cpu()
        value = (value.double() if kinds == "f" else value).numpy()
    elif isinstance(value, list | tuple):
        if not value or len(value) > MAX_NUMBERS or not isinstance(value[0], float if kinds == "f" else int):
            return None
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.size > MAX_NUMBERS:
        return None
    return value.reshape(-1)
