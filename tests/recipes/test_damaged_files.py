"""For damaged files of a run, every command names the file and the key."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cookbook import AdamParams, Datum, ModelInput, ServiceClient
from cookbook.engine import checkpoint
from cookbook.errors import CheckpointError, CookbookError
from cookbook.report.run_page import page_of
from cookbook.runs.find import find_trained_model
from cookbook.runs.record import read_run

WRONG: list[Any] = [
    None, "x", "../x", "", -1, 5.5, float("nan"), float("inf"), 10**400, True, [], {}, [1], {"a": 1}, ["a"],
]  # fmt: skip
RAW = [
    b"", b"[", b"null\n", b"[" * 100_000, b"\xff\xfe", b'\xef\xbb\xbf{"step": 1}\n', b"\x00" * 9,
    b'{"step": 1, "step": 2}\n', b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"\n",
]  # fmt: skip
FILES = [
    "config.json", "data.json", "environment.json", "metrics.jsonl", "tables.jsonl", "checkpoints.jsonl",
    "checkpoints/final/state.json", "checkpoints/final/adapter_config.json",
]  # fmt: skip


def argv_of(folder: Path, rows: Path) -> list[str]:
    sizes = ["test_size=2", "max_steps=2", "batch_size=2", "lora_rank=4", "eval_every=1"]
    return [f"dataset={rows}", f"log_path={folder}", *sizes]


def call(recipe: str, argv: list[str]) -> int:
    try:
        importlib.import_module(f"recipes.{recipe}").main(argv)
    except SystemExit as end:
        return 1 if end.code else 0
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    reply = {"role": "assistant", "content": "two"}
    chats = [[{"role": "user", "content": f"one {number}"}, reply] for number in range(6)]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (folder.parent / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    assert call("sft", [f"model_name={tiny_qwen3}", *argv_of(folder, folder.parent / "rows.jsonl")]) == 0
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def look(folder: Path) -> None:
    """Reads what report, export and chat read of a run before a model is loaded."""
    page_of(read_run(folder))
    find_trained_model(str(folder))
    for path in (folder / "checkpoints").iterdir():
        checkpoint.read_info(path)
        checkpoint.check_files(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns a copy with another value at `path`."""
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_run_with_a_wrong_type_anywhere_is_read_or_refused(run_folder: Path, name: str) -> None:
    path = run_folder / name
    if not path.exists():
        pytest.skip(f"this run writes no {name}")
    original = path.read_text(encoding="utf-8")
    lines = original.splitlines() if name.endswith(".jsonl") else [original]
    row = json.loads(lines[-1])
    every = [(place, wrong) for place in places(row) for wrong in WRONG]
    for place, wrong in every[:: max(1, len(every) // 25)]:
        text = json.dumps(changed(row, place, wrong))
        path.write_text("\n".join([*lines[:-1], text]) + "\n", encoding="utf-8")
        said = "the name of the run"
        try:
            look(run_folder)
        except CookbookError as error:
            said += str(error)
        assert said == "the name of the run" or str(path) in said or path.parent.name in said, (place, wrong)


@pytest.mark.parametrize("name", FILES)
def test_an_error_of_a_file_that_is_not_json_names_it(run_folder: Path, name: str) -> None:
    path = run_folder / name
    if not path.exists():
        pytest.skip(f"this run writes no {name}")
    for raw in RAW:
        path.write_bytes(raw)
        if name.endswith(".jsonl") and not raw.endswith(b"\n"):
            with contextlib.suppress(
                CheckpointError
            ):  # an incomplete last line is skipped, which leaves no row
                look(run_folder)
            continue
        with pytest.raises(CookbookError, match=path.name):
            look(run_folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(CookbookError, match=path.name):
        look(run_folder)


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("metrics.jsonl", "step", "two"),
        ("metrics.jsonl", "train/nll", "low"),
        ("checkpoints.jsonl", "step", None),
        ("checkpoints.jsonl", "epoch", [0]),
        ("checkpoints.jsonl", "batch", -3),
        ("checkpoints.jsonl", "row", "all"),
        ("checkpoints.jsonl", "surplus", 1),
        ("config.json", "num_epochs", "many"),
        ("config.json", "max_steps", [2]),
        ("data.json", "rows", "six"),
        ("checkpoints/final/state.json", "optimizer_steps", "2"),
        ("checkpoints/final/state.json", "rng_state", {"bit_generator": "PCG64", "state": 5}),
        ("checkpoints/final/state.json", "rng_state", {"bit_generator": "os.system"}),
        ("checkpoints/final/state.json", "microbatch_limits", {"max_tokens": "all"}),
        ("checkpoints/final/state.json", "microbatch_limits", {"unknown": 3}),
        ("checkpoints/final/state.json", "sha256", {"../../../config.json": "0"}),
        ("checkpoints/final/state.json", "world_size", 0),
        ("checkpoints/final/state.json", "lora", {"rank": "4"}),
        ("checkpoints/final/state.json", "user_metadata", {"renderer_name": 5}),
        ("checkpoints/final/adapter_config.json", "target_modules", 5),
        ("checkpoints/final/adapter_config.json", "lora_alpha", "8"),
    ],
)
def test_a_resumed_run_names_the_damaged_file_and_key(
    run_folder: Path,
    finished: Path,
    tiny_qwen3: str,
    name: str,
    key: str,
    wrong: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = run_folder / name
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    lines[-1] = json.dumps(json.loads(lines[-1]) | {key: wrong})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = [f"model_name={tiny_qwen3}", *argv_of(run_folder, finished.parent / "rows.jsonl")]
    argv[argv.index("max_steps=2")] = "max_steps=3"
    assert call("sft", [*argv, "num_epochs=5", "if_log_path_exists=resume"]) != 0
    error = "".join(capsys.readouterr().err.split())
    assert path.name in error, error
    assert key.split("/")[-1] in error
    assert "Traceback" not in error


@pytest.fixture
def saved(tmp_path: Path, tiny_qwen3: str) -> Path:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path / "saved")
    client = service.create_lora_training_client(tiny_qwen3, rank=4)
    datum = Datum(model_input=ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]})
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(AdamParams()).result()
    path = Path(client.save_state("a").result().path)
    service.close()
    return path


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name].half()}), "expected torch.float32"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}), "has shape"),
        (lambda tensors, name: tensors.pop(name), "is incomplete"),
        (lambda tensors, name: tensors.update({"other.exp_avg": torch.zeros(2)}), "belongs to no weight"),
        (
            lambda tensors, name: tensors.update({name.replace("exp_avg", "step"): torch.zeros(3)}),
            r"step has shape \[3\], expected \[\]",
        ),
    ],
    ids=["dtype", "shape", "missing", "surplus", "step"],
)
def test_optimizer_tensors_that_do_not_fit_are_named_and_no_file_is_changed(
    saved: Path, tiny_qwen3: str, damage: Any, problem: str
) -> None:
    path = saved / "optimizer.safetensors"
    tensors = load_file(path)
    damage(tensors, next(name for name in sorted(tensors) if name.endswith(".exp_avg")))
    save_file(tensors, path)
    record = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    record["sha256"]["optimizer.safetensors"] = checkpoint._sha256(path)
    (saved / "state.json").write_text(json.dumps(record), encoding="utf-8")
    service = ServiceClient(device="cpu")
    with pytest.raises(CheckpointError, match=problem):
        service.create_training_client_from_state_with_optimizer(saved)
    service.close()
