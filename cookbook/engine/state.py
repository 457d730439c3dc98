"""Checkpoint folders: written whole or not at all, checked when read, loadable with plain PEFT.

adapter_config.json, adapter_model.safetensors    what PEFT saves; of a full fine-tune a model folder instead
optimizer.safetensors                             Adam moments and step counts (training state only)
optimizer/                                        the same in parts, of weights that were dealt out
state.json                                        what it is, and the SHA-256 of the other files
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cookbook import files
from cookbook.errors import CheckpointError
from cookbook.types import LoraConfig

FORMAT = 1
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MODEL_CONFIG_FILE = "config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_FOLDER = "optimizer"
STATE_FILE = "state.json"

CHECKPOINT_FILES = (STATE_FILE, ADAPTER_CONFIG_FILE)
"""A folder that has none of these is no checkpoint, and is not replaced by one."""

_OF_EARLIER_VERSIONS = re.compile(
    r"\.(?P<name>[A-Za-z0-9].*)\.(?P<kind>writing|replaced)-(\d+|parts|link)", re.DOTALL
)
"""What those called a folder that they were at work on."""


@dataclass(frozen=True)
class StateInfo:
    """What `state.json` holds beside the checksums."""

    base_model: str
    lora: LoraConfig
    optimizer_steps: int = 0
    rng_state: Mapping[str, Any] | None = None
    microbatch_limits: Mapping[str, int] | None = None
    """Where memory ran out: the limits since, so that a resumed run cuts its batches the same way."""
    microbatch_recovery: Mapping[str, int] | None = None
    """When they are raised again."""
    world_size: int = 1
    """How many processes trained together: another number goes on to rounding, not to the bit."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    expires_at: str | None = None
    """Until when it is wanted, in ISO 8601; None: for good. Recorded, and not acted on."""

    def as_json(self) -> dict[str, Any]:
        """`expires_at` is there only where it says something."""
        values = asdict(self)
        if self.expires_at is None:
            del values["expires_at"]
        return values


def checkpoint_path(folder: Path, name: str) -> Path:
    """`folder/name`, or CheckpointError where the name could lead out of the folder."""
    if not files.PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is no name for a checkpoint. Use up to 128 letters, digits, '.', '_' and '-', "
            f"beginning with a letter or digit."
        )
    return folder / name


def save(
    path: Path,
    info: StateInfo,
    write_weights: Callable[[Path], None],
    optimizer: Mapping[str, Tensor] | None,
    overwrite: bool,
) -> None:
    """Writes a checkpoint beside `path` and renames it into place.

    Raises CheckpointError when the name is taken or the disk refuses; then nothing is left
    behind, and a checkpoint that was there before stays as it was.
    """
    check_name_is_free(path, overwrite)
    with (
        _explained(path),
        files.writing_folder(path, overwrite, sync=True, must_hold=CHECKPOINT_FILES) as folder,
    ):
        write_weights(folder)
        if optimizer is not None:
            _save_tensors(folder / OPTIMIZER_FILE, optimizer)
        written = sorted(file for file in folder.rglob("*") if file.is_file())
        checksums = {file.relative_to(folder).as_posix(): _sha256(file) for file in written}
        text = json.dumps({"format": FORMAT, **info.as_json(), "sha256": checksums}, indent=2)
        files.create(folder / STATE_FILE, text + "\n")


def check_name_is_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"Checkpoint {path} exists already. Choose another name, or pass overwrite=True."
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"Cannot save checkpoint {path}: {reason}.{_advice(error, path)}") from error


