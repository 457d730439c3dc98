"""Finds the chat template of an exported model: a Jinja template that prints the prompts it was trained on.

The tokenizer's own template is used if it agrees with the renderer, possibly after settings of the run are
written into it: a mode (thinking or not), today's date, the system prompt. Every exported template has been
compared with the renderer's prompts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import models
from cookbook.errors import ConfigError, RendererError
from cookbook.runs.find import TrainedModel
from cookbook.utils import files
from renderers import Message, Renderer, get_renderer
from renderers.jinja.sandbox import compiled
from renderers.jinja.today import TODAY
from renderers.messages import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROLE_COLON = r"""
{{- bos_token if bos_token is defined and bos_token else '' }}
{%- set labels = {'system': 'System:', 'user': 'User:', 'assistant': 'Assistant:'} %}
{%- set last = namespace(role='') %}
{%- for message in messages %}
{%- if message['role'] not in labels or (last.role == 'assistant' and message['role'] != 'user') %}
{{- raise_exception('No place for a message of role ' + message['role'] + '.') }}
{%- endif %}
{%- if last.role != 'assistant' %}
{{- ('\n\n' if last.role else '') + labels[message['role']] }}
{%- endif %}
{{- ' ' + message['content'] + ('\n\nUser:' if message['role'] == 'assistant' else '') }}
{%- set last.role = message['role'] %}
{%- endfor %}
{%- if add_generation_prompt and last.role != 'assistant' %}
{{- '\n\nAssistant:' }}
{%- endif %}
""".strip()
"""Prints what the renderer `role_colon` does, for tokenizers without a template."""

_MODES: tuple[Mapping[str, Any], ...] = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": False},
    {"thinking": True},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "medium"},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "xhigh"},
    {"preserve_thinking": True},
    {"enable_thinking": True, "preserve_thinking": True},
    {"truncate_history_thinking": False},
    {"clear_thinking": False},
    {"low_effort": True},
    {"medium_effort": True},
)
"""Variables of published templates, whose modes have renderers of their own."""

_DEFAULT = "{%%- if %s is not defined %%}{%%- set %s = %s %%}{%%- endif %%}"
_DATE = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")

_SYSTEM_PROMPT = (
    "{%%- set system_prompt = %s %%}"
    "{%%- if messages and messages[0]['role'] in ['system', 'developer'] %%}"
    "{%%- set messages = [{'role': messages[0]['role'], "
    "'content': system_prompt + '\\n\\n' + messages[0]['content']}] + messages[1:] %%}"
    "{%%- else %%}"
    "{%%- set messages = [{'role': 'system', 'content': system_prompt}] + messages %%}"
    "{%%- endif %%}"
)

_USER: Message = {"role": "user", "content": "Who are you, and what is 17 + 4?"}
_REPLY: Message = {
    "role": "assistant",
    "content": "A spoon. That is 21; “twenty-one”, in words: 二十一.\n\nIs it?",
}
_NEXT: Message = {"role": "user", "content": "  Two lines,\nand spaces around them. "}
_SYSTEM: Message = {"role": "system", "content": "You are brief."}
PROBES: tuple[list[Message], ...] = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _REPLY, _NEXT],
    [_SYSTEM, _USER, _REPLY, _NEXT, _REPLY, _USER],
)
"""Conversations that a template must render as the renderer does."""

_THOUGHT: Message = {**_REPLY, "reasoning_content": "Seventeen, and four."}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I should look.",
    "tool_calls": [
        {
            "id": "functions.weather:0",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Oslo"}},
        }
    ],
}
_RESULT: Message = {
    "role": "tool", "name": "weather", "tool_call_id": "functions.weather:0", "content": "Rain."
}  # fmt: skip
_WITH_THINKING: tuple[list[Message], ...] = (
    [_USER, _THOUGHT, _NEXT],
    [_USER, _CALL, _RESULT, _THOUGHT, _NEXT],
)
"""Conversations that tell apart modes which keep the thinking of the history."""

_ERROR = "nothing but an error"

_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of an export: renderer, tokenizer, template, and the stop sequences of a reply."""

    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    template: str
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    @property
    def stop_texts(self) -> list[str]:
        """Returns all stop sequences as texts."""
        return [
            *(str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_token_ids),
            *self.stop_strings,
        ]

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer with this template, without the path it was loaded from."""
        self.tokenizer.save_pretrained(folder)
        files.remove(folder / "additional_chat_templates")
        files.write(folder / "chat_template.jinja", self.template)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("auto_map", "chat_template", "is_local", "local_files_only", "name_or_path"):
            config.pop(key, None)
        files.write(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def find_chat_format(source: TrainedModel, chat_template: str | None = None) -> ChatFormat:
    """Returns the format recorded with a checkpoint, or else the recommended one of its model.

    `chat_template` is a file to use instead of the tokenizer's template; it is compared too. Raises
    ConfigError if no template agrees with the renderer.
    """
    metadata = source.info.user_metadata
    name = metadata.get("renderer_name") or models.recommended_renderer(source.base_model)
    tokenizer = models.get_tokenizer(source.base_model, tuple(source.info.lora.add_tokens))
    template = None
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise ConfigError(f"chat_template={chat_template}: there is no such file.")
        template = path.read_text(encoding="utf-8")
    return chat_format_of(name, tokenizer, metadata.get("system_prompt"), template, source.template_kwargs)


def chat_format_of(
    renderer_name: str,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None = None,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatFormat:
    """Returns the format of a renderer, with a template that prints the same: `template`, or a known one.

    The template has `template_kwargs` as the defaults of its variables. Raises ConfigError if there is none.
    """
    plain = get_renderer(renderer_name, tokenizer, template_kwargs=template_kwargs)
    renderer = get_renderer(renderer_name, tokenizer, system_prompt, template_kwargs=template_kwargs)
    unread = plain.unread_template_kwargs()
    read = {name: value for name, value in plain.template_kwargs.items() if name not in unread}
    differences = []
    in_history: tuple[str, str] | None = None
    for candidate in [template] if template is not None else _candidates(tokenizer):
        candidate = with_variables(candidate, read)
        difference = _difference(plain, candidate)
        if difference is None:
            whole = with_system_prompt(candidate, system_prompt) if system_prompt else candidate
            difference = _difference(renderer, whole)
        if difference is None:
            of_history = _difference(plain, candidate, _WITH_THINKING)
            if of_history is None:
                return _with_stops(renderer, whole)
            in_history = in_history or (whole, of_history)
            continue
        differences.append(difference)
    if in_history is not None:
        whole, difference = in_history
        logger.warning(
            "The exported chat template prints thinking in the history otherwise than in training. %s",
            difference,
        )
        return _with_stops(renderer, whole)
    raise ConfigError(
        f"No known chat template prints what renderer `{renderer_name}` does with this tokenizer.\n"
        f"{differences[0]}\nGive one: chat_template=file.jinja"
        if template is None
        else f"chat_template= does not print what renderer `{renderer_name}` does. {differences[0]}"
    )


def _with_stops(renderer: Renderer, template: str) -> ChatFormat:
    stops = renderer.get_stop_sequences()
    return ChatFormat(
        renderer,
        renderer.tokenizer,
        template,
        tuple(stop for stop in stops if isinstance(stop, int)),
        tuple(stop for stop in stops if isinstance(stop, str)),
    )


def with_variables(template: str, template_kwargs: Mapping[str, Any]) -> str:
    """Returns the template with values for those of its variables that are not given to it."""
    return (
        "".join(_DEFAULT % (name, name, _literal(value)) for name, value in template_kwargs.items())
        + template
    )


def _literal(value: Any) -> str:
    """Returns a JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def with_system_prompt(template: str, system_prompt: str) -> str:
    """Returns the template with a system prompt where renderers put it: first, or before a system message."""
    return _SYSTEM_PROMPT % json.dumps(system_prompt, ensure_ascii=False) + template


