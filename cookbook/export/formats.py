"""The export formats. Each is a function that fills a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cookbook import models
from cookbook.engine import checkpoint
from cookbook.engine.model import peft_settings
from cookbook.errors import CheckpointError, ConfigError
from cookbook.export import gguf_weights, llama_quantize, ollama, serving
from cookbook.export.chat_format import ChatFormat
from cookbook.export.config import ExportConfig
from cookbook.export.merge import base_model_folder, merged_weights, tied_weights
from cookbook.export.merged_folder import Merged, write_merged
from cookbook.export.model_card import Usage, fenced, python_usage
from cookbook.export.updates import LowRank, read_updates
from cookbook.runs.find import TrainedModel, path_elsewhere, public_name
from cookbook.utils import files, pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Export:
    """The arguments of one export."""

    config: ExportConfig
    source: TrainedModel
    chat_format: ChatFormat
    folder: Path
    """The folder to fill, which is temporary."""
    shown_folder: str
    """The final folder, for messages."""
    name: str
    repository: str | None

    @property
    def slug(self) -> str:
        """Returns the name in characters that servers accept."""
        return re.sub(r"[^a-z0-9._-]+", "-", self.name.lower()).strip("-._") or "model"

    @property
    def place(self) -> str:
        """Returns the path to load the export from: its repository, or the current folder."""
        return self.repository or "."


class Written(NamedTuple):
    """The facts about an export, for the model card and the terminal."""

    usage: Usage
    facts: list[str]
    commands: list[str]


def write_adapter(export: Export) -> Written:
    """Writes the adapter as PEFT saves it, and the tokenizer, but not the state that only a resume needs."""
    source = export.source
    if source.is_full:
        raise CheckpointError(
            f"{source.folder} is a full fine-tune: there is no adapter in it. Export format=merged."
        )
    base = public_name(source.base_model)
    info = checkpoint.StateInfo(base, source.info.lora, user_metadata=source.info.user_metadata)

    def write(folder: Path) -> None:
        checkpoint.read_weights(source.folder)  # raises if the file is damaged
        files.copy(source.folder / checkpoint.ADAPTER_FILE, folder / checkpoint.ADAPTER_FILE)
        config = peft_settings.read(source.folder)
        config["base_model_name_or_path"] = base
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = sorted(config["target_modules"])
        text = json.dumps(config, indent=2) + "\n"
        files.write(folder / checkpoint.ADAPTER_CONFIG_FILE, text)
        export.chat_format.write_tokenizer(folder)

    checkpoint.save(export.folder, info, write, optimizer=None, overwrite=True)
    notes = serving.vllm_notes(source, export.chat_format, is_adapter=True)
    here = serving.vllm_adapter(
        source, models.model_location(source.base_model), export.shown_folder, export.slug
    )
    elsewhere = serving.vllm_adapter(source, path_elsewhere(source.base_model), export.place, export.slug)
    code = python_usage(source, export.chat_format, export.repository, is_adapter=True)
    usage = Usage(code, "python", "peft", "LoRA adapter", [*_shell(elsewhere), *notes])
    return Written(usage, notes, [here] if here else [])


def write_merged_weights(export: Export) -> Written:
    """Writes a model folder for transformers, vLLM and other programs that read such folders."""
    source, chat_format = export.source, export.chat_format
    merged = write_merged(
        source, chat_format, export.folder, export.config.dtype, export.config.max_shard_size
    )
    notes = serving.vllm_notes(source, chat_format, is_adapter=False)
    code = python_usage(source, chat_format, export.repository, is_adapter=False)
    card = [*_shell(serving.vllm_merged(export.place)), *notes]
    usage = Usage(code, "python", "transformers", "Merged weights" if not source.is_full else "Weights", card)
    facts = [_describe(merged), *_quantization_note(source), *notes]
    return Written(usage, facts, [serving.vllm_merged(export.shown_folder)])


def write_gguf(export: Export) -> Written:
    """Writes a GGUF file for llama.cpp. Raises ConfigError if the architecture is not supported."""
    file_name = _write_gguf_model(export)
    facts, commands = _quantization_note(export.source), []
    if (kind := export.config.gguf_quantize) is not None:
        smaller = llama_quantize.quantize(export.folder / file_name, kind)
        if smaller is None:
            facts.append(
                f"{llama_quantize.PROGRAM} of llama.cpp is not installed: run its command for {kind}."
            )
            commands.append(serving.command(llama_quantize.command(export.shown_folder, file_name, kind)))
        else:
            file_name = smaller.name
    command = ["llama-server", "-m", f"{export.shown_folder}/{file_name}", "--jinja"]
    code = serving.command(["llama-server", "-m", file_name, "--jinja"])
    usage = Usage(code, "bash", "gguf", "GGUF file for llama.cpp")
    return Written(usage, facts, [*commands, serving.command(command)])


def write_ollama(export: Export) -> Written:
    """Writes a Modelfile and the weights that it names: a GGUF file, merged weights, or only the adapter."""
    facts = _quantization_note(export.source)
    base, adapter = export.config.ollama_base, None
    ollama.frames_of(export.chat_format)  # raises for an unsupported chat format before weights are written
    if base is not None:
        adapter = f"./{_write_gguf_adapter(export)}"
        facts = [
            f"{base} must be the same model as {public_name(export.source.base_model)}. This is not checked."
        ]
    elif _why_no_gguf(export) is None:
        base = f"./{_write_gguf_model(export)}"
    else:
        write_merged(
            export.source,
            export.chat_format,
            export.folder,
            export.config.dtype,
            export.config.max_shard_size,
        )
        base = "."
        facts.append("Ollama makes its own file of the merged weights, if it knows their architecture.")
    text = ollama.modelfile(export.chat_format, base, adapter)
    files.write(export.folder / "Modelfile", text)
    run = serving.command(["ollama", "run", export.slug])
    commands = [
        f"{serving.command(['ollama', 'create', export.slug, '-f', f'{where}Modelfile'])}\n{run}"
        for where in ("", f"{export.shown_folder}/")
    ]
    usage = Usage(commands[0], "bash", "gguf", "Model for Ollama")
    return Written(usage, facts, [commands[1]])


WRITERS: Mapping[str, Callable[[Export], Written]] = {
    "adapter": write_adapter,
    "merged": write_merged_weights,
    "gguf": write_gguf,
    "ollama": write_ollama,
}


# -- helpers ------------------------------------------------------------------------------------


def _model_config(export: Export) -> PretrainedConfig:
    return models.load_config(export.source.base_model)


def _why_no_gguf(export: Export) -> str | None:
    return gguf_weights.why_not(_model_config(export), export.chat_format.tokenizer)


def _write_gguf_model(export: Export) -> str:
    """Writes model-<type>.gguf and returns its name.

    Raises ConfigError, with the commands of llama.cpp that convert the model, if it is not supported here.
    """
    gguf_weights.package()
    models.check_vocabulary(export.source.base_model)
    config = _model_config(export)
    weights = None
    reason = gguf_weights.why_not(config, export.chat_format.tokenizer)
    if reason is None:
        weights = merged_weights(export.source, base_model_folder(export.source))
        reason = "its files name its weights in another way" if weights.are_renamed else None
    if reason is not None or weights is None:
        raise ConfigError(
            f"This model cannot be exported as GGUF: {reason}. Merge it, and let llama.cpp convert it:\n"
            f"{_commands_of_llama_cpp(export)}"
        )
    path = export.folder / "model.gguf"
    config.vocab_size = max(config.vocab_size, weights.num_rows)
    kind = gguf_weights.write_model(
        weights, config, export.chat_format, path, export.config.gguf_type, export.name
    )
    named = path.with_name(f"model-{kind}.gguf")
    files.rename(path, named)
    return named.name


def _commands_of_llama_cpp(export: Export) -> str:
    folder = f"{export.shown_folder}-merged"
    kind = "auto" if export.config.gguf_type == "auto" else export.config.gguf_type
    merge = [
        "python",
        "-m",
        "recipes.export",
        f"checkpoint={export.config.checkpoint}",
        f"to={folder}",
        "format=merged",
    ]
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", folder]
    convert += ["--outfile", f"{export.shown_folder}/model.gguf", "--outtype", kind]
    return f"{serving.command(merge)}\n{serving.command(convert)}"


def _write_gguf_adapter(export: Export) -> str:
    gguf_weights.package()
    source = export.source
    reason = "it is a full fine-tune" if source.is_full else _why_no_gguf(export)
    updates = {} if reason else read_updates(source)
    adapter = {name: update for name, update in updates.items() if isinstance(update, LowRank)}
    if len(adapter) < len(updates) or any(update.magnitude_O is not None for update in adapter.values()):
        reason = "besides A and B of layers it holds other trained weights, for which llama.cpp has no place"
    if reason is None and tied_weights(pretrained.empty_causal_lm(_model_config(export)))[0] in adapter:
        reason = "it is on lm_head, which here is tied to the embeddings, and llama.cpp has no place for that"
    if reason is not None:
        raise ConfigError(
            f"This adapter cannot be added to a model in Ollama's library: {reason}. Remove ollama_base=."
        )
    path = export.folder / "adapter.gguf"
    gguf_weights.write_adapter(adapter, _model_config(export), path, source.info.lora.alpha, export.name)
    return path.name


def _quantization_note(source: TrainedModel) -> list[str]:
    if source.base_bits is None:
        return []
    return [
        f"Trained on a base in {source.base_bits} bits, merged into the weights that it was quantized from: "
        "its probabilities are close to those it was trained with, not equal."
    ]


def _describe(merged: Merged) -> str:
    return (
        f"{_size(merged.num_bytes)} in {merged.num_files} file{'s' * (merged.num_files != 1)}; at most "
        f"{_size(merged.held_bytes)} in memory at once (one tensor at a time)."
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _shell(command: str | None) -> list[str]:
    return [fenced(command, "bash")] if command else []
