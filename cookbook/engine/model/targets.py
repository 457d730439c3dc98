"""Lists what a model has for a LoRA to be put on: its linear layers and its experts' stacked weights.

Names are full, because a short name may also be that of a vision tower's layer or of a router. The list is
read from the modules alone, so it is the same for a model without memory for its weights (device "meta").

A LoRA is put on every product of hidden states with a weight in the language model: attention, recurrent
layers, MLPs, shared and routed experts, the projections around them, and the projection to the vocabulary.
`WHY_NOT` lists the weights that carry none.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import operator
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cookbook.engine.model.expert_forms import form_of, num_flat_experts
from cookbook.engine.model.named_targets import layers_named
from cookbook.engine.model.text_part import text_decoder
from cookbook.errors import ConfigError
from cookbook.types import LoraConfig

Group: TypeAlias = Literal["train_attn", "train_mlp", "train_unembed"]
"""The option of a LoraConfig that a layer belongs to."""
GROUPS: tuple[Group, ...] = ("train_attn", "train_mlp", "train_unembed")

WHY_NOT: Mapping[str, str] = {
    "other parts": "they are not part of the language model (vision, audio, further heads)",
    "routers": "they choose and weight experts",
    "indexers": "they choose positions, and get no gradient",
    "the projection": "its rows are trained for added tokens, and PEFT puts no LoRA beside these",
    "unused layers": "they do not run, and get no gradient",
    "layers read directly": "the model reads their weight without running them",
    "experts read directly": "the model reads their weights from outside, where PEFT's adapter has no effect",
    "special layers": "they compute another product than a linear layer",
    "layers PEFT refuses": "PEFT supports no adapter on them in this architecture",
    "embeddings": "they are looked up, not multiplied",
    "convolutions": "they have few weights",
    "norms and vectors": "they have few weights",
}
"""For each kind of weights without an adapter, the reason."""

_TOKEN_MIXER = re.compile(r"attn|attention|mamba|\bssm|delta_?net|short_?conv|recurren|rwkv|lightning|kda")
_MLP = re.compile(r"mlp|moe|expert|feed_?forward|ffn|ffw")
_CONTAINER = re.compile(r"(Layer|Block|Model|LM|Generation|Decoder)$")
"""Classes of modules that hold both kinds of layers, and may be named after one."""

_OTHER_INPUTS = re.compile(r"(^|_)(vision|visual|image|video|audio|speech)(_|$)")
"""Modules that compute with other inputs than text, also inside a decoder (experts of ERNIE 4.5 VL)."""

_REFUSED_BY_PEFT = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Model types on whose `out_proj` PEFT puts no adapter: a fused kernel may read its weight directly."""


@dataclass(frozen=True)
class Target:
    """A linear layer, or the stacked weights [E, ...] of experts."""

    name: str
    group: Group
    num_weights: int
    is_stacked: bool = False
    num_rows: int = 0
    """The number of rows of its matrices as they are stored."""


@dataclass(frozen=True)
class TargetTable:
    """The targets of a model by name, and the number of its other weights by their kind (see `WHY_NOT`)."""

    targets: Mapping[str, Target]
    others: Mapping[str, int]
    names: frozenset[str] = field(repr=False)
    """The names of all modules."""
    kinds: Mapping[str, str] = field(repr=False)
    """The kind of each layer that is no target."""

    def chosen(self, lora: LoraConfig, model_name: str) -> list[Target]:
        """Returns the targets that the options choose. Raises ConfigError if an option chooses none."""
        if lora.targets:
            return self._named(lora, model_name)
        wanted = [group for group in GROUPS if getattr(lora, group)]
        if not wanted:
            raise ConfigError("Nothing to train: set train_attn, train_mlp or train_unembed.")
        found = [target for target in self.targets.values() if target.group in wanted]
        if not found:
            raise ConfigError(
                f"{' and '.join(f'{group}=True' for group in wanted)}, but {model_name} has no linear layer "
                f"of that kind to put an adapter on."
            )
        return found

    def _named(self, lora: LoraConfig, model_name: str) -> list[Target]:
        """Returns the targets that `lora.targets` names."""
        reasons = {name: WHY_NOT[kind] for name, kind in self.kinds.items()}
        head = next((name for name, target in self.targets.items() if target.group == "train_unembed"), None)
        if lora.add_tokens and head is not None:
            reasons[head] = "rows of the projection are trained for add_tokens"
        names = [name for name in self.targets if name not in reasons]
        return [self.targets[name] for name in layers_named(lora.targets, names, head, reasons, model_name)]

    def without(self, names: Collection[str], kind: str) -> TargetTable:
        """Returns the table without some targets, which become layers of this kind."""
        others = dict(self.others)
        for name in names:
            others[kind] = others.get(kind, 0) + self.targets[name].num_weights
        kinds = {**self.kinds, **dict.fromkeys(names, kind)}
        targets = {name: target for name, target in self.targets.items() if name not in names}
        return TargetTable(targets, others, self.names, kinds)

    def without_adapter(self, lora: LoraConfig) -> dict[str, int]:
        """Returns the number of weights without an adapter by their kind, largest first."""
        counts = dict(self.others)
        named = self._names_in(lora)
        for target in self.targets.values():
            if named is not None:
                if target.name in named:
                    continue
                kind = "layers not named"
            elif lora.add_tokens and target.group == "train_unembed":
                kind = "the projection"
            elif not getattr(lora, target.group):
                kind = f"{target.group}=False"
            else:
                continue
            counts[kind] = counts.get(kind, 0) + target.num_weights
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def _names_in(self, lora: LoraConfig) -> set[str] | None:
        """Returns the targets that an adapter names, or None if options choose them."""
        if lora.peft is not None:
            explicit = lora.peft.explicit
            given = [*explicit["target_modules"], *(explicit["target_parameters"] or ())]
            return {
                name
                for name in self.targets
                if any(name == one or f"{name}.weight" == one or name.endswith(f".{one}") for one in given)
            }
        return {target.name for target in self._named(lora, "")} if lora.targets else None

    @property
    def num_weights(self) -> int:
        return sum(self.others.values()) + sum(target.num_weights for target in self.targets.values())


