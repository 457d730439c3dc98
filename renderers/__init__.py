"""Chat formats: messages to tokens with loss weights, and sampled tokens back to messages.

A new format is one file with a `Renderer` and one line here.
"""

from renderers.base import Renderer
from renderers.chat_template import ChatTemplateRenderer
from renderers.llama3 import Llama3Renderer
from renderers.messages import Message
from renderers.qwen3 import Qwen3Renderer
from renderers.registry import get_renderer, register_renderer, renderer_names
from renderers.role_colon import RoleColonRenderer
from renderers.train_on_what import TrainOnWhat

for _renderer in (ChatTemplateRenderer, Llama3Renderer, Qwen3Renderer, RoleColonRenderer):
    register_renderer(_renderer.name, _renderer)

__all__ = [
    "Message",
    "Renderer",
    "TrainOnWhat",
    "get_renderer",
    "register_renderer",
    "renderer_names",
]
