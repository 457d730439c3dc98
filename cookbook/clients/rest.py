"""RestClient: lists, describes and removes the checkpoints on this machine, by `tinker://` paths."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from cookbook import embedded
from cookbook.clients.futures import APIFuture
from cookbook.engine import checkpoint, checkpoint_root
from cookbook.engine.checkpoint_root import CheckpointRoot
from cookbook.errors import CheckpointError, ConfigError, CookbookError, RequestError
from cookbook.types import (
    FOLDER_OF_TYPE,
    TINKER_SCHEME,
    Checkpoint,
    CheckpointsListResponse,
    CheckpointType,
    Cursor,
    ExternalWeightsUrlsResponse,
    GetServerCapabilitiesResponse,
    ParsedCheckpointTinkerPath,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    check_ttl,
)
from cookbook.utils import files, json_files

T = TypeVar("T")
AccessScope = Literal["owned", "accessible"]


class RestClient:
    """Lists, describes and removes checkpoints of this machine.

    Without a `root` it sees all runs that were saved without a `checkpoint_dir`. Every method returns a
    future, and has an `_async` twin. Those that raise CheckpointError for a run or a checkpoint that does not
    exist do so from the future.

    Sessions, billing, audit logs and publishing belong to the hosted service and are refused by name.
    """

    def __init__(
        self, *, base_url: str | None = None, api_key: str | None = None, root: CheckpointRoot | None = None
    ) -> None:
        if base_url is not None:
            raise ConfigError(
                f"base_url={base_url!r} names a server, and this client reads folders of this machine. Omit "
                f"it, or use the RestClient of the package tinker."
            )
        self._root = root or CheckpointRoot(says_tinker_paths=True)

    # -- runs -------------------------------------------------------------------------------

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> APIFuture[TrainingRunsResponse]:
        """Returns runs with a checkpoint, the newest first; with `project_id` those of that project."""

        def listed() -> TrainingRunsResponse:
            found = [run for name, folder in self._runs().items() if (run := _run(name, folder)) is not None]
            if project_id is not None:
                found = [run for run in found if (run.user_metadata or {}).get("project_id") == project_id]
            found.sort(key=lambda run: run.last_request_time, reverse=True)
            cursor = Cursor(offset, limit, len(found))
            return TrainingRunsResponse(found[offset : offset + limit], cursor)

        return _done(listed)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        return _done(lambda: self._found_run(training_run_id))

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        return _done(lambda: self._found_run(_parsed(tinker_path).training_run_id))

    # -- checkpoints ------------------------------------------------------------------------

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """Returns the checkpoints of a run, the newest first."""

        def listed() -> CheckpointsListResponse:
            folder = self._root.run(training_run_id)
            checkpoint_root.remove_expired(folder)
            return CheckpointsListResponse(_checkpoints(training_run_id, folder))

        return _done(listed)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """Returns the checkpoints of all runs, the newest first."""

        def listed() -> CheckpointsListResponse:
            found = [one for name, folder in self._runs().items() for one in _checkpoints(name, folder)]
            found.sort(key=lambda one: one.time, reverse=True)
            return CheckpointsListResponse(found[offset : offset + limit], Cursor(offset, limit, len(found)))

        return _done(listed)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Removes a checkpoint, of which `checkpoint_id` is "weights/<name>" or "sampler_weights/<name>"."""
        return self.delete_checkpoint_from_tinker_path(f"{TINKER_SCHEME}{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return _done(lambda: files.remove(self._folder(tinker_path), must_hold=[checkpoint.STATE_FILE]))

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copies a checkpoint into a new run, and returns the `tinker://` path of the copy.

        The copy has the name and kind of the source, does not inherit its time to live, and stays when the
        source is removed. `destination_project_id` is recorded with it, as that of a service is.
        """

        def copied() -> str:
            check_ttl(ttl_seconds)
            if weights_access_token is not None:
                raise RequestError("weights_access_token is not supported: there are no accounts. Omit it.")
            if self._root.own is not None:
                raise RequestError(
                    f"copy_weights makes a new run, and {self._root.own} holds one. Copy the folder of the "
                    f"checkpoint, or omit checkpoint_dir."
                )
            source, parsed = self._folder(path), _parsed(path)
            run_id, name = self._root.new_run_id(), parsed.checkpoint_id.partition("/")[2]
            place = checkpoint_root.place(self._root.new_run(run_id), parsed.checkpoint_type, name)
            checkpoint.copy(source, place, destination_project_id, _expiry(ttl_seconds))
            return f"{TINKER_SCHEME}{run_id}/{parsed.checkpoint_id}"

        return _done(copied)

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> APIFuture[None]:
        """Sets how long a checkpoint is kept from now on, in seconds, or for ever with None."""

        def set_ttl() -> None:
            check_ttl(ttl_seconds)
            path = self._folder(tinker_path) / checkpoint.STATE_FILE
            state = json_files.read_object(path, CheckpointError, "Save the checkpoint again.")
            state.pop("expires_at", None)
            files.write(path, json.dumps({**state, **_expiry(ttl_seconds)}, indent=2) + "\n")

        return _done(set_ttl)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """Returns the base model and the adapter's settings of a checkpoint."""

        def info() -> WeightsInfoResponse:
            found = checkpoint.read_info(self._folder(tinker_path))
            is_lora = found.lora.rank > 0
            return WeightsInfoResponse(
                base_model=found.base_model,
                is_lora=is_lora,
                lora_rank=found.lora.rank if is_lora else None,
                train_unembed=found.lora.train_unembed,
                train_mlp=found.lora.train_mlp,
                train_attn=found.lora.train_attn,
            )

        return _done(info)

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """Returns a `file://` URL for each file of a checkpoint of `save_weights_external`."""

        def urls() -> ExternalWeightsUrlsResponse:
            folder = self._folder(tinker_path).resolve()
            if _parsed(tinker_path).checkpoint_type != "external":
                raise RequestError(f"{tinker_path} was not saved by save_weights_external.")
            names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            return ExternalWeightsUrlsResponse(
                urls={
                    path.relative_to(folder).as_posix(): path.as_uri()
                    for path in names
                    if path.name != checkpoint.STATE_FILE
                },
                expires=checkpoint_root.expires_at(folder) or datetime.now(UTC) + timedelta(days=1),
            )

        return _done(urls)

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """Returns the models and devices of this machine. Other models can be named as well."""
        return _done(_capabilities)

    def _runs(self) -> Mapping[str, Path]:
        runs = self._root.runs()
        for folder in runs.values():
            checkpoint_root.remove_expired(folder)
        return runs

    def _folder(self, tinker_path: str) -> Path:
        _parsed(tinker_path)
        return Path(self._root.folder(tinker_path))

    def _found_run(self, training_run_id: str) -> TrainingRun:
        run = _run(training_run_id, self._root.run(training_run_id))
        if run is None:
            raise CheckpointError(f"The training run {training_run_id!r} has no checkpoint.")
        return run

    def __getattr__(self, name: str) -> Any:
        """Returns the `_async` twin of a method. Raises RequestError for one of the hosted service."""
        method = name.removesuffix("_async")
        if method in HOSTED_ONLY:
            raise RequestError(f"RestClient.{name} is not supported: {HOSTED_ONLY[method]}.")
        if name.endswith("_async") and not name.startswith("_") and hasattr(type(self), method):
            call = getattr(self, method)

            async def twin(*args: Any, **kwargs: Any) -> Any:
                return await call(*args, **kwargs)

            return twin
        raise AttributeError(f"RestClient has no attribute {name!r}")


_SESSIONS = "there are no sessions in process; list_training_runs has the runs"
_ACCOUNTS = "there are no accounts here, and checkpoints are folders"
HOSTED_ONLY = {
    "assign_session_project": _SESSIONS,
    "export_session_trace": _SESSIONS,
    "get_session": _SESSIONS,
    "get_sampler": _SESSIONS,
    "list_sessions": _SESSIONS,
    "search_sessions": _SESSIONS,
    "get_audit_log": _ACCOUNTS,
    "get_billing_usage": _ACCOUNTS,
    "get_current_checkpoint_storage_usage": _ACCOUNTS,
    "publish_checkpoint_from_tinker_path": _ACCOUNTS,
    "unpublish_checkpoint_from_tinker_path": _ACCOUNTS,
    "whoami": _ACCOUNTS,
}


def _done(work: Callable[[], T]) -> APIFuture[T]:
    """Returns the completed future of a short piece of work."""
    try:
        return APIFuture.completed(work())
    except (CookbookError, OSError) as error:
        return APIFuture.failed(error)


def _expiry(ttl_seconds: int | None) -> dict[str, str]:
    """Returns what state.json says of a time to live that begins now."""
    if ttl_seconds is None:
        return {}
    expires_at = datetime.now(UTC) + timedelta(seconds=ttl_seconds)
    return {"expires_at": expires_at.isoformat(timespec="seconds")}


def _parsed(tinker_path: str) -> ParsedCheckpointTinkerPath:
    return ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)