def find_targets(model: Any) -> TargetTable:
    """Returns the table of a model of transformers that carries no adapter yet."""
    decoder, head = text_decoder(model), model.get_output_embeddings()
    in_decoder = {id(module) for module in decoder.modules()}
    modules = dict(model.named_modules())
    targets: dict[str, Target] = {}
    others: dict[str, int] = {}
    kinds: dict[str, str] = {}
    seen: set[int] = set()
    if isinstance(head, nn.Linear):  # before the embeddings, which may be tied to it
        name = next(name for name, module in modules.items() if module is head)
        targets[name] = Target(name, "train_unembed", _num_weights(head.weight))
        seen.add(id(head.weight))
    for name, module in modules.items():
        path = list(_ancestors(name, modules))
        for short, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            reason = _why_not(module, short, path, id(module) in in_decoder, model)
            if reason is None:
                is_stacked = not isinstance(module, nn.Linear | Conv1D)
                full = f"{name}.{short}" if is_stacked else name
                num_rows = parameter.numel() // parameter.shape[-1]
                targets[full] = Target(full, _group(path), _num_weights(parameter), is_stacked, num_rows)
            else:
                others[reason] = others.get(reason, 0) + _num_weights(parameter)
                kinds[name if short == "weight" else f"{name}.{short}"] = reason
    places = {name: place for place, name in enumerate(modules)}
    in_order = sorted(targets.values(), key=lambda target: (target.is_stacked, places.get(target.name, 0)))
    return TargetTable({target.name: target for target in in_order}, others, frozenset(modules), kinds)


@contextlib.contextmanager
def unused_layers(table: TargetTable, model: Any) -> Iterator[set[str]]:
    """Yields a set from which each target is removed whose module runs in the body.

    The body runs the model on some text. What is left would get no gradient: layers whose place is taken by
    those of another layer that they share weights with, or that only pictures reach. A single expert's layers
    are not in the set, because they may run for another text, and neither is the projection to the
    vocabulary, which runs elsewhere.
    """
    unused: set[str] = set()
    hooks = []
    for name, module in model.named_modules():
        names = {name, *(f"{name}.{short}" for short, _ in module.named_parameters(recurse=False))}
        found = [table.targets[each] for each in names & table.targets.keys()]
        mine = {
            target.name
            for target in found
            if target.is_stacked or (target.group != "train_unembed" and "expert" not in name)
        }
        if mine:
            unused.update(mine)
            hooks.append(module.register_forward_hook(lambda *_, mine=mine: unused.difference_update(mine)))
    try:
        yield unused
    finally:
        for hook in hooks:
            hook.remove()


def _why_not(
    module: nn.Module, short: str, path: list[tuple[str, nn.Module]], is_in_decoder: bool, model: Any
) -> str | None:
    """Returns the kind of a weight that carries no adapter, or None for a target.

    `path` has the module and its ancestors by their attribute name, from the inside out.
    """
    leaf, parent = path[0][0], path[1][1] if len(path) > 1 else None
    words = [f"{name} {type(part).__name__}".lower() for name, part in path if name]
    parameter = getattr(module, short)
    if module is model.get_output_embeddings():
        return "norms and vectors"  # its bias
    is_of_pictures = any(_OTHER_INPUTS.search(name) for name, _ in path)
    if not is_in_decoder or is_of_pictures or any(re.search(r"\bmtp\b|mtp_|nextn", word) for word in words):
        return "embeddings" if isinstance(module, nn.Embedding) else "other parts"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if any("indexer" in word for word in words):
        return "indexers"
    if any("router" in word for word in words) or _is_gate(path, parameter):
        return "routers"
    if parameter.dim() == 3 and (any("expert" in word for word in words) or form_of(module) is not None):
        return None
    if num_flat_experts(module) is not None:
        return "experts read directly"
    is_linear = isinstance(module, nn.Linear | Conv1D) and short == "weight"
    is_conv = "conv" in type(module).__name__.lower() and not isinstance(module, Conv1D)
    if re.search(r"conv\d?d?$", leaf) or parameter.dim() > 2 or is_conv:
        return "convolutions"
    if not is_linear:
        return "special layers" if short == "weight" and parameter.dim() == 2 else "norms and vectors"
    if isinstance(module, nn.Linear) and not is_plain(module):
        return "special layers"
    if _is_unused(leaf, parent):
        return "unused layers"
    if parent is not None and _reads_weight(type(parent), leaf):
        return "layers read directly"
    if leaf in ("out_proj", "conv1d") and model.config.model_type in _REFUSED_BY_PEFT:
        return "layers PEFT refuses"
    return None