def _candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if tokenizer.chat_template:
        own = _DATE.sub(lambda match: json.dumps(TODAY.strftime(match[2])), tokenizer.get_chat_template())
        # Qwen3.5's template has no variable that keeps the thinking of all replies, as Qwen3.6's has.
        for text in dict.fromkeys([own, own.replace("loop.index0 > ns.last_query_index", "true")]):
            for mode in _MODES:
                if all(name in text for name in mode):
                    yield "".join(f"{{%- set {name} = {_literal(mode[name])} %}}" for name in mode) + text
        yield own.replace("<think>\\n'", "'")  # DeepSeek's, without thinking
    yield ROLE_COLON


def _difference(renderer: Renderer, template: str, probes: Sequence[list[Message]] = PROBES) -> str | None:
    """Describes the first difference between a template's and the renderer's prompts; None if they agree."""
    tokenizer = renderer.tokenizer
    for messages in probes:
        if _CALL in messages and not renderer.takes_tools:
            continue
        for tools in (None, [_TOOL]) if renderer.takes_tools else (None,):
            try:
                expected = _decode(
                    tokenizer, renderer.build_generation_prompt(messages, tools=tools).to_ints()
                )
            except RendererError:
                continue  # the format does not support this conversation
            found = _rendered(tokenizer, template, messages, tools)
            if probes is _WITH_THINKING and found.startswith(_ERROR):
                continue  # the template does not support it
            if found != expected:
                return f"It should print {_excerpt(expected, found)} and prints {_excerpt(found, expected)}."
    return None


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], tools: Any
) -> str:
    try:
        text = compiled(template).render(
            tokenizer.special_tokens_map,
            messages=list(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            strftime_now=lambda format: datetime.now().strftime(format),  # as transformers defines it
        )
    except Exception as error:  # a template is foreign code and may raise anything
        return f"{_ERROR}: {error}"
    return _decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _excerpt(text: str, other: str) -> str:
    """Returns the part of a text around its first difference from another, quoted."""
    start = next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )
    return json.dumps(text[max(0, start - 20) : start + 20], ensure_ascii=False)
