"""Writes a Modelfile for Ollama, whose chat template is in Go's template language.

In most chat formats the text between two messages depends only on their roles. That text is read off a few
short prompts of the renderer, and checked on longer ones. Tools are not supported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cookbook.errors import ConfigError, RendererError
from cookbook.export.chat_format import ChatFormat
from renderers import Message, Renderer, get_renderer

_MARKS = ("xq0qx", "xq1qx", "xq2qx")
_UNSUITED = (
    "Ollama cannot be given the format of renderer `{name}`: what it prints between two messages depends on "
    "more than their roles. Serve the merged weights with vLLM or llama.cpp, which take its Jinja template."
)


@dataclass(frozen=True)
class Frames:
    """The text around messages. `opening` begins a conversation without a system message."""

    opening: str
    before_system: str
    after_system: str
    before_user: str
    after_user: str
    before_reply: str
    after_reply: str
    prompt: str
    """The generation prompt, after the last user message."""
    joins_system: bool = False
    """Whether a system message replaces the text before the user message after it."""
    has_system: bool = True

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt for a reply to the last of these messages, which is a user message."""
        text, before = "", ""
        for message in messages:
            role, content = message["role"], str(message["content"])
            if role == "system":
                text += self.before_system + content + self.after_system
            elif role == "user":
                text += "" if before else self.opening
                text += "" if self.joins_system and before == "system" else self.before_user
                text += content + self.after_user
            else:
                text += self.before_reply + content + self.after_reply
            before = role
        return text + self.prompt

    def go_template(self) -> str:
        """Returns `render` as a Go template. Text is in string literals, which keep white space."""
        before_user = _go(self.before_user)
        if self.joins_system and before_user:
            before_user = f'{{{{ if ne $before "system" }}}}{before_user}{{{{ end }}}}'
        opening = f'{{{{ if eq $before "" }}}}{_go(self.opening)}{{{{ end }}}}' if self.opening else ""
        prompt = f"{{{{ if $last }}}}{_go(self.prompt)}{{{{ end }}}}" if self.prompt else ""
        after_reply = (
            f"{{{{ if not $last }}}}{_go(self.after_reply)}{{{{ end }}}}" if self.after_reply else ""
        )
        content = "{{ .Content }}"
        lines = [
            '{{- $before := "" }}',
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "user" }}' + opening + before_user + content + _go(self.after_user) + prompt,
            '{{- else if eq .Role "assistant" }}' + _go(self.before_reply) + content + after_reply,
        ]
        if self.has_system:
            system = _go(self.before_system) + content + _go(self.after_system)
            lines.append('{{- else if eq .Role "system" }}' + system)
        return "\n".join([*lines, "{{- end }}", "{{- $before = .Role }}", "{{- end }}"])


def _go(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def frames_of(chat_format: ChatFormat) -> Frames:
    """Returns the text that a renderer prints around messages.

    It has no system prompt of the run, which Ollama adds itself. Raises ConfigError if the text depends on
    more than roles.
    """
    renderer = get_renderer(
        chat_format.renderer.name,
        chat_format.tokenizer,
        template_kwargs=chat_format.renderer.template_kwargs,
    )
    unsuited = ConfigError(_UNSUITED.format(name=renderer.name))
    head, tail = _parts(renderer, ["user"], unsuited)
    _, to_reply, to_user, _ = _parts(renderer, ["user", "assistant", "user"], unsuited)
    before_user = _common_end(chat_format, head, to_user)
    after_reply = to_user.removesuffix(before_user)
    after_user = after_reply
    if not (to_reply.startswith(after_user) and tail.startswith(after_user)):
        after_user = _common_start(chat_format, to_reply, tail)
    has_system, before_system, after_system, joins = "system" in renderer.roles, "", "", False
    if has_system:
        try:
            before_system, between, _ = _parts(renderer, ["system", "user"], unsuited)
        except RendererError:
            has_system = False  # the tokenizer's template does not support it
        else:
            joins = not between.endswith(before_user)
            after_system = between if joins else between.removesuffix(before_user)
    frames = Frames(
        opening=head.removesuffix(before_user),
        before_system=before_system,
        after_system=after_system,
        before_user=before_user,
        after_user=after_user,
        before_reply=to_reply.removeprefix(after_user),
        after_reply=after_reply,
        prompt=tail.removeprefix(after_user),
        joins_system=joins,
        has_system=has_system,
    )
    turns = ["user", "assistant"] * 3 + ["user"]
    for roles in [turns, ["system", *turns]] if has_system else [turns]:
        messages = [Message(role=role, content=f"{i}\n\nÉtait-ce “{role}”?") for i, role in enumerate(roles)]
        if frames.render(messages) != _text(renderer, messages):
            raise unsuited
    return frames


def _parts(renderer: Renderer, roles: Sequence[str], unsuited: ConfigError) -> list[str]:
    """Returns the texts before, between and after messages of these roles."""
    marks = _MARKS[: len(roles)]
    text = _text(
        renderer, [Message(role=role, content=mark) for role, mark in zip(roles, marks, strict=True)]
    )
    parts = re.split("|".join(marks), text)
    if len(parts) != len(roles) + 1:
        raise unsuited
    return parts


def _text(renderer: Renderer, messages: Sequence[Message]) -> str:
    ids = renderer.build_generation_prompt(list(messages)).to_ints()
    return str(renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _common_start(chat_format: ChatFormat, one: str, other: str) -> str:
    """Returns the common prefix of both texts. It does not split control tokens."""
    common = ""
    for a, b in zip(_pieces(chat_format, one), _pieces(chat_format, other), strict=False):
        if a != b:
            break
        common += a
    return common


def _common_end(chat_format: ChatFormat, one: str, other: str) -> str:
    """Returns the common suffix of both texts, without any stop sequence and the text before it."""
    common = ""
    pairs = zip(reversed(_pieces(chat_format, one)), reversed(_pieces(chat_format, other)), strict=False)
    for a, b in pairs:
        if a != b:
            break
        if a in chat_format.stop_texts:
            return common.lstrip("\n")
        common = a + common
    return common


def _pieces(chat_format: ChatFormat, text: str) -> list[str]:
    controls = sorted(chat_format.tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, controls), "(?s:.)"]), text)


def modelfile(chat_format: ChatFormat, base: str, adapter: str | None = None) -> str:
    """Returns the text of a Modelfile.

    `base` and `adapter` are paths relative to it; `base` may be a model of Ollama's library. It sets no
    sampling parameters such as temperature, which training does not determine.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f"TEMPLATE {_quoted(frames_of(chat_format).go_template())}")
    if chat_format.renderer.system_prompt:
        lines.append(f"SYSTEM {_quoted(chat_format.renderer.system_prompt)}")
    lines += [f"PARAMETER stop {_quoted_stop(stop)}" for stop in chat_format.stop_texts]
    return "\n".join(lines) + "\n"


def _quoted_stop(stop: str) -> str:
    return _quoted(stop) if re.search(r'["\r\n]', stop) else f'"{stop}"'


def _quoted(text: str) -> str:
    """Returns the text in Ollama's triple quotes, in which nothing is escaped."""
    if '"""' in text:
        raise ConfigError(
            'A Modelfile cannot contain three double quotes ("""), and the system prompt, the chat '
            "format or what ends a reply has them."
        )
    return f'"""{text}"""'