def _is_gate(path: list[tuple[str, nn.Module]], weight: Tensor) -> bool:
    """Returns whether a layer chooses or weights experts: a router, or the gate of a shared expert."""
    for (name, _), (_, parent) in itertools.pairwise(path):
        has_experts = any("expert" in child for child, _ in parent.named_children())
        if has_experts and (name in ("gate", "wg") or (name.endswith("_gate") and weight.shape[0] == 1)):
            return True
    return False


def is_plain(module: nn.Linear) -> bool:
    """Returns whether a linear layer computes x W^T.

    The code of a model may define a subclass that computes something else, or needs more than a weight. So
    its forward is tried on a small weight.
    """
    kind = type(module)
    is_of_model = re.match(r"transformers(\.models|_modules)\.", kind.__module__)
    if kind.forward is nn.Linear.forward or not is_of_model:
        return True
    small: Any = kind.__new__(kind)
    nn.Module.__init__(small)
    small.in_features, small.out_features, small.bias = 2, 3, None
    on_cpu = functools.partial(torch.tensor, device="cpu")  # a model is made on "meta"
    x_NI = on_cpu([[0.5, -1.0], [2.0, 0.25]])
    small.weight = nn.Parameter(on_cpu([[1.0, 2.0], [3.0, -4.0], [0.5, 1.5]]))
    try:
        found = kind.forward(small, x_NI)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.equal(found, x_NI @ small.weight.T)


def _is_unused(leaf: str, parent: nn.Module | None) -> bool:
    """Returns whether a layer of attention is there only in the files: an earlier layer's result is used."""
    shares = getattr(parent, "is_kv_shared_layer", False)
    return bool(shares) and leaf in ("k_proj", "v_proj")


def _reads_weight(parent: type, leaf: str) -> bool:
    """Returns whether the code of a module multiplies with the weight of a child itself.

    An adapter on the child would have no effect. A fused kernel that is used only in training mode is no such
    place, because neither this engine nor generation uses that mode.
    """
    return leaf in _weights_read(parent.__module__, parent.__qualname__)


_DESCRIPTIONS = ("device", "dtype", "ndim", "requires_grad", "shape", "size")
_INITIALISERS = ("__init__", "init_weights", "reset_parameters", "init_mamba_weights")


@functools.cache
def _weights_read(module: str, name: str) -> frozenset[str]:
    """Returns the children whose weight the code of a class uses; none if its source is not at hand."""
    try:
        source = inspect.getsource(operator.attrgetter(name)(sys.modules[module]))
    except (AttributeError, KeyError, OSError, TypeError):
        return frozenset()
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(textwrap.dedent(source))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name in _INITIALISERS:
            continue
        if isinstance(node, ast.If) and "self.training" in _conditions(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Attribute) and node.attr in _DESCRIPTIONS:
            continue
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".weight"):
            continue  # slices are those of tensor parallelism, which is off
        match node:
            case ast.Attribute(ast.Attribute(ast.Name("self"), child), "weight"):
                found.add(child)
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def _conditions(test: ast.expr) -> list[str]:
    """Returns the conditions that all have to hold."""
    is_and = isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
    return [ast.unparse(part) for part in (test.values if is_and else [test])]  # type: ignore[attr-defined]


def _group(path: list[tuple[str, nn.Module]]) -> Group:
    """Returns the group by the innermost module that is named after one."""
    for name, module in path:
        kind = type(module).__name__
        words = name.lower() if _CONTAINER.search(kind) else f"{name} {kind}".lower()
        if _TOKEN_MIXER.search(words):
            return "train_attn"
        if _MLP.search(words):
            return "train_mlp"
    return "train_mlp"


def _ancestors(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    while name:
        outer, _, leaf = name.rpartition(".")
        yield leaf, modules[name]
        name = outer
    yield "", modules[""]


def _num_weights(parameter: Any) -> int:
    """Returns the number of weights, also of a parameter that holds them in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())
