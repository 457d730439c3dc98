"""Names of renderers in tinker-cookbook 0.6, and what to use instead of each one here.

Renderers of this package are in backticks.
"""

from __future__ import annotations

from collections.abc import Mapping

_OWN = "It is not supported here. Use `chat_template`, the model's own template"
_SWITCH = "It is not supported here. `chat_template` is the model's own template, in its default mode"

ANSWERS: Mapping[str, str] = {
    "deepseekv3_disable_thinking": "Here it is `deepseekv3` for V3, and `deepseekv3_1` for V3.1",
    "deepseekv4_1": _OWN,
    "deepseekv4_1_low_reasoning": _OWN,
    "deepseekv4_1_max_reasoning": _OWN,
    "deepseekv4_1_disable_thinking": _SWITCH,
    "deepseekv4_1_preserve_thinking": _OWN,
    "glm5_3_max_reasoning": _OWN,
    "glm5_3_low_reasoning": _OWN,
    "glm5_3_high_reasoning": _OWN,
    "kimi_k31_pro_max_reasoning": _OWN,
    "kimi_k31_pro_high_reasoning": _OWN,
    "kimi_k31_pro_low_reasoning": _OWN,
    "kimi_k31_pro_disable_thinking": _SWITCH,
    "kimi_k31_pro_no_reasoning_effort": _OWN,
    "gpt_oss_no_sysprompt": "Here is none without the system message, which `gpt_oss` always prints",
    "gpt_oss_low_reasoning": "Here it is `gpt_oss_low`",
    "gpt_oss_medium_reasoning": "Here it is `gpt_oss`",
    "gpt_oss_high_reasoning": "Here it is `gpt_oss_high`",
    "tml_v0": _OWN,
}
