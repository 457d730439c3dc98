"""Writes the model card of an export, README.md: the model, its use, its training data, its results.

It may be published, so it contains no path of this machine and no setting that is not listed here. Names and
texts of runs, data and models are escaped, so that they are never Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cookbook import embedded
from cookbook.data.sources import KNOWN_DATASETS
from cookbook.export.chat_format import ChatFormat
from cookbook.runs import curves
from cookbook.runs.find import TrainedModel, is_on_hub, path_elsewhere, public_name
from cookbook.runs.settings import texts_of
from cookbook.runs.summary import number, outcomes_of
from cookbook.utils import files
from cookbook.utils.control_characters import visible_line
from cookbook.utils.notes import counted_noun

CURVES_FILE = "curves.png"
SHOWN_SETTINGS = (
    "learning_rate", "lr_schedule", "warmup_steps", "num_epochs", "max_steps", "lora_rank", "lora_alpha",
    "train_attn", "train_mlp", "train_unembed", "quantization", "weight_decay", "seed",
    "dataset_builder.common_config.batch_size", "dataset_builder.common_config.max_length",
    "dataset_builder.common_config.train_on_what",
)  # fmt: skip
"""The settings on a card: numbers and words only. No other setting is published."""


@dataclass(frozen=True)
class Usage:
    """How to use an export: commands or a program, and the hub's name of the library that loads it."""

    code: str
    language: str
    library: str | None
    kind: str
    """The kind of export, such as `LoRA adapter`."""
    notes: Sequence[str] = ()


def write_model_card(
    source: TrainedModel, chat_format: ChatFormat, usage: Usage, name: str, folder: Path
) -> None:
    """Writes README.md, and the picture of the run's curves if there is a run."""
    has_curves = source.run is not None and curves.draw(source.run.metrics, folder / CURVES_FILE) is not None
    parts = [
        _front_matter(source, usage, name),
        f"# {_text(name)}",
        _introduction(source, usage),
        f"## How to use it\n\n{fenced(usage.code, usage.language)}",
        *usage.notes,
        _results(source),
        f"![What the run measured]({CURVES_FILE})" if has_curves else "",
        _data(source),
        _settings(source),
        _chat_format(chat_format, source),
    ]
    text = "\n\n".join(part for part in parts if part)
    files.write(folder / "README.md", text + "\n")


