"""Renderers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from cookbook.errors import RendererError
from cookbook.utils.nearest import unknown_name
from renderers import other_names
from renderers.base import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RendererFactory: TypeAlias = "Callable[[PreTrainedTokenizerBase], Renderer]"

_factories: dict[str, RendererFactory] = {}


def register_renderer(name: str, factory: RendererFactory) -> None:
    """Let `get_renderer(name, tokenizer)` call `factory(tokenizer)`. A name is registered once."""
    if name in _factories:
        raise RendererError(f"A renderer named `{name}` is registered already. Choose another name.")
    _factories[name] = factory


def renderer_names() -> list[str]:
    return sorted(_factories)


def get_renderer(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None = None,
    tools_in_system: bool = False,
) -> Renderer:
    """A new renderer for the tokenizer. `system_prompt` is put before every conversation.

    With `tools_in_system` a format without a place for tools has them described in the system message,
    their calls and results written as text (`renderers/tools_in_system.py`); any other format is refused.
    """
    check_renderer_name(name)
    renderer = _factories[name](tokenizer)
    if system_prompt:
        renderer.system_prompt = system_prompt
    if tools_in_system and renderer.takes_tools:
        raise RendererError(
            f"Renderer `{name}` has a place for tools in its format, so tools_in_system=True would put them "
            "where the model does not look for them. Remove it."
        )
    if tools_in_system:
        renderer.tools_in_system = True
    return renderer


def check_renderer_name(name: str) -> None:
    """Raises RendererError for a name that no renderer has."""
    if name not in _factories:
        known = other_names.ANSWERS.get(name.rpartition("/")[2].lower().replace("-", "_"))
        raise RendererError(
            unknown_name("renderer", name, renderer_names())
            if known is None
            else f"Unknown renderer `{name}`. {known}. Supported: {', '.join(renderer_names())}."
        )
