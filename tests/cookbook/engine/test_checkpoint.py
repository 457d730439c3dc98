"""Tests that checkpoints are written atomically, checked when read, and loadable with plain PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from programs import Programs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cookbook.engine import checkpoint
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import CheckpointError
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput

FILES = [
    checkpoint.ADAPTER_FILE,
    checkpoint.OPTIMIZER_FILE,
    checkpoint.STATE_FILE,
    checkpoint.ADAPTER_CONFIG_FILE,
]


@pytest.fixture(scope="module")
def base(tiny_qwen3: str) -> BaseModel:
    return BaseModel(tiny_qwen3)


@pytest.fixture(autouse=True)
def _free_adapters(base: BaseModel) -> Iterator[None]:
    """Frees the adapters, because each makes the next one slower to add."""
    yield
    for name in list(base.adapters._peft.peft_config if base.adapters._peft else ())[1:]:
        base.adapters.remove(Adapter(name, LoraConfig(), {}))


def make_data(seed: int = 0) -> list[Datum]:
    tokens = np.random.default_rng(seed).integers(3, 300, (3, 12))
    return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in tokens]


def step(trainer: Trainer, seed: int) -> float:
    output = trainer.forward_backward(trainer.check(make_data(seed), "cross_entropy", None)).output()
    trainer.optim_step(AdamParams(learning_rate=1e-2, weight_decay=0.1))
    return output.loss


def trained(base: BaseModel, steps: int = 2, **lora: Any) -> Trainer:
    trainer = Trainer(base, LoraConfig(**{"rank": 4, "seed": 0, **lora}), {"owner": "me"})
    for seed in range(steps):
        step(trainer, seed)
    return trainer


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: weight.detach().numpy().tobytes() for name, weight in trainer.adapter.weights.items()}


@pytest.fixture
def saved(base: BaseModel, tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    trained(base).save(path, with_optimizer=True)
    return path


def flip_a_byte(path: Path, offset: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


# -- round trip -----------------------------------------------------------------------------


def test_a_loaded_state_resumes_bit_for_bit(base: BaseModel, tmp_path: Path) -> None:
    trainer = trained(base, steps=3)
    trainer.rng.integers(100, size=5)
    trainer.save(tmp_path / "state", with_optimizer=True)
    other = Trainer(base, LoraConfig(rank=4, seed=99))
    step(other, 7)
    other.load(str(tmp_path / "state"), with_optimizer=True)
    assert bits(other) == bits(trainer)
    for seed in range(3, 6):
        assert step(other, seed) == step(trainer, seed)
    assert bits(other) == bits(trainer)
    assert other.rng.integers(2**31) == trainer.rng.integers(2**31)
    other.save(tmp_path / "other", with_optimizer=True)
    trainer.save(tmp_path / "same", with_optimizer=True)
    for name in (checkpoint.ADAPTER_FILE, checkpoint.OPTIMIZER_FILE):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


@pytest.mark.slow
def test_a_state_loaded_without_its_optimizer_resets_adam(base: BaseModel, saved: Path) -> None:
    other = trained(base, seed=5)
    other.load(str(saved), with_optimizer=False)
    fresh = Trainer(base, LoraConfig(rank=4, seed=1))
    with torch.no_grad():
        for name, weight in load_file(saved / checkpoint.ADAPTER_FILE).items():
            fresh.adapter.weights[name].copy_(weight)
    assert bits(other) == bits(fresh)
    assert step(other, 8) == step(fresh, 8)
    assert bits(other) == bits(fresh)


@pytest.mark.slow
def test_a_load_drops_accumulated_gradients(base: BaseModel, saved: Path) -> None:
    one, other = trained(base, seed=5), trained(base, seed=6)
    one.forward_backward(one.check(make_data(50), "cross_entropy", None))
    for trainer in (one, other):
        trainer.load(str(saved), with_optimizer=True)
        step(trainer, 9)
    assert bits(one) == bits(other)


def test_a_state_before_the_first_step_resumes_too(base: BaseModel, tmp_path: Path) -> None:
    trainer = trained(base, steps=0)
    trainer.save(tmp_path / "start", with_optimizer=True)
    other = trained(base, seed=3)
    other.load(str(tmp_path / "start"), with_optimizer=True)
    for each in (trainer, other):
        step(each, 0)
    assert bits(other) == bits(trainer)


def test_the_content_of_a_checkpoint_is_read(saved: Path, base: BaseModel) -> None:
    info = checkpoint.read_info(saved)
    assert info.base_model == base.name
    assert info.lora == LoraConfig(rank=4, seed=0)
    assert info.optimizer_steps == 2
    assert info.user_metadata == {"owner": "me"}
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    "groups",
    [{}, {"train_unembed": False}, {"train_attn": False, "train_mlp": False}, {"train_mlp": False}],
    ids=lambda groups: ",".join(groups) or "all",
)
def test_plain_peft_loads_a_checkpoint(
    base: BaseModel, tiny_qwen3: str, tmp_path: Path, groups: dict[str, bool]
) -> None:
    trainer = trained(base, alpha=16.0, **groups)
    trainer.save(tmp_path / "adapter", with_optimizer=False)
    assert not (tmp_path / "adapter" / checkpoint.OPTIMIZER_FILE).exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3), tmp_path / "adapter")
    for datum, output in zip(
        make_data(),
        trainer.forward(trainer.check(make_data(), "cross_entropy", None)).output().loss_fn_outputs,
        strict=True,
    ):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert output["logprobs"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


# -- a plain PEFT adapter -------------------------------------------------------------------


def plain_adapter(folder: Path, model_folder: str, **config: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        PeftLoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
                )
    model.save_pretrained(folder)
    return folder


def test_the_shape_of_a_plain_peft_adapter_is_read(tiny_qwen3: str, tmp_path: Path) -> None:
    info = checkpoint.read_info(plain_adapter(tmp_path / "plain", tiny_qwen3))
    assert info.base_model == tiny_qwen3
    assert info.lora == LoraConfig(rank=4, alpha=8, train_unembed=False, train_mlp=False, train_attn=True)


def test_a_plain_peft_adapter_is_loaded(base: BaseModel, tiny_qwen3: str, tmp_path: Path) -> None:
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folder = plain_adapter(tmp_path / "plain", tiny_qwen3, target_modules=everything)
    trainer = Trainer(base, checkpoint.read_info(folder).lora)
    trainer.load(str(folder), with_optimizer=False)
    for name, weight in load_file(folder / checkpoint.ADAPTER_FILE).items():
        assert torch.equal(trainer.adapter.weights[name], weight)
    with pytest.raises(CheckpointError, match="has no optimizer state"):
        trainer.load(str(folder), with_optimizer=True)


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / checkpoint.ADAPTER_CONFIG_FILE).write_text('{"peft_type": "IA3"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a IA3 adapter"):
        checkpoint.read_info(tmp_path)


# -- damage ---------------------------------------------------------------------------------


def refused(base: BaseModel, path: Path) -> str:
    """Returns the message of the refusal, after checking that the trainer did not change."""
    trainer = trained(base, seed=4)
    before, optimizer = bits(trainer), trainer._optimizer.tensors()
    optimizer = {name: tensor.clone() for name, tensor in optimizer.items()}
    with pytest.raises(CheckpointError) as caught:
        trainer.load(str(path), with_optimizer=True)
    assert bits(trainer) == before
    assert optimizer
    assert all(torch.equal(tensor, optimizer[name]) for name, tensor in trainer._optimizer.tensors().items())
    return str(caught.value)


@pytest.mark.parametrize("name", [checkpoint.ADAPTER_FILE, checkpoint.OPTIMIZER_FILE])
@pytest.mark.parametrize("offset", [-5, 20], ids=["in-the-values", "in-the-header"])
def test_a_flipped_bit_is_detected(base: BaseModel, saved: Path, name: str, offset: int) -> None:
    flip_a_byte(saved / name, offset)
    message = refused(base, saved)
    assert f"{saved} is damaged: {name} is not what was saved" in message
    assert message.endswith("Load an earlier checkpoint.")


@pytest.mark.parametrize("name", [checkpoint.ADAPTER_FILE, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE])
def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(
    base: BaseModel, saved: Path, name: str
) -> None:
    (saved / name).write_bytes(b"")
    # computing its checksum would take hours, and it does not fit in memory
    os.truncate(saved / name, 1 << 40)
    assert name in refused(base, saved)


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", [checkpoint.ADAPTER_FILE, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE])
@pytest.mark.parametrize("length", [0, 30])
def test_a_truncated_file_is_detected(base: BaseModel, saved: Path, name: str, length: int) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:length])
    assert "is damaged" in refused(base, saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (checkpoint.ADAPTER_FILE, f"is incomplete: it has no {checkpoint.ADAPTER_FILE}"),
        (checkpoint.OPTIMIZER_FILE, "has no optimizer state"),
        (checkpoint.STATE_FILE, f"is incomplete: it has no {checkpoint.STATE_FILE}"),
        (checkpoint.ADAPTER_CONFIG_FILE, f"is not a checkpoint: it has no {checkpoint.ADAPTER_CONFIG_FILE}"),
    ],
)
def test_a_missing_file_is_detected(base: BaseModel, saved: Path, name: str, message: str) -> None:
    (saved / name).unlink()
    assert message in refused(base, saved)


def test_a_missing_folder_is_reported(base: BaseModel, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'} does not exist" in refused(base, tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert "does not exist" in refused(base, file)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "text", ["[]", "null", "1", '{"format": 1}', '{"format": 1, "base_model": "x", "lora": 3}']
)
def test_a_malformed_state_file_is_detected(base: BaseModel, saved: Path, text: str) -> None:
    (saved / checkpoint.STATE_FILE).write_text(text, encoding="utf-8")
    assert "is damaged" in refused(base, saved)


@pytest.mark.parametrize("text", ["[]", '{"peft_type": "LORA"}', "{"])
def test_a_malformed_adapter_config_is_detected(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoint.ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_info(tmp_path)


def test_a_newer_format_is_refused(base: BaseModel, saved: Path) -> None:
    content = json.loads((saved / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
    (saved / checkpoint.STATE_FILE).write_text(json.dumps({**content, "format": 2}), encoding="utf-8")
    assert "has format 2; this version reads 1" in refused(base, saved)


# -- foreign checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"rank": 8}, "rank 8"),
        ({"train_mlp": False}, "rank 4"),
        ({"alpha": 16.0}, "alpha 16"),
    ],
    ids=["rank", "layers", "alpha"],
)
def test_a_checkpoint_of_other_lora_settings_is_refused(
    base: BaseModel, tmp_path: Path, lora: dict[str, Any], expected: str
) -> None:
    trained(base, **lora).save(tmp_path / "other", with_optimizer=True)
    message = refused(base, tmp_path / "other")
    assert "does not fit" in message
    assert expected in message
    assert "the checkpoint's own model and LoRA settings" in message


def test_a_checkpoint_of_another_model_is_refused_naming_both(
    base: BaseModel, make_model_folder: Any, tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "wider", hidden_size=64)
    trained(BaseModel(str(folder))).save(tmp_path / "other", with_optimizer=True)
    message = refused(base, tmp_path / "other")
    assert str(folder) in message
    assert base.name in message


# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "", "a/b", "/abs", ".hidden", "-x", "a\\b", "a b", "x\n", "ü", "x\0", "x" * 129],
)
def test_a_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="Invalid checkpoint name"):
        checkpoint.checkpoint_path(tmp_path, name)


@pytest.mark.parametrize("name", ["0001", "final", "step-10_a.b", "x" * 128])
def test_an_ordinary_name_is_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    assert checkpoint.checkpoint_path(tmp_path, name) == tmp_path / name


# -- writing --------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused_without_overwrite(base: BaseModel, tmp_path: Path) -> None:
    trainer = trained(base)
    trainer.save(tmp_path / "name", with_optimizer=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "name").iterdir()}
    step(trainer, 5)
    with pytest.raises(
        CheckpointError, match=r"exists already\. Choose another name, or pass overwrite=True"
    ):
        trainer.save(tmp_path / "name", with_optimizer=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "name").iterdir()} == before

    trainer.save(tmp_path / "name", with_optimizer=True, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["name"]
    other = Trainer(base, LoraConfig(rank=4, seed=1))
    other.load(str(tmp_path / "name"), with_optimizer=True)
    assert bits(other) == bits(trainer)


def test_a_folder_that_cannot_be_created_raises_one_clear_error(base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"Cannot save checkpoint .*file/name"):
        trained(base).save(tmp_path / "file" / "name", with_optimizer=True)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import CheckpointError
from cookbook.types import LoraConfig

model, folder = sys.argv[1], Path(sys.argv[2])
trainer = Trainer(BaseModel(model), LoraConfig(rank=4, seed=0))
trainer.save(folder / "earlier", with_optimizer=True)
before = {file.name: file.read_bytes() for file in (folder / "earlier").iterdir()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, *sorted({len(content) - 1 for content in before.values()})):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for name in ("later", "earlier"):
        try:
            trainer.save(folder / name, with_optimizer=True, overwrite=True)
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(limit, name, str(error).replace(str(folder), "FOLDER"), flush=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        else:
            print(limit, name, "was saved")
        assert [file.name for file in folder.iterdir()] == ["earlier"], list(folder.iterdir())
        assert before == {file.name: file.read_bytes() for file in (folder / "earlier").iterdir()}
trainer.load(str(folder / "earlier"), with_optimizer=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("loaded")
"""


