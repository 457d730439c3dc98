"""Models run in evaluation mode, also when they are trained. What training mode changes is known.

A LoRA that is trained in evaluation mode is right for plain transformers in that mode. Where training mode
does more than dropout, the reason stands here why that is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from families import FAMILIES
from transformers.models.auto.configuration_auto import model_type_to_module_name

SAME = "the same values by a fused kernel, in other chunks, or without a cache"
NOISE = "noise on the inputs of routers, like dropout"
OTHERS = {
    SAME: "bamba cohere_compass falcon_h1 falcon_mamba granitemoehybrid mamba mamba2 nemotron_h zamba2",
    NOISE: "dbrx minimax minimax_m2 mixtral phimoe",
    "coefficients are clipped to +-120, far from any that is published": "gemma3n",
    "an argument is required that marks pictures": "molmo2",
    "a random choice for sound": "phi4_multimodal",
    "divided weights, or no gradients of long texts, which `loading` undoes": "rwkv xlstm",
}
"""What training mode changes but dropout, and the modules of transformers in which it does."""
_DROPOUT = re.compile(r"dropout|drop_p|layerdrop|gradient_checkpointing|\bp=|training=self\.training")


def uses_of_training_mode(module: str) -> list[str]:
    """Returns the lines of a module's code that ask for training mode, but for dropout and checkpointing."""
    folder = Path(transformers.__file__).parent / "models" / module
    lines = [
        line.strip()
        for path in folder.glob("modeling_*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "self.training" in line
    ]
    return [line for line in lines if not _DROPOUT.search(line)]


def test_what_training_mode_changes_in_each_family_is_known() -> None:
    types = {family.model_type for family in FAMILIES.values()}
    types |= {
        str(family.text["model_type"]) for family in FAMILIES.values() if "model_type" in (family.text or {})
    }
    modules = {model_type_to_module_name(model_type) for model_type in types}
    found = {module for module in modules if uses_of_training_mode(module)}
    assert found == {*" ".join(OTHERS.values()).split()}
