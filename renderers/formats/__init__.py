"""One module per family of chat formats that is written in code.

A new format is one file with a `Renderer` and one line here.
"""

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "chat_template": "jinja.chat_template:ChatTemplateRenderer",
        "deepseekv3": "formats.deepseekv3:DeepSeekV3Renderer",
        "deepseekv3_1": "formats.deepseekv3_1:DeepSeekV3_1Renderer",
        "deepseekv3_1_thinking": "formats.deepseekv3_1:DeepSeekV3_1ThinkingRenderer",
        "deepseekv3_thinking": "formats.deepseekv3:DeepSeekV3ThinkingRenderer",
        "gemma3": "formats.gemma3:Gemma3Renderer",
        "gemma4": "formats.gemma4:Gemma4Renderer",
        "gemma4_preserve_thinking": "formats.gemma4:Gemma4PreserveThinkingRenderer",
        "gemma4_thinking": "formats.gemma4:Gemma4ThinkingRenderer",
        "glm4_5": "formats.glm:Glm4_5Renderer",
        "glm4_5_disable_thinking": "formats.glm:Glm4_5DisableThinkingRenderer",
        "glm5": "formats.glm:Glm5Renderer",
        "glm5_disable_thinking": "formats.glm:Glm5DisableThinkingRenderer",
        "gpt_oss": "formats.gpt_oss:GptOssRenderer",
        "gpt_oss_high": "formats.gpt_oss:GptOssHighRenderer",
        "gpt_oss_low": "formats.gpt_oss:GptOssLowRenderer",
        "kimi_k2": "formats.kimi:KimiK2Renderer",
        "kimi_k25": "formats.kimi:KimiK25Renderer",
        "kimi_k25_disable_thinking": "formats.kimi:KimiK25DisableThinkingRenderer",
        "kimi_k26": "formats.kimi:KimiK26Renderer",
        "kimi_k26_disable_thinking": "formats.kimi:KimiK26DisableThinkingRenderer",
        "kimi_k26_preserve_thinking": "formats.kimi:KimiK26PreserveThinkingRenderer",
        "kimi_k2_thinking": "formats.kimi:KimiK2ThinkingRenderer",
        "llama3": "formats.llama3:Llama3Renderer",
        "nemotron3": "formats.nemotron3:Nemotron3Renderer",
        "nemotron3_disable_thinking": "formats.nemotron3:Nemotron3DisableThinkingRenderer",
        "nemotron3_low_thinking": "formats.nemotron3:Nemotron3LowThinkingRenderer",
        "nemotron3_preserve_thinking": "formats.nemotron3:Nemotron3PreserveThinkingRenderer",
        "nemotron3_ultra": "formats.nemotron3:Nemotron3UltraRenderer",
        "nemotron3_ultra_disable_thinking": "formats.nemotron3:Nemotron3UltraDisableThinkingRenderer",
        "nemotron3_ultra_medium_thinking": "formats.nemotron3:Nemotron3UltraMediumThinkingRenderer",
        "nemotron3_ultra_preserve_thinking": "formats.nemotron3:Nemotron3UltraPreserveThinkingRenderer",
        "phi3": "formats.phi3:Phi3Renderer",
        "qwen2_5": "formats.qwen2_5:Qwen2_5Renderer",
        "qwen3": "formats.qwen3:Qwen3Renderer",
        "qwen3_5": "formats.qwen3_5:Qwen3_5Renderer",
        "qwen3_5_disable_thinking": "formats.qwen3_5:Qwen3_5DisableThinkingRenderer",
        "qwen3_5_preserve_thinking": "formats.qwen3_5:Qwen3_5PreserveThinkingRenderer",
        "qwen3_6": "formats.qwen3_5:Qwen3_6Renderer",
        "qwen3_6_disable_thinking": "formats.qwen3_5:Qwen3_6DisableThinkingRenderer",
        "qwen3_6_preserve_thinking": "formats.qwen3_5:Qwen3_6PreserveThinkingRenderer",
        "qwen3_8": "formats.qwen3_8:Qwen3_8Renderer",
        "qwen3_8_disable_thinking": "formats.qwen3_8:Qwen3_8DisableThinkingRenderer",
        "qwen3_8_low_reasoning": "formats.qwen3_8:Qwen3_8LowRenderer",
        "qwen3_8_medium_reasoning": "formats.qwen3_8:Qwen3_8MediumRenderer",
        "qwen3_8_xhigh_reasoning": "formats.qwen3_8:Qwen3_8XHighRenderer",
        "qwen3_disable_thinking": "formats.qwen3:Qwen3DisableThinkingRenderer",
        "qwen3_instruct": "formats.qwen3_instruct:Qwen3InstructRenderer",
        "qwen3_vl": "formats.qwen3_vl:Qwen3VLRenderer",
        "qwen3_vl_instruct": "formats.qwen3_vl:Qwen3VLInstructRenderer",
        "role_colon": "formats.role_colon:RoleColonRenderer",
    }
)
"""The class of every renderer of this package, `module:class` in it, by the renderer's name.

A class is imported on first use.
"""