@pytest.mark.slow
def test_a_full_disk_raises_one_clear_error_and_keeps_earlier_checkpoints(
    tiny_qwen3: str, tmp_path: Path, programs: Programs
) -> None:
    """The system refuses to write beyond a limit, in each of the files in turn."""
    done = programs.run("-c", FULL_DISK, tiny_qwen3, str(tmp_path))
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "loaded"
    assert len(lines) == 2 * (1 + len(FILES))
    for line in lines:
        _, name, message = line.split(" ", 2)
        assert message.startswith(f"Cannot save checkpoint FOLDER/{name}: ")
        assert "File too large" in message
        assert message.endswith("free some space, or keep fewer checkpoints. Earlier ones are intact.")


def test_unfinished_files_of_a_killed_process_are_removed(base: BaseModel, saved: Path) -> None:
    folder = saved.parent
    (folder / ".half.writing-123").mkdir()
    (folder / ".half.writing-123" / checkpoint.ADAPTER_FILE).write_bytes(b"x")
    saved.rename(folder / ".saved.replaced-123")
    checkpoint.remove_unfinished(folder)
    assert [file.name for file in folder.iterdir()] == ["saved"]
    trained(base).load(str(saved), with_optimizer=True)


def test_all_files_of_a_checkpoint_have_the_same_mode(saved: Path) -> None:
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1


def test_a_folder_that_is_not_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "thesis.tex").touch()

    def write(folder: Path) -> None:
        (folder / checkpoint.ADAPTER_CONFIG_FILE).touch()

    info = checkpoint.StateInfo("some/model", LoraConfig(rank=1))
    with pytest.raises(
        CheckpointError, match="src was not changed: it holds no state.json or adapter_config"
    ):
        checkpoint.save(tmp_path / "src", info, write, None, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["src", "thesis.tex"]
    for _ in range(2):
        checkpoint.save(tmp_path / "mine", info, write, None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "src"]