def fenced(code: str, language: str) -> str:
    """Returns a fenced code block, with a fence longer than any in the code."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _text(text: object) -> str:
    """Returns one line of plain text, escaped for Markdown."""
    return re.sub(
        r"\\(?=[!-/:-@\[-`{-~])|[`*\[\]<>|&$~]", lambda match: f"&#{ord(match[0])};", visible_line(text)
    )


def _code(text: str) -> str:
    """Returns the text as inline code, or as plain text if it has characters that code cannot have."""
    return f"`{text}`" if text and text == visible_line(text) and "`" not in text else _text(text)


def python_usage(
    source: TrainedModel, chat_format: ChatFormat, repository: str | None, is_adapter: bool
) -> str:
    """Returns a program that talks to the model, from its folder or from the hub."""
    where = f'"{repository}"' if repository else '"."  # the folder of README.md'
    load = "model = AutoModelForCausalLM.from_pretrained(path)"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if is_adapter:
        imports = f"from peft import PeftModel\n{imports}"
        base = json.dumps(path_elsewhere(source.base_model))
        if source.base_model == embedded.MODEL_NAME:
            imports = f"from cookbook import embedded  # pip install sft-cookbook\n{imports}"
            base = "embedded.MODEL_PATH"
        load = f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), path)"
        if source.info.lora.add_tokens:
            load = (
                f"base = AutoModelForCausalLM.from_pretrained({base})\n"
                "num_rows = len(AutoTokenizer.from_pretrained(path))  # with the added tokens\n"
                "base.resize_token_embeddings(max(num_rows, base.config.vocab_size))\n"
                "model = PeftModel.from_pretrained(base, path)"
            )
    ends = ""
    if is_adapter and chat_format.stop_token_ids:
        ends = f", eos_token_id={list(chat_format.stop_token_ids)}"
    if chat_format.stop_strings:
        stops = f", stop_strings={json.dumps(list(chat_format.stop_strings))}" if is_adapter else ""
        ends += f"{stops}, tokenizer=tokenizer"
    return "\n".join(
        [
            imports,
            "",
            f"path = {where}",
            load,
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "prompt = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            f"reply = model.generate(**prompt, max_new_tokens=200{ends})",
            'print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _front_matter(source: TrainedModel, usage: Usage, name: str) -> str:
    facts: dict[str, Any] = {
        "model_name": name,
        "library_name": usage.library,
        "pipeline_tag": "text-generation",
        "tags": ["sft", "sft-cookbook", *([] if source.is_full else ["lora"])],
    }
    if is_on_hub(source.origin):
        facts["base_model"] = source.origin
        facts["base_model_relation"] = "finetune" if usage.library != "peft" else "adapter"
    if ids := _hub_datasets(source):
        facts["datasets"] = ids
    return f"---\n{ModelCardData(**facts).to_yaml()}\n---"


def _introduction(source: TrainedModel, usage: Usage) -> str:
    origin = _text(public_name(source.origin))
    if origin == embedded.MODEL_NAME:
        origin = f"{origin}, the model that comes with sft-cookbook"
    elif is_on_hub(source.origin):
        origin = f"[{origin}](https://huggingface.co/{origin})"
    lora = source.info.lora
    how = (
        "all of its weights trained"
        if source.is_full
        else f"a LoRA of rank {lora.rank}, alpha {lora.alpha:g}"
    )
    steps = (
        f" The weights are those after {counted_noun(source.step, 'step')}."
        if source.step is not None
        else ""
    )
    quantized = ""
    if source.base_bits is not None and usage.library != "peft":
        quantized = (
            f" It was trained on a base model in {source.base_bits} bits; here its adapter is merged into "
            "the weights that it was quantized from, so its probabilities are close to those it was trained "
            "with, not equal."
        )
    return f"{usage.kind[0].upper()}{usage.kind[1:]}: {origin}, fine-tuned with {how}.{steps}{quantized}"


def _results(source: TrainedModel) -> str:
    if source.run is None or not (outcomes := outcomes_of(source.run)):
        return ""
    rows = [
        [_text(o.metric) if "|" in o.metric else _code(o.metric), number(o.first), number(o.last)]
        + (["", ""] if o.best is None else [number(o.best), f"{o.best_step:,}"])
        for o in outcomes
    ]
    table = _table(["metric", "first", "last", "best", "at step"], rows)
    return f"## Results\n\nOver the complete run. Losses (`nll`) are nats per trained token.\n\n{table}"


def _data(source: TrainedModel) -> str:
    sources = source.run.data.get("sources", []) if source.run else []
    if not sources:
        return ""
    columns = ["rows", "examples", "tokens", "trained_tokens", "longest", "truncated"]
    rows = [
        [
            _text(_dataset_name(str(part["name"]))),
            *(f"{part[key]:,}" if key in part else "" for key in columns),
        ]
        for part in sources
    ]
    return "## Data\n\n" + _table(["source", *(key.replace("_", " ") for key in columns)], rows)


def _settings(source: TrainedModel) -> str:
    settings = texts_of(source.run.config) if source.run else {}
    rows = [
        [_code(key.rsplit(".", 1)[-1]), _text(settings[key])]
        for key in SHOWN_SETTINGS
        if settings.get(key, "none") != "none"
    ]
    return "## Training\n\n" + _table(["setting", "value"], rows) if rows else ""


def _chat_format(chat_format: ChatFormat, source: TrainedModel) -> str:
    ends = ", ".join(_code(json.dumps(stop, ensure_ascii=False)) for stop in chat_format.stop_texts)
    text = (
        f"## Chat format\n\nTrained with the renderer `{chat_format.renderer.name}` of sft-cookbook, which "
        f"`chat_template.jinja` prints too. A reply ends with {ends}."
    )
    if prompt := chat_format.renderer.system_prompt:
        quoted = "\n".join(f"> {_text(line)}" for line in prompt.splitlines())
        text += (
            f" Every conversation began with this system prompt, which the template puts there:\n\n{quoted}"
        )
    if given := chat_format.renderer.template_kwargs:
        text += f" Its variables were {_code(json.dumps(given, ensure_ascii=False))}, which are its defaults."
    if source.info.user_metadata.get("tools_in_system") == "True":
        text += (
            " The template has no place for tools: in training they were described in the system message, "
            "called in `<tool_call>` tags and answered by a user's message in `<tool_response>` tags."
        )
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _hub_datasets(source: TrainedModel) -> list[str]:
    builder = source.run.config.get("dataset_builder") if source.run else None
    named = builder.get("dataset") or [] if isinstance(builder, Mapping) else []
    specs = named if isinstance(named, list) else [named]
    parts = [part for spec in specs for part in str(spec).split(",")]
    names = [KNOWN_DATASETS[part].hub_id if part in KNOWN_DATASETS else part.split(":")[0] for part in parts]
    return [name for name in names if _dataset_name(name) == name and "/" in name]


def _dataset_name(name: str) -> str:
    """Returns a hub id with its config and split, or the last part of a path."""
    repository = name.split(":")[0]
    is_path = Path(repository).suffix or Path(repository).exists() or not is_on_hub(repository)
    return Path(name).name if is_path else name
