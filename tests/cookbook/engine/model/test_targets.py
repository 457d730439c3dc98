"""Checks what a LoRA is put on in every family: by a table to read, and by the gradients of plain PEFT.

`python tests/cookbook/engine/model/test_targets.py` writes the table again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3] / "helpers"))

import families

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.targets import TargetTable, find_targets, unused_layers
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import Datum, LoraConfig

TABLE = Path(__file__).with_name("targets.txt")
FEW = ("deepseek_v3", "falcon", "gemma4_e2b", "llama4", "nemotron_h", "qwen3_5", "qwen3_moe")
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    ),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "Mixtral-8x7B": ("mixtral", {}),
    "Falcon-H1-7B": ("falcon_h1", {}),
    "Mamba-Codestral-7B": ("mamba2", {}),
    "ZAYA1-8B": ("zaya", {}),
}
"""Published sizes, as the defaults of transformers and what differs from them."""


def lines_of(title: str, table: TargetTable, with_shares: bool = False) -> list[str]:
    """Returns the targets by group with layers' numbers as N, and the kinds of the other weights."""
    kinds: dict[str, dict[str, int]] = {}
    for target in table.targets.values():
        place = re.sub(r"\.\d+(?=\.|$)", ".N", target.name)
        place = re.sub(r".*(layers|h|blocks)\.N\.", "", place)
        name = f"experts ({target.group})" if target.is_stacked else target.group
        counts = kinds.setdefault(name, {})
        counts[place] = counts.get(place, 0) + 1
    lines = [title]
    for name in sorted(kinds):
        lines.append(f"  {name}: " + ", ".join(f"{place} x{n}" for place, n in kinds[name].items()))
    others = sorted(table.others.items(), key=lambda item: -item[1])
    shares = [f" {count / table.num_weights:.1%}" if with_shares else "" for _, count in others]
    kinds_of_others = (f"{kind}{share}" for (kind, _), share in zip(others, shares, strict=True))
    lines.append("  none on: " + ", ".join(kinds_of_others if with_shares else sorted(kinds_of_others)))
    return lines


def lines_of_family(name: str) -> list[str]:
    return lines_of(name, find_targets(families.make(name)))


def lines_of_size(name: str) -> list[str]:
    model_type, sizes = SIZES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes))
    return lines_of(f"{name} (published size)", find_targets(model), with_shares=True)


def block_of(title: str) -> list[str]:
    """Returns the lines of a family in the table."""
    blocks = TABLE.read_text(encoding="utf-8").split("\n\n")
    return next(block.splitlines() for block in blocks if block.splitlines()[0] == title)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", FEW)
def test_the_table_of_targets_is_the_one_on_file(name: str) -> None:
    assert lines_of_family(name) == block_of(name)


def test_every_family_has_a_table_on_file() -> None:
    titles = [block.partition("\n")[0] for block in TABLE.read_text(encoding="utf-8").split("\n\n")]
    assert titles == sorted(families.FAMILIES) + [f"{name} (published size)" for name in SIZES]


@pytest.mark.slow
def test_the_tables_of_all_families_are_those_on_file() -> None:
    assert table_text() == TABLE.read_text(encoding="utf-8")


def table_text() -> str:
    blocks = [lines_of_family(name) for name in sorted(families.FAMILIES)]
    blocks += [lines_of_size(name) for name in SIZES]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def gradients_of_peft(model: Any, adapter: Path, data: list[Datum]) -> dict[str, torch.Tensor]:
    """Returns the gradients of a summed loss by plain PEFT, which reads the adapter itself."""
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
    for datum in data:
        tokens_1T = torch.tensor([datum.model_input.to_ints()])
        targets_T = torch.as_tensor(datum.loss_fn_inputs["target_tokens"].to_numpy())
        weights_T = torch.as_tensor(datum.loss_fn_inputs["weights"].to_numpy())
        logits_TV = model(input_ids=tokens_1T, use_cache=False).logits[0]
        (cross_entropy(logits_TV, targets_T, reduction="none") * weights_T).sum().backward()
    return {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if ".default." in name and parameter.grad is not None
    }


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["deepseek_v3", "falcon", "falcon_mamba", "gpt2", "nemotron_h", "zamba2"])
def test_every_adapter_gets_the_gradient_of_peft_which_reads_it_back(
    name: str, tmp_path: Path, make_trainer: Any, make_data: Any, gradients_of: Any
) -> None:
    folder = families.save(name, tmp_path / "model")
    trainer: Trainer = make_trainer(BaseModel(str(folder), EngineOptions(device="cpu")))
    data = make_data(300, [24, 40])
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    (tmp_path / "adapter").mkdir()
    trainer.base.adapters.write(trainer.adapter, tmp_path / "adapter")
    expected = gradients_of_peft(families.make(name), tmp_path / "adapter", data)

    found = gradients_of(trainer)
    assert found.keys() == expected.keys() == trainer.adapter.weights.keys()
    for weight, gradient in expected.items():
        assert gradient.abs().max() > 0, weight
        torch.testing.assert_close(
            found[weight], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()), msg=weight
        )


def test_experts_that_only_pictures_reach_carry_no_adapter() -> None:
    names = find_targets(families.make("ernie4_5_vl_moe")).targets
    assert any("text_moe.experts" in name for name in names)
    assert not any("vision" in name for name in names)


def test_experts_are_unused_unless_they_run() -> None:
    model = families.make("mixtral")
    table = find_targets(model)
    with unused_layers(table, model) as unused:
        assert {name for name in table.targets if "experts" in name} <= unused
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert not unused


def test_an_adapter_on_nothing_is_refused_and_a_missing_kind_of_layers_is_not() -> None:
    table = find_targets(families.make("falcon_mamba"))
    only_mlp = LoraConfig(train_attn=False, train_unembed=False)
    with pytest.raises(
        ConfigError, match="train_mlp=True, but falcon-mamba has no linear layer of that kind"
    ):
        table.chosen(only_mlp, "falcon-mamba")
    assert {target.group for target in table.chosen(LoraConfig(), "")} == {"train_attn", "train_unembed"}


if __name__ == "__main__":
    TABLE.write_text(table_text(), encoding="utf-8")