def remove_unfinished(folder: Path) -> None:
    """Clears up after a process that was killed while it saved. Nobody else may be writing to `folder`."""
    files.remove_abandoned(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (match := _OF_EARLIER_VERSIONS.fullmatch(path.name)) is None:
            continue
        if match["kind"] == "replaced" and not (folder / match["name"]).exists():
            files.rename(path, folder / match["name"])
        else:
            files.remove(path)


def _advice(error: Exception, path: Path) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not (full or "No space left" in str(error) or "File too large" in str(error)):
        return ""
    existing = next(parent for parent in path.parents if parent.exists())
    free_mib = shutil.disk_usage(existing).free / 2**20
    return (
        f" {free_mib:,.0f} MiB are free there: make room, or keep fewer checkpoints. Earlier ones are intact."
    )


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def checksum(tensors: Iterable[Tensor]) -> int:
    """The same for the same bits, made on the device: a sum of the words that hold them, each tensor's
    weighted by its place."""
    total = 0
    for place, tensor in enumerate(tensors, 1):
        words = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        total += place * int(words.sum(dtype=torch.int64))
    return total


def write_adapter(folder: Path, weights: Mapping[str, Tensor]) -> None:
    _save_tensors(folder / ADAPTER_FILE, weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading --------------------------------------------------------------------------------


def read_info(path: str | os.PathLike[str]) -> StateInfo:
    """What a checkpoint folder holds; a plain PEFT adapter folder or model folder will do.

    Raises CheckpointError where the folder is missing or is neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"Checkpoint {folder} does not exist. Give the path that save_state returned.")
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    if not is_adapter and not (folder / MODEL_CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {ADAPTER_CONFIG_FILE} (a LoRA) and no {MODEL_CONFIG_FILE} "
            f"(a full fine-tune)."
        )
    if not (folder / STATE_FILE).is_file():
        return _info_of_plain_adapter(folder) if is_adapter else StateInfo(str(folder), LoraConfig(rank=0))
    state = _read_json(folder / STATE_FILE)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"Checkpoint {folder} has format {state.get('format')!r}; this version reads {FORMAT}."
        )
    try:
        return StateInfo(
            base_model=state["base_model"],
            lora=LoraConfig(**state["lora"]),
            optimizer_steps=state["optimizer_steps"],
            rng_state=state["rng_state"],
            microbatch_limits=state.get("microbatch_limits"),
            microbatch_recovery=state.get("microbatch_recovery"),
            world_size=state.get("world_size", 1),
            user_metadata=state["user_metadata"],
            expires_at=state.get("expires_at"),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {STATE_FILE} lacks {error}.") from error


def _info_of_plain_adapter(folder: Path) -> StateInfo:
    config = _read_json(folder / ADAPTER_CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds a {config.get('peft_type')} adapter. Only LoRA can be loaded.")
    if not {"r", "lora_alpha"} <= config.keys():
        raise CheckpointError(f"Checkpoint {folder} is damaged: {ADAPTER_CONFIG_FILE} lacks r or lora_alpha.")
    for setting in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(setting):
            raise CheckpointError(
                f"{folder} is a LoRA with {setting}={config[setting]}. Only a LoRA that scales every layer "
                f"by alpha / rank can be loaded."
            )
    targets = config.get("target_modules") or []
    leaves = {name.rsplit(".", 1)[-1] for name in targets}
    attention_leaves = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"}
    lora = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        train_unembed="lm_head" in leaves,
        train_attn=bool(leaves & attention_leaves),
        train_mlp=bool(leaves - attention_leaves - {"lm_head"}),
    )
    return StateInfo(base_model=str(config.get("base_model_name_or_path")), lora=lora)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"Checkpoint {path.parent} is damaged: {path.name} cannot be read ({error})."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"Checkpoint {path.parent} is damaged: {path.name} holds no object.")
    return content


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The adapter's tensors. Raises CheckpointError where the file is missing or damaged.

    PEFT by itself saves a copy of the frozen projection to the vocabulary beside an adapter on it.
    """
    tensors = _read_tensors(Path(path).expanduser(), ADAPTER_FILE)
    return {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}


def optimizer_folder(path: str | os.PathLike[str]) -> Path | None:
    """Where the optimizer's tensors lie in parts, checked; None where they lie in one file."""
    folder = Path(path).expanduser()
    if not (folder / OPTIMIZER_FOLDER).is_dir():
        return None
    for name, recorded in _read_json(folder / STATE_FILE).get("sha256", {}).items():
        if name.startswith(f"{OPTIMIZER_FOLDER}/"):
            if not (folder / name).is_file():
                raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
            _check_sum(folder / name, recorded)
    return folder / OPTIMIZER_FOLDER


def read_optimizer(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The optimizer's tensors. Raises CheckpointError where they are missing or damaged."""
    folder = Path(path).expanduser()
    if not (folder / OPTIMIZER_FILE).is_file():
        raise CheckpointError(
            f"Checkpoint {folder} has no optimizer state. Load its weights alone (load_state), "
            f"or give a checkpoint made with save_state."
        )
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {STATE_FILE}.")
    return _read_tensors(folder, OPTIMIZER_FILE)


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
    if (folder / STATE_FILE).is_file():
        _check_sum(path, _read_json(folder / STATE_FILE).get("sha256", {}).get(name))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {folder} is damaged: {name} cannot be read ({error}). Load an earlier checkpoint."
        ) from error


def check_files(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError unless every file is there as it was saved."""
    folder = Path(path).expanduser()
    if not (folder / STATE_FILE).is_file():
        return
    for name, recorded in _read_json(folder / STATE_FILE).get("sha256", {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
        _check_sum(folder / name, recorded)


def _check_sum(path: Path, recorded: str | None) -> None:
    if recorded != _sha256(path):
        raise CheckpointError(
            f"Checkpoint {path.parent} is damaged: {path.name} is not what was saved (its SHA-256 differs). "
            f"Load an earlier checkpoint."
        )
