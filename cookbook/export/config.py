"""`ExportConfig`: the checkpoint to export, the format and the target."""

from __future__ import annotations

import functools
import re
from typing import Literal, TypeAlias

import chz

from cookbook.errors import ConfigError
from cookbook.export import llama_quantize, push
from cookbook.runs.checkpoints import Which
from cookbook.utils.nearest import unknown_name

_field = functools.partial(chz.field, validator=chz.validators.typecheck)

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
GgufType: TypeAlias = Literal["auto", "f32", "f16", "bf16", "q8_0"]
FORMATS = ("adapter", "merged", "gguf", "ollama")


@chz.chz
class ExportConfig:
    """The checkpoint to export, the format and the target."""

    checkpoint: str = _field(doc="folder of a run, of one of its checkpoints, or of a PEFT adapter")
    to: str = _field(doc="folder to write, or hf://owner/name on the Hugging Face hub")
    format: str = _field(default="adapter", doc="adapter, merged, gguf or ollama")
    which: Which | None = _field(
        default=None, doc="checkpoint of a run: best or last; default: the best, if the run records one"
    )
    base_model: str | None = _field(
        default=None, doc="folder or hub id of the base model; default: the one that the checkpoint names"
    )
    name: str | None = _field(default=None, doc="name of the model; default: the name of its run")
    chat_template: str | None = _field(
        default=None, doc="Jinja file to export; default: a template that prints what the renderer does"
    )
    dtype: Dtype = _field(
        default="auto",
        doc="dtype of merged weights: bfloat16, float16, float32, or auto (that of the base model)",
    )
    max_shard_size: str = _field(default="4GB", doc="largest size of a file of merged weights")
    gguf_type: GgufType = _field(
        default="auto", doc="type of a GGUF file: f32, f16, bf16, q8_0, or auto (that of the base model)"
    )
    gguf_quantize: llama_quantize.QuantizedType | None = _field(
        default=None,
        doc=f"a smaller GGUF file besides, made by llama.cpp's {llama_quantize.PROGRAM} where it is "
        f"installed, else its command is printed: {', '.join(llama_quantize.TYPES)}",
    )
    ollama_base: str | None = _field(
        default=None, doc="model in Ollama's library, to which the Modelfile adds the adapter alone"
    )
    overwrite: bool = _field(default=False, doc="replace an earlier export in the folder")
    push_to: str | None = _field(default=None, doc="owner/name on the hub to push the folder to as well")
    private: bool = _field(default=True, doc="make the repository private")
    commit_message: str | None = _field(
        default=None, doc="message of the commit on the hub; default: the format and the name"
    )

    @chz.validate
    def _check_values(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(unknown_name("format", self.format, FORMATS))
        if self.gguf_quantize is not None and self.format != "gguf":
            raise ConfigError(f"gguf_quantize= applies to format=gguf only, not to format={self.format}.")
        if self.ollama_base is not None and self.format != "ollama":
            raise ConfigError(f"ollama_base= applies to format=ollama only, not to format={self.format}.")
        if not re.fullmatch(r"\d+(\.\d+)?[TGMK]B", self.max_shard_size.upper()):
            raise ConfigError(
                f"Invalid max_shard_size={self.max_shard_size}: write a number and a unit, as in 4GB or "
                f"500MB."
            )

    @property
    def repository(self) -> str | None:
        """The repository to push to, as owner/name, or None."""
        name = self.to if self.to.startswith(push.SCHEME) else self.push_to
        return None if name is None else push.repository_of(name)
