"""The settings of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cookbook.errors import RequestError
from cookbook.types.values import Value


@dataclass
class AdamParams(Value):
    """The settings of one AdamW step. `weight_decay` is decoupled. `grad_clip_norm` of 0 disables clipping.

    Attributes may be set; a step takes them as they are when it is called, and checks them again.

    Raises RequestError for a value that is not a number of 0 or more, and for a beta of 1 or more.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            try:
                number = float(value + 0.0)  # refuses a string, and copies an array of one number
            except (TypeError, ValueError) as error:
                raise RequestError(f"Invalid {name}={value!r}: must be a number.") from error
            below = 1 if name.startswith("beta") else math.inf
            if not 0 <= number < below:
                must = "at least 0 and below 1" if below == 1 else "finite and at least 0"
                raise RequestError(f"Invalid {name}={value!r}: must be {must}.")
            setattr(self, name, number)


@dataclass(frozen=True)
class AdamOptimizerConfig(Value):
    """The optimizer of a training client: AdamW, the only one here."""

    type: Literal["adamw"] = "adamw"


def check_optimizer(optimizer: object) -> None:
    """Raises RequestError for another optimizer than AdamW."""
    kind = optimizer.get("type") if isinstance(optimizer, dict) else getattr(optimizer, "type", None)
    if optimizer is not None and kind != "adamw":
        raise RequestError(f"Optimizer {kind or optimizer!r} is not supported. Use AdamOptimizerConfig().")
