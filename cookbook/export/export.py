"""One export from its config to a folder or a repository."""

from __future__ import annotations

import functools
import re
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import chz

from cookbook.errors import CheckpointError, ConfigError, CookbookError
from cookbook.export import push
from cookbook.export.chat_format import ChatFormat, find_chat_format
from cookbook.export.formats import FORMATS, Job
from cookbook.export.gguf_weights import GgufType
from cookbook.export.merged_folder import Dtype
from cookbook.export.model_card import write_model_card
from cookbook.runs.find import Source, Which, find_source
from cookbook.utils import files
from cookbook.utils.consoles import make_console, plain, plain_line

_field = functools.partial(chz.field, validator=chz.validators.typecheck)

WRITTEN_FILES = (
    "README.md", "curves.png", "state.json", "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template.jinja", "adapter.gguf", "model*.gguf", "Modelfile",
)  # fmt: skip
"""What an export writes, and so all that overwrite=True removes."""


@chz.chz
class Config:
    """What to export, as what, and where to."""

    checkpoint: str = _field(doc="folder of a run, of one of its checkpoints, or of a PEFT adapter")
    to: str = _field(doc="folder to write, or hf://owner/name on the Hugging Face hub")
    format: str = _field(default="adapter", doc="adapter, merged, gguf or ollama")
    which: Which | None = _field(
        default=None, doc="of a run: best or last; default: the best, if it keeps track of one"
    )
    base_model: str | None = _field(
        default=None, doc="where the base model is; default: where the checkpoint says"
    )
    name: str | None = _field(default=None, doc="what the model is called; default: as its run")
    chat_template: str | None = _field(
        default=None, doc="a Jinja file to send along; default: one that prints what the renderer does"
    )
    dtype: Dtype = _field(
        default="auto",
        doc="of merged weights: bfloat16, float16, float32, or auto, as the base model has them",
    )
    max_shard_size: str = _field(default="4GB", doc="of a file of merged weights")
    gguf_type: GgufType = _field(
        default="auto", doc="of a GGUF file: f32, f16, bf16, q8_0, or auto, as the base model has them"
    )
    ollama_base: str | None = _field(
        default=None, doc="a model of Ollama's library: the Modelfile puts the adapter alone on it"
    )
    overwrite: bool = _field(default=False, doc="replace an earlier export in the folder")
    push_to: str | None = _field(default=None, doc="owner/name on the hub to push the folder to as well")
    private: bool = _field(default=True, doc="make the repository private")
    commit_message: str | None = _field(default=None, doc="of the commit on the hub; default: what it is")

    @chz.validate
    def _check_values(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format} is unknown. Use one of {', '.join(FORMATS)}.")
        if self.ollama_base is not None and self.format != "ollama":
            raise ConfigError("ollama_base= is for format=ollama.")
        if not re.fullmatch(r"\d+(\.\d+)?[TGMK]B", self.max_shard_size.upper()):
            raise ConfigError(f"max_shard_size={self.max_shard_size} is no size. Write 4GB, or 500MB.")

    @property
    def repository(self) -> str | None:
        """owner/name to push to."""
        name = self.to if self.to.startswith(push.SCHEME) else self.push_to
        return None if name is None else push.repository_of(name)


async def main(config: Config) -> str:
    """Exports, and prints what was written and what to run next. Returns the folder or the address."""
    repository = config.repository
    folder = None if config.to.startswith(push.SCHEME) else Path(config.to).expanduser()
    if folder is not None:
        _check_empty(folder, config.overwrite)
    if repository is not None:
        push.check_access(repository)
    source = find_source(config.checkpoint, config.which, config.base_model)
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
    config: Config, source: Source, chat_format: ChatFormat, folder: Path, shown: Path, repository: str | None
) -> list[str]:
    """Fills the folder; what is printed about it."""
    if shown.resolve() == source.folder.resolve():
        raise ConfigError(f"to={shown} is the checkpoint itself. Choose another folder.")
    name = config.name or source.name
    written = FORMATS[config.format](Job(config, source, chat_format, folder, str(shown), name, repository))
    write_model_card(source, chat_format, written.usage, name, folder)
    where = str(shown) if repository is None or not config.to.startswith(push.SCHEME) else repository
    steps = f", after {source.step:,} steps" if source.step is not None else ""
    lines = [f"{written.usage.kind} of {source.folder}{steps}:", f"  {where}"]
    lines += [
        part
        for fact in written.facts
        for part in textwrap.wrap(fact, 77, initial_indent="  ", subsequent_indent="  ")
    ]
    if written.commands:
        lines += ["Next:", *written.commands]
    return lines


def _message(config: Config, source: Source) -> str:
    return config.commit_message or f"{config.format} of {config.name or source.name}"


def _check_empty(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"to={folder} is a file. Give a folder, which need not exist.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not overwrite:
        raise ConfigError(f"to={folder} is not empty. Choose another folder, or say overwrite=True.")
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
    """A folder to fill, which takes the place of `folder` when it is whole; None: it goes again."""
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
