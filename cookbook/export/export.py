"""Runs an export, from its config to a folder or a repository."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cookbook.errors import CheckpointError, ConfigError, CookbookError
from cookbook.export import push
from cookbook.export.chat_format import ChatFormat, find_chat_format
from cookbook.export.config import ExportConfig
from cookbook.export.formats import WRITERS, Export
from cookbook.export.model_card import write_model_card
from cookbook.runs.find import TrainedModel, find_trained_model
from cookbook.utils import files
from cookbook.utils.notes import counted_noun
from cookbook.utils.rich_console import make_console, plain, plain_line

WRITTEN_FILES = (
    "README.md", "curves.png", "state.json", "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template.jinja", "adapter.gguf", "model*.gguf", "Modelfile",
)  # fmt: skip
"""All files that an export writes. overwrite=True removes no others."""


async def main(config: ExportConfig) -> str:
    """Exports, and prints what was written and what to run next. Returns the folder or the URL."""
    repository = config.repository
    folder = None if config.to.startswith(push.SCHEME) else Path(config.to).expanduser()
    if folder is not None:
        _check_empty(folder, config.overwrite)
    if repository is not None:
        push.check_access(repository)
    source = find_trained_model(config.checkpoint, config.which, config.base_model)
    chat_format = find_chat_format(source, config.chat_template)
    with _finished_folder(folder) as written:
        lines = _write(config, source, chat_format, written, folder or Path("."), repository)
        result = str(folder)
        if folder is None and repository is not None:
            result = push.push(written, repository, config.private, _message(config, source))
    console = make_console()
    for line in lines:
        console.print(plain(line), soft_wrap=True)
    if folder is not None and repository is not None:
        result = push.push(folder, repository, config.private, _message(config, source))
    if repository is not None:
        console.print(plain_line(f"Pushed to {result}"), soft_wrap=True)
    return result


def _write(
    config: ExportConfig,
    source: TrainedModel,
    chat_format: ChatFormat,
    folder: Path,
    shown: Path,
    repository: str | None,
) -> list[str]:
    """Fills the folder and returns the lines to print about it."""
    if shown.resolve() == source.folder.resolve():
        raise ConfigError(f"to={shown} is the checkpoint itself. Choose another folder.")
    name = config.name or source.name
    written = WRITERS[config.format](
        Export(config, source, chat_format, folder, str(shown), name, repository)
    )
    write_model_card(source, chat_format, written.usage, name, folder)
    where = str(shown) if repository is None or not config.to.startswith(push.SCHEME) else repository
    steps = f", after {counted_noun(source.step, 'step')}" if source.step is not None else ""
    lines = [f"{written.usage.kind} of {source.folder}{steps}:", f"  {where}"]
    lines += [
        part
        for fact in written.facts
        for part in textwrap.wrap(fact, 77, initial_indent="  ", subsequent_indent="  ")
    ]
    if written.commands:
        lines += ["Next:", *written.commands]
    return lines


def _message(config: ExportConfig, source: TrainedModel) -> str:
    return config.commit_message or f"{config.format} of {config.name or source.name}"


def _check_empty(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"to={folder} is a file. Give a folder, which need not exist.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not overwrite:
        raise ConfigError(f"to={folder} is not empty. Choose another folder, or set overwrite=True.")
    foreign = [
        name
        for name in names
        if not any(fnmatch(name, pattern) for pattern in WRITTEN_FILES) or not (folder / name).is_file()
    ]
    if foreign:
        raise ConfigError(
            f"to={folder} holds {foreign[0]}, which no export wrote, so nothing there is replaced. Choose "
            f"another folder."
        )


@contextmanager
def _finished_folder(folder: Path | None) -> Iterator[Path]:
    """Yields a new folder to fill, which replaces `folder` at the end, or is removed if `folder` is None."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield files.make_folder(Path(temporary) / "export")
        return
    place = folder.resolve()
    try:
        files.remove_abandoned(place.parent, place.name)
        with files.writing_folder(place, replace=True) as unfinished:
            yield unfinished
    except OSError as error:
        if isinstance(error, CookbookError):
            raise
        raise CheckpointError(f"Cannot write to={folder}: {error}.") from error