def _run(name: str, folder: Path) -> TrainingRun | None:
    """Returns a run, or None for a folder without a checkpoint that can be read."""
    checkpoints = _checkpoints(name, folder)
    for one in checkpoints:
        kind, _, checkpoint_name = one.checkpoint_id.partition("/")
        try:
            info = checkpoint.read_info(checkpoint_root.place(folder, _KIND_OF[kind], checkpoint_name))
        except CheckpointError:
            continue
        newest: dict[CheckpointType, Checkpoint] = {}
        for other in checkpoints:
            newest.setdefault(other.checkpoint_type, other)
        return TrainingRun(
            training_run_id=name,
            base_model=info.base_model,
            model_owner=folder.owner(),
            is_lora=info.lora.rank > 0,
            lora_rank=info.lora.rank or None,
            last_request_time=checkpoints[0].time,
            last_checkpoint=newest.get("training"),
            last_sampler_checkpoint=newest.get("sampler"),
            user_metadata=dict(info.user_metadata),
        )
    return None


_KIND_OF: dict[str, CheckpointType] = {folder: kind for kind, folder in FOLDER_OF_TYPE.items()}


def _checkpoints(run: str, folder: Path) -> list[Checkpoint]:
    """Returns the checkpoints of a run, the newest first."""
    found = []
    for kind, path in checkpoint_root.checkpoints_of(folder):
        try:
            state = json_files.read_object(path / checkpoint.STATE_FILE, CheckpointError, "")
            metadata = state.get("user_metadata")
            sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            time = datetime.fromtimestamp((path / checkpoint.STATE_FILE).stat().st_mtime, UTC)
        except (OSError, ValueError, CheckpointError):  # removed meanwhile, or damaged: it cannot be loaded
            continue
        checkpoint_id = f"{FOLDER_OF_TYPE[kind]}/{path.name}"
        found.append(
            Checkpoint(
                checkpoint_id=checkpoint_id,
                checkpoint_type=kind,
                time=time,
                tinker_path=f"{TINKER_SCHEME}{run}/{checkpoint_id}",
                size_bytes=sum(sizes),
                user_metadata=metadata if isinstance(metadata, dict) else None,
                expires_at=checkpoint_root.expires_at(path),
            )
        )
    return sorted(found, key=lambda one: one.time, reverse=True)


def _capabilities() -> GetServerCapabilitiesResponse:
    """Returns the embedded model, the models in the hub's cache, and the devices."""
    import torch
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    names = [embedded.MODEL_NAME]
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    names += sorted(repo.repo_id for repo in repos if repo.repo_type == "model")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return GetServerCapabilitiesResponse([SupportedModel(name) for name in names], devices)
