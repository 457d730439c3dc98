"""The models that OpenAI's clients name: base models, runs and checkpoints, each with its chat format."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import models
from cookbook.errors import CheckpointError, CookbookError
from cookbook.runs.find import find_trained_model, recorded_template_kwargs
from cookbook.server.promises import Refusal
from cookbook.server.state import ServerState
from cookbook.types import TINKER_SCHEME
from cookbook.utils import files
from renderers import Renderer, get_renderer

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient


@dataclass
class LoadedModel:
    """A model that is sampled with, and the renderer of its chats."""

    client: SamplingClient
    renderer: Renderer
    base_model: str
    context_length: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a conversation is rendered or a reply is parsed."""
    num_users: int = 0
    last_used: float = field(default_factory=time.monotonic)


class NamedModels:
    """Finds models by name and loads them. The least recently used are closed beyond `max_loaded`."""

    def __init__(self, state: ServerState, max_loaded: int = 8) -> None:
        self._state = state
        self._max_loaded = max_loaded
        self._loaded: dict[str, asyncio.Task[LoadedModel]] = {}
        self._runs = run_folders(state.options.runs)

    # -- names ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Returns the base models, the runs, and the checkpoints that clients have saved for sampling."""
        return [*self._state.options.models, *self._runs, *self._state.store.sampler_paths()]

    def folder_of(self, name: str) -> str | None:
        """Returns the folder of a checkpoint or a run, or None for a base model.

        Raises CheckpointError for a name that means nothing here. No name leads out of the served folders.
        """
        if name in self._state.options.models:
            return None
        if name.startswith(TINKER_SCHEME):
            return str(self._state.store.path_of(name))
        run, _, checkpoint_name = name.partition("/")
        folder = self._runs.get(run)
        if folder is not None and not checkpoint_name:
            return str(folder)
        if folder is not None and files.PLAIN_NAME.fullmatch(checkpoint_name):
            path = folder / "checkpoints" / checkpoint_name
            if path.is_dir() and not path.is_symlink():
                return str(path)
        known = ", ".join(self.names())
        raise CheckpointError(
            f"There is no model {name!r} on this server. It has: {known}. Start it with runs=<folder> to "
            f"serve the runs and checkpoints there."
        )

    # -- loading ----------------------------------------------------------------------------

    async def load(self, name: str) -> LoadedModel:
        """Returns a loaded model, which the caller gives back with `release`.

        Raises Refusal for an unknown name, and CookbookError for files that cannot be loaded.
        """
        try:
            key = await asyncio.to_thread(self._key, name)
        except CookbookError as error:
            raise Refusal(404, self._state.without_folder(str(error))) from error
        if key not in self._loaded:
            self._loaded[key] = asyncio.create_task(self._load_in_room(name, key))
        try:
            loaded = await asyncio.shield(self._loaded[key])
        except Exception:
            self._loaded.pop(key, None)
            raise
        loaded.num_users += 1
        loaded.last_used = time.monotonic()
        return loaded

    def release(self, loaded: LoadedModel) -> None:
        loaded.num_users -= 1

    def _key(self, name: str) -> str:
        """Returns what is loaded for a name: a folder, which for a run changes with its best checkpoint."""
        folder = self.folder_of(name)
        return name if folder is None else str(find_trained_model(folder).folder.resolve())

    async def _load_in_room(self, name: str, key: str) -> LoadedModel:
        """Closes models that are not in use beyond `max_loaded`, then loads."""
        unused = [
            (task.result().last_used, key)
            for key, task in self._loaded.items()
            if task.done() and task.exception() is None and not task.result().num_users
        ]
        for _, other in sorted(unused)[: max(0, len(self._loaded) - self._max_loaded)]:
            await asyncio.to_thread(self._loaded.pop(other).result().client.close)
        return await asyncio.to_thread(self._load, name, key)

    def _load(self, name: str, key: str) -> LoadedModel:
        service = self._state.service
        recorded: Mapping[str, str] = {}
        if key == name:
            base_model, client = name, service.create_sampling_client(base_model=name)
        else:
            source = find_trained_model(key)
            base_model, recorded = source.origin, source.info.user_metadata or {}
            client = service.create_sampling_client(source.folder, base_model)
        return LoadedModel(
            client,
            renderer_of(base_model, recorded, client.get_tokenizer()),
            base_model,
            models.context_length(base_model) or 2**20,
        )


def renderer_of(base_model: str, recorded: Mapping[str, str], tokenizer: Any) -> Renderer:
    """Returns the renderer that a checkpoint was trained with, or the one that suits its base model."""
    name = recorded.get("renderer_name") or models.recommended_renderer(base_model)
    is_recorded = "renderer_name" in recorded
    return get_renderer(
        name,
        tokenizer,
        recorded.get("system_prompt"),
        is_recorded and recorded.get("tools_in_system") == "True",
        recorded_template_kwargs(recorded) if is_recorded else None,
    )


def run_folders(given: Sequence[Path]) -> dict[str, Path]:
    """Returns the runs and checkpoints in the given folders by their names.

    A folder is one of a run or of a checkpoint, or holds such folders. Raises CheckpointError otherwise.
    """
    found: dict[str, Path] = {}
    for folder in given:
        folder = folder.expanduser()
        inside = [folder] if _is_model(folder) else []
        if not inside and folder.is_dir():
            inside = [path for path in sorted(folder.iterdir()) if _is_model(path)]
        if not inside:
            raise CheckpointError(f"{folder} must be the folder of a run or of a checkpoint, or hold some.")
        for path in inside:
            name = path.resolve().name
            if not files.PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"{path} cannot be served by its name. Rename it.")
            if found.setdefault(name, path) != path:
                raise CheckpointError(f"{found[name]} and {path} have one name. Serve one of them.")
    return found


def _is_model(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return any(
        (folder / name).is_file() for name in ("checkpoints.jsonl", "adapter_config.json", "state.json")
    )
