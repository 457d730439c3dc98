"""Registers renderers by name, and creates them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from cookbook.errors import RendererError
from cookbook.utils.nearest import unknown_name
from renderers import other_names
from renderers.formats import BUILT_IN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from renderers.base import Renderer

RendererFactory: TypeAlias = "Callable[[PreTrainedTokenizerBase], Renderer]"


def _built_in(place: str) -> RendererFactory:
    """Returns a factory for a class of this package, `module:name`, which it imports when it is called."""

    def create(tokenizer: PreTrainedTokenizerBase) -> Renderer:
        module, _, name = place.partition(":")
        renderer: Renderer = getattr(importlib.import_module(f"renderers.{module}"), name)(tokenizer)
        return renderer

    return create


_factories: dict[str, RendererFactory] = {name: _built_in(place) for name, place in BUILT_IN.items()}


def register_renderer(name: str, factory: RendererFactory) -> None:
    """Registers a name: `get_renderer(name, tokenizer)` then returns `factory(tokenizer)`.

    Raises RendererError for a name that is already registered.
    """
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
    template_kwargs: Mapping[str, Any] | None = None,
) -> Renderer:
    """Returns a new renderer for the tokenizer. `system_prompt` is put before every conversation.

    With `tools_in_system`, tools are described in the system message, and calls and results are written as
    text (`renderers/tools_in_system.py`). `template_kwargs` are values for variables of the chat template.
    Raises RendererError for an unknown name, for `tools_in_system` with a format that has a place for tools,
    and for `template_kwargs` with a format that is written in code.
    """
    check_renderer_name(name)
    renderer = _factories[name](tokenizer)
    if template_kwargs:
        renderer = renderer.with_template_kwargs(template_kwargs)
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
    """Raises RendererError for an unknown name."""
    if name not in _factories:
        known = other_names.ANSWERS.get(name.rpartition("/")[2].lower().replace("-", "_"))
        raise RendererError(
            unknown_name("renderer", name, renderer_names())
            if known is None
            else f"Unknown renderer `{name}`. {known}. Supported: {', '.join(renderer_names())}."
        )
