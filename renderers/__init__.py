"""Chat formats: convert messages to tokens with loss weights, and sampled tokens back to messages.

A new format is one file with a `Renderer` and one line in `renderers/formats/__init__.py`. The names below
are imported on first use. This is the package of sft-cookbook, which `cookbook.utils.shadowed` tells from the
unrelated package `renderers` of the package index by this sentence.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from renderers.formats import BUILT_IN

if TYPE_CHECKING:
    from renderers.base import Renderer as Renderer
    from renderers.messages import Message as Message
    from renderers.registry import get_renderer as get_renderer
    from renderers.registry import register_renderer as register_renderer
    from renderers.registry import renderer_names as renderer_names
    from renderers.streaming import Delta as Delta
    from renderers.streaming import ResponseStream as ResponseStream
    from renderers.train_on_what import TrainOnWhat as TrainOnWhat

_HOME = {
    "Delta": "renderers.streaming",
    "Message": "renderers.messages",
    "Renderer": "renderers.base",
    "ResponseStream": "renderers.streaming",
    "TrainOnWhat": "renderers.train_on_what",
    "get_renderer": "renderers.registry",
    "register_renderer": "renderers.registry",
    "renderer_names": "renderers.registry",
}

__all__ = [*_HOME]

_CLASSES = {name: module for module, _, name in (place.partition(":") for place in BUILT_IN.values())}

if not TYPE_CHECKING:  # a type checker that sees this function accepts any name

    def __getattr__(name: str) -> object:
        if name in _HOME:
            home = _HOME[name]
        elif name in _CLASSES:
            home = f"renderers.{_CLASSES[name]}"
        else:
            raise AttributeError(f"module 'renderers' has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
