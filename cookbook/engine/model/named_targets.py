"""Chooses the layers of an adapter by the names or the regular expressions of a config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from cookbook.errors import ConfigError
from cookbook.utils.nearest import did_you_mean

ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")


def layers_named(
    wanted: Sequence[str], layers: Iterable[str], head: str | None, others: Mapping[str, str], model_name: str
) -> list[str]:
    """Returns those of `layers` that `wanted` names, in their order.

    A name is a full one or its last parts (`q_proj`, `mlp.up_proj`). Other text is a regular expression that
    a full name has to match. `all-linear` names all but the `head`, as in PEFT. Raises ConfigError for a name
    that matches none; `others` has the layers that carry no adapter, with the reason.
    """
    names, chosen = list(layers), set()
    for target in wanted:
        found = {name for name in names if _is_named(name, target, head)}
        if not found:
            raise ConfigError(
                f"lora_targets names {target!r}, and {_why_none(target, names, others, model_name)}"
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _is_named(name: str, target: str, head: str | None) -> bool:
    if target == ALL_LINEAR:
        return name != head
    if _PLAIN.fullmatch(target):
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ConfigError(
            f"lora_targets has {target!r}, which is neither a name nor a regular expression ({error})."
        ) from error


def _why_none(target: str, names: Sequence[str], others: Mapping[str, str], model_name: str) -> str:
    """Returns the end of a sentence that says why a target matches no layer, and what to do."""
    refused = next((name for name in others if _is_named(name, target, None)), None)
    if refused is not None:
        return f"{refused} of {model_name} carries no adapter: {others[refused]}. Remove it."
    ends = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)} | set(names)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    nearest = did_you_mean(target, sorted(ends)) if _PLAIN.fullmatch(target) else ""
    return f"no layer of {model_name} has that name.{nearest} Layers end in: {', '.join(leaves)}."
