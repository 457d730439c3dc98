"""Checkpoint folders: written completely or not at all, checked when read, loadable with plain PEFT.

adapter_config.json, adapter_model.safetensors    the files of PEFT, or of a model if fully fine-tuned
optimizer.safetensors                             Adam moments and step counts (training state only)
optimizer/                                        the same in parts, if the weights were sharded
state.json                                        the kind of checkpoint, and SHA-256 of the other files
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cookbook.engine import tensor_files
from cookbook.engine.model import peft_settings
from cookbook.errors import CheckpointError
from cookbook.types import LoraConfig
from cookbook.utils import files, json_files, pretrained
from cookbook.utils.json_files import Count, JsonOrigin, Positive

FORMAT = 1
ADAPTER_FILE = peft_settings.ADAPTER_FILE
ADAPTER_CONFIG_FILE = peft_settings.CONFIG_FILE
MODEL_CONFIG_FILE = "config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_FOLDER = "optimizer"
STATE_FILE = "state.json"

CHECKPOINT_FILES = (STATE_FILE, ADAPTER_CONFIG_FILE)
"""A folder without any of these files is not a checkpoint, and is never replaced by one."""

_OF_EARLIER_VERSIONS = re.compile(
    r"\.(?P<name>[A-Za-z0-9].*)\.(?P<kind>writing|replaced)-(\d+|parts|link)", re.DOTALL
)
"""Names of unfinished folders that earlier versions wrote."""


@dataclass(frozen=True)
class StateInfo:
    """The content of `state.json` besides the checksums."""

    base_model: str
    lora: LoraConfig
    optimizer_steps: Count = 0
    rng_state: Mapping[str, Any] | None = None
    microbatch_limits: Mapping[str, Positive] | None = None
    """The limits since memory ran out. A resumed run plans the same micro-batches with them."""
    microbatch_recovery: Mapping[str, Count] | None = None
    """When the limits are raised again."""
    world_size: Positive = 1
    """How many processes trained together. With another number a run resumes to rounding, not bit for bit."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    expires_at: str | None = None
    """The time until which the checkpoint is wanted, in ISO 8601, or None."""

    def as_json(self) -> dict[str, Any]:
        """Returns the values as JSON, with `expires_at` only if it is set."""
        values = {**asdict(self), "lora": self.lora.as_json()}
        if self.expires_at is None:
            del values["expires_at"]
        return values


def checkpoint_path(folder: Path, name: str) -> Path:
    """Returns `folder/name`. Raises CheckpointError if the name could lead out of the folder."""
    if not files.PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"Invalid checkpoint name {name!r}. Use up to 128 letters, digits, '.', '_' and '-', "
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

    Raises CheckpointError if the name is taken or writing fails. No files are left behind then, and an
    earlier checkpoint of that name is unchanged.
    """
    check_name_is_free(path, overwrite)
    with (
        _explained(path),
        files.writing_folder(path, overwrite, sync=True, must_hold=CHECKPOINT_FILES) as folder,
    ):
        write_weights(folder)
        if optimizer is not None:
            tensor_files.write_all(folder / OPTIMIZER_FILE, optimizer)
        written = sorted(file for file in folder.rglob("*") if file.is_file())
        checksums = {file.relative_to(folder).as_posix(): _sha256(file) for file in written}
        text = json.dumps({"format": FORMAT, **info.as_json(), "sha256": checksums}, indent=2)
        files.create(folder / STATE_FILE, text + "\n")


def copy(folder: Path, new: Path, project_id: str | None, expiry: Mapping[str, str]) -> None:
    """Writes a copy of a checkpoint, of another project and with another time to live."""
    check_name_is_free(new, overwrite=False)
    state = {name: value for name, value in _read_state(folder).items() if name != "expires_at"}
    if project_id is not None:
        state["user_metadata"] = {**state.get("user_metadata", {}), "project_id": project_id}
    with _explained(new), files.writing_folder(new, sync=True) as unfinished:
        for path in sorted(folder.rglob("*")):
            files.refuse_link(path)
            place = unfinished / path.relative_to(folder)
            if path.is_dir():
                files.make_folder(place)
            elif path.is_file():
                files.copy(path, place)
        files.write(unfinished / STATE_FILE, json.dumps({**state, **expiry}, indent=2) + "\n")


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
    """Removes what killed processes left unfinished. No other process may be writing to `folder`."""
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
        f" {free_mib:,.0f} MiB are free there: free some space, or keep fewer checkpoints. "
        f"Earlier ones are intact."
    )


def checksum(tensors: Iterable[Tensor]) -> int:
    """Returns a checksum of the bits: the sum of each tensor's words, weighted by the tensor's index.

    It is computed on the device.
    """
    total = 0
    for place, tensor in enumerate(tensors, 1):
        words = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        total += place * int(words.sum(dtype=torch.int64))
    return total


def write_adapter(folder: Path, weights: Mapping[str, Tensor]) -> None:
    tensor_files.write_all(folder / ADAPTER_FILE, weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading --------------------------------------------------------------------------------


def read_info(path: str | os.PathLike[str]) -> StateInfo:
    """Returns the content of a checkpoint folder, which may be a plain PEFT adapter folder or model folder.

    Raises CheckpointError if the folder is missing or is neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"Checkpoint {folder} does not exist. Give the path that save_state returned.")
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    if not is_adapter and not (folder / MODEL_CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {ADAPTER_CONFIG_FILE} (a LoRA) and no "
            f"{MODEL_CONFIG_FILE} (a full fine-tune)."
        )
    adapter = peft_settings.read(folder) if is_adapter else None
    if not (folder / STATE_FILE).exists():
        return StateInfo(str(folder), LoraConfig(rank=0)) if adapter is None else _info_of(folder, adapter)
    state = _read_state(folder)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"Checkpoint {folder} has format {state.get('format')!r}; this version reads {FORMAT}."
        )
    origin = _origin(folder / STATE_FILE)
    needed = {"optimizer_steps": Count, "user_metadata": Mapping[str, str]}
    json_files.check(state, needed, origin)
    known = {key: value for key, value in state.items() if key not in ("format", "sha256")}
    info = json_files.record_of(StateInfo, known, origin)
    ours = (info.lora.rank, info.lora.alpha)
    theirs = (0, ours[1]) if adapter is None else (adapter["r"], adapter["lora_alpha"])
    if ours != theirs:
        origin.refuse(
            f"`lora` has rank {ours[0]} and alpha {ours[1]:g}, and the weights beside it have rank "
            f"{theirs[0]} and alpha {theirs[1]:g}"
        )
    if adapter is None:
        return info
    if bool(adapter.get("use_rslora")) != info.lora.use_rslora:
        origin.refuse(
            f"`lora` has use_rslora={info.lora.use_rslora}, and {ADAPTER_CONFIG_FILE} beside it has "
            f"use_rslora={json_files.shown(adapter.get('use_rslora'))}"
        )
    return replace(info, lora=replace(info.lora, peft=peft_settings.settings_of(folder, adapter)))


