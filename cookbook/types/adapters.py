"""The shape of an adapter, and what is refused about it whatever the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cookbook.errors import ConfigError
from cookbook.types.values import Value

MAX_RANK = 16_384
"""No published model has a weight whose smaller side is larger, so a larger rank adds nothing."""


@dataclass(frozen=True)
class PeftSettings:
    """The settings of a saved adapter: its `adapter_config.json`, and the layers that its tensors are of.

    `explicit` are arguments of PEFT's LoraConfig in which every layer is named in full.
    """

    written: Mapping[str, Any]
    explicit: Mapping[str, Any]


@dataclass(frozen=True)
class LoraConfig(Value):
    """The shape of an adapter. It is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`."""

    rank: int = 32
    alpha: float = 32.0
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    targets: Sequence[str] = ()
    """The layers to adapt, by names or regular expressions, instead of those that `train_...` choose."""
    dropout: float = 0.0
    """The share of the adapter's inputs that is dropped in training."""
    use_rslora: bool = False
    add_tokens: Sequence[str] = ()
    """Tokens to add to the tokenizer, whose rows of the embeddings and the projection are trained."""
    peft: PeftSettings | None = field(default=None, compare=False, repr=False)
    """The settings of a saved adapter, which take the place of the others. None for a new adapter."""

    def as_json(self) -> dict[str, Any]:
        """Returns the values as JSON, without those that the adapter's own file holds or that are unset."""
        unset = {
            name for name in ("targets", "dropout", "use_rslora", "add_tokens") if not getattr(self, name)
        }
        return {name: value for name, value in vars(self).items() if name != "peft" and name not in unset}


LORA_KEYS = {
    "rank": "lora_rank", "alpha": "lora_alpha", "targets": "lora_targets", "dropout": "lora_dropout",
}  # fmt: skip
"""The keys of a run for those settings of an adapter that have other names there."""


def check_lora(lora: LoraConfig) -> None:
    """Raises ConfigError for settings that exclude each other, whatever the model."""
    check_tokens(lora.add_tokens)
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"Invalid lora_dropout={lora.dropout}: must be >= 0 and < 1.")
    of_lora = ("targets", "dropout", "use_rslora")
    if not lora.rank and (given := [name for name in of_lora if getattr(lora, name)]):
        raise ConfigError(
            f"{LORA_KEYS.get(given[0], given[0])} is a setting of a LoRA, and a rank of 0 trains the model's "
            f"own weights. Remove it, or set a rank of at least 1."
        )
    if lora.targets and not (lora.train_attn and lora.train_mlp and lora.train_unembed):
        raise ConfigError(
            "lora_targets names the layers to adapt, and so do train_attn, train_mlp and train_unembed. "
            "Remove one or the other."
        )
    for number, target in enumerate(lora.targets):
        if not isinstance(target, str) or not target.strip():
            raise ConfigError(f"lora_targets has {target!r} as number {number + 1}, which names no layer.")


def check_tokens(add_tokens: Sequence[str]) -> None:
    """Raises ConfigError unless these are different texts that a tokenizer can have as tokens."""
    for number, token in enumerate(add_tokens):
        if not isinstance(token, str) or token != token.strip() or not token:
            raise ConfigError(
                f"Invalid token {token!r} in add_tokens: must be text without white space around it."
            )
        if token in add_tokens[:number]:
            raise ConfigError(f"add_tokens names {token!r} twice. Remove one of the two.")
