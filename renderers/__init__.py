"""Chat formats: convert messages to tokens with loss weights, and sampled tokens back to messages.

A new format is one file with a `Renderer` and one line here. This is the package of sft-cookbook, which
`cookbook.utils.shadowed` tells from the unrelated package `renderers` of the package index by this sentence.
"""

from renderers.base import Renderer
from renderers.formats.deepseekv3 import DeepSeekV3Renderer, DeepSeekV3ThinkingRenderer
from renderers.formats.deepseekv3_1 import DeepSeekV3_1Renderer, DeepSeekV3_1ThinkingRenderer
from renderers.formats.gemma3 import Gemma3Renderer
from renderers.formats.gemma4 import (
    Gemma4PreserveThinkingRenderer,
    Gemma4Renderer,
    Gemma4ThinkingRenderer,
)
from renderers.formats.glm import (
    Glm4_5DisableThinkingRenderer,
    Glm4_5Renderer,
    Glm5DisableThinkingRenderer,
    Glm5Renderer,
)
from renderers.formats.gpt_oss import GptOssHighRenderer, GptOssLowRenderer, GptOssRenderer
from renderers.formats.kimi import (
    KimiK2Renderer,
    KimiK2ThinkingRenderer,
    KimiK25DisableThinkingRenderer,
    KimiK25Renderer,
    KimiK26DisableThinkingRenderer,
    KimiK26PreserveThinkingRenderer,
    KimiK26Renderer,
)
from renderers.formats.llama3 import Llama3Renderer
from renderers.formats.nemotron3 import (
    Nemotron3DisableThinkingRenderer,
    Nemotron3LowThinkingRenderer,
    Nemotron3PreserveThinkingRenderer,
    Nemotron3Renderer,
    Nemotron3UltraDisableThinkingRenderer,
    Nemotron3UltraMediumThinkingRenderer,
    Nemotron3UltraPreserveThinkingRenderer,
    Nemotron3UltraRenderer,
)
from renderers.formats.phi3 import Phi3Renderer
from renderers.formats.qwen2_5 import Qwen2_5Renderer
from renderers.formats.qwen3 import Qwen3DisableThinkingRenderer, Qwen3Renderer
from renderers.formats.qwen3_5 import (
    Qwen3_5DisableThinkingRenderer,
    Qwen3_5PreserveThinkingRenderer,
    Qwen3_5Renderer,
    Qwen3_6DisableThinkingRenderer,
    Qwen3_6PreserveThinkingRenderer,
    Qwen3_6Renderer,
)
from renderers.formats.qwen3_8 import (
    Qwen3_8DisableThinkingRenderer,
    Qwen3_8LowRenderer,
    Qwen3_8MediumRenderer,
    Qwen3_8Renderer,
    Qwen3_8XHighRenderer,
)
from renderers.formats.qwen3_instruct import Qwen3InstructRenderer
from renderers.formats.qwen3_vl import Qwen3VLInstructRenderer, Qwen3VLRenderer
from renderers.formats.role_colon import RoleColonRenderer
from renderers.jinja.chat_template import ChatTemplateRenderer
from renderers.messages import Message
from renderers.registry import get_renderer, register_renderer, renderer_names
from renderers.streaming import Delta, ResponseStream
from renderers.train_on_what import TrainOnWhat

for _renderer in (
    ChatTemplateRenderer,
    DeepSeekV3_1Renderer,
    DeepSeekV3_1ThinkingRenderer,
    DeepSeekV3Renderer,
    DeepSeekV3ThinkingRenderer,
    Gemma3Renderer,
    Gemma4PreserveThinkingRenderer,
    Gemma4Renderer,
    Gemma4ThinkingRenderer,
    Glm4_5DisableThinkingRenderer,
    Glm4_5Renderer,
    Glm5DisableThinkingRenderer,
    Glm5Renderer,
    GptOssHighRenderer,
    GptOssLowRenderer,
    GptOssRenderer,
    KimiK2Renderer,
    KimiK2ThinkingRenderer,
    KimiK25DisableThinkingRenderer,
    KimiK25Renderer,
    KimiK26DisableThinkingRenderer,
    KimiK26PreserveThinkingRenderer,
    KimiK26Renderer,
    Llama3Renderer,
    Nemotron3DisableThinkingRenderer,
    Nemotron3LowThinkingRenderer,
    Nemotron3PreserveThinkingRenderer,
    Nemotron3Renderer,
    Nemotron3UltraDisableThinkingRenderer,
    Nemotron3UltraMediumThinkingRenderer,
    Nemotron3UltraPreserveThinkingRenderer,
    Nemotron3UltraRenderer,
    Phi3Renderer,
    Qwen2_5Renderer,
    Qwen3_5DisableThinkingRenderer,
    Qwen3_5PreserveThinkingRenderer,
    Qwen3_5Renderer,
    Qwen3_6DisableThinkingRenderer,
    Qwen3_6PreserveThinkingRenderer,
    Qwen3_6Renderer,
    Qwen3_8DisableThinkingRenderer,
    Qwen3_8LowRenderer,
    Qwen3_8MediumRenderer,
    Qwen3_8Renderer,
    Qwen3_8XHighRenderer,
    Qwen3DisableThinkingRenderer,
    Qwen3InstructRenderer,
    Qwen3Renderer,
    Qwen3VLInstructRenderer,
    Qwen3VLRenderer,
    RoleColonRenderer,
):
    register_renderer(_renderer.name, _renderer)

__all__ = [
    "Delta",
    "Message",
    "Renderer",
    "ResponseStream",
    "TrainOnWhat",
    "get_renderer",
    "register_renderer",
    "renderer_names",
]