def _info_of(folder: Path, config: Mapping[str, Any]) -> StateInfo:
    """Returns the info of another program's adapter, whose tensors show which layers are adapted."""
    modules = peft_settings.parts_of(folder, config).modules
    leaves = {name.rpartition(".")[2] for name in modules}
    attention_leaves = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"}
    lora = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        train_unembed="lm_head" in leaves,
        train_attn=bool(leaves & attention_leaves),
        train_mlp=bool(leaves - attention_leaves - {"lm_head"}),
        dropout=0.0 if config.get("use_dora") else config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
        peft=peft_settings.settings_of(folder, config),
    )
    return StateInfo(base_model=str(config.get("base_model_name_or_path")), lora=lora)


def dropout_of(path: str | os.PathLike[str]) -> float:
    """Returns the dropout that an adapter was trained with."""
    folder = Path(path).expanduser()
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return 0.0
    return peft_settings.read(folder).get("lora_dropout") or 0.0


def _origin(path: Path) -> JsonOrigin:
    return JsonOrigin(str(path), CheckpointError, "Load an earlier checkpoint.")


def _read_state(folder: Path) -> dict[str, Any]:
    """Returns the content of state.json, after checking that its checksums name files in the folder."""
    origin = _origin(folder / STATE_FILE)
    shape = {"sha256": Mapping[str, str] | None}
    state = json_files.read_object(folder / STATE_FILE, origin.error, origin.repair, shape)
    for name in state.get("sha256") or ():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            origin.refuse(f"`sha256` names {name!r}, which is not a file of the checkpoint")
    return state


def _checksums(folder: Path) -> Mapping[str, str]:
    found: Mapping[str, str] = _read_state(folder).get("sha256") or {}
    return found


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the adapter's tensors. Raises CheckpointError if the file is missing or damaged.

    Besides an adapter on the projection to the vocabulary, PEFT saves a copy of the frozen projection. The
    copy is skipped.
    """
    tensors = _read_tensors(Path(path).expanduser(), ADAPTER_FILE)
    return {name: tensor for name, tensor in tensors.items() if not peft_settings.is_frozen_copy(name)}


def optimizer_folder(path: str | os.PathLike[str]) -> Path | None:
    """Returns the checked folder with the optimizer's tensors in parts, or None if they are in one file."""
    folder = Path(path).expanduser()
    if not (folder / OPTIMIZER_FOLDER).is_dir():
        return None
    for name, recorded in _checksums(folder).items():
        if name.startswith(f"{OPTIMIZER_FOLDER}/"):
            if not (folder / name).is_file():
                raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
            _check_sum(folder / name, recorded)
    return folder / OPTIMIZER_FOLDER


def read_optimizer(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the optimizer's tensors. Raises CheckpointError if they are missing or damaged."""
    folder = Path(path).expanduser()
    if not (folder / OPTIMIZER_FILE).is_file():
        raise CheckpointError(
            f"Checkpoint {folder} has no optimizer state. Load its weights alone (load_state), "
            f"or give a checkpoint that save_state wrote."
        )
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {STATE_FILE}.")
    return _read_tensors(folder, OPTIMIZER_FILE)


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if name == ADAPTER_FILE:
        pretrained.refuse_pickled_adapter(folder)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
    if (folder / STATE_FILE).is_file():
        _check_sum(path, _checksums(folder).get(name))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {folder} is damaged: {name} cannot be read ({error}). Load an earlier checkpoint."
        ) from error


def check_files(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError unless every file is as it was saved."""
    folder = Path(path).expanduser()
    if not (folder / STATE_FILE).is_file():
        return
    for name, recorded in _checksums(folder).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {name}.")
        _check_sum(folder / name, recorded)


def _check_sum(path: Path, recorded: str | None) -> None:
    _check_size(path)
    if recorded != _sha256(path):
        raise CheckpointError(
            f"Checkpoint {path.parent} is damaged: {path.name} is not what was saved (its SHA-256 differs). "
            f"Load an earlier checkpoint."
        )


def _check_size(path: Path) -> None:
    """Raises CheckpointError for a file that is larger than its content: its checksum could take hours."""
    size = path.stat().st_size
    if size <= json_files.MAX_BYTES:
        return
    problem = f"has {size:,} bytes"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({error})"
    raise CheckpointError(
        f"Checkpoint {path.parent} is damaged: {path.name} {problem}. Load an earlier checkpoint."
    )
