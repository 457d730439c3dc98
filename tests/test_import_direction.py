"""Imports point one way: every room lists the rooms that it may import, which are above it in the list.

There is one rule per room, without exceptions. Decide on a new arrow here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from benchmarks import import_graph
from benchmarks.import_graph import MODULES, PACKAGES, covers, imports

BASE = ("cookbook.errors", "cookbook.utils", "cookbook.types")
MODELS = (*BASE, "cookbook.embedded", "cookbook.models", "cookbook.trace")
RUN = ("cookbook.config", "cookbook.runs", "cookbook.loggers")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cookbook.errors": (),
    "cookbook.utils": ("cookbook.errors",),
    "cookbook.types": ("cookbook.errors",),
    "cookbook.embedded": ("cookbook.errors", "cookbook.utils"),
    "cookbook.models": (*BASE, "cookbook.embedded"),
    "cookbook.trace": BASE,
    "renderers": BASE,
    "cookbook.engine": MODELS,
    "cookbook.clients": (*MODELS, "cookbook.engine"),
    "cookbook.config": (*BASE, "cookbook.engine"),
    "cookbook.data": (*MODELS, "cookbook.config", "renderers"),
    "cookbook.runs": (*MODELS, "cookbook.engine", "cookbook.config"),
    "cookbook.loggers": (*BASE, "cookbook.runs"),
    "cookbook.report": (*BASE, *RUN),
    "cookbook.eval": (*MODELS, *RUN, "cookbook.clients", "cookbook.data", "renderers"),
    "cookbook.chat": (*MODELS, *RUN, "cookbook.clients", "cookbook.eval", "renderers"),
    "cookbook.server": (*MODELS, *RUN, "cookbook.clients", "cookbook.engine", "renderers"),
    "cookbook.export": (*MODELS, *RUN, "cookbook.data", "cookbook.engine", "renderers"),
    "cookbook.supervised": (
        *(*MODELS, *RUN, "cookbook.clients", "cookbook.data", "cookbook.engine", "cookbook.eval"),
        *("cookbook.report", "cookbook.export", "renderers"),
    ),
    "cookbook.sweeps": (*MODELS, *RUN, "cookbook.supervised"),
    "cookbook.jobs": (*MODELS, *RUN, "cookbook.supervised"),
    "cookbook.vllm_client": ("cookbook.clients",),
    "recipes": ("cookbook", "renderers"),
    "cookbook": ("cookbook.clients", "cookbook.errors", "cookbook.types", "cookbook.utils"),
}
"""What a room may import besides itself. The longest name that covers a module counts."""

MAY_NOT_LOAD: dict[str, tuple[str, ...]] = {
    "cookbook.engine": ("chz", "datasets", "wandb"),
    "cookbook.clients": ("chz", "datasets", "wandb"),
    "renderers": ("chz", "datasets", "peft", "torch", "wandb"),
}
"""Third-party packages that a room must not import, not even lazily."""


def rooms_may_import(module: str) -> tuple[str, ...] | None:
    rule = rule_for(MAY_IMPORT, module)
    own = [room for room in MAY_IMPORT if room != "cookbook" and covers(room, module)]
    return rule if rule is None else (*rule, *own)


def rule_for(rules: dict[str, tuple[str, ...]], module: str) -> tuple[str, ...] | None:
    parts = [part for part in rules if (part == module if part == "cookbook" else covers(part, module))]
    return rules[max(parts, key=len)] if parts else None


def violations(source: str, module: str, read: Callable[[str, str], Iterable[str]] = imports) -> list[str]:
    """Returns a line for each forbidden import that `read` finds in a module."""
    allowed = rooms_may_import(module)
    if allowed is None:
        return [f"{module} has no rule: say in MAY_IMPORT what it may import"]
    forbidden = rule_for(MAY_NOT_LOAD, module) or ()
    found = []
    for name in read(source, module):
        is_ours = name.split(".")[0] in PACKAGES
        if is_ours and not any(covers(part, name) for part in allowed):
            found.append(f"{module} imports {name}")
        if not is_ours and any(covers(package, name) for package in forbidden):
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.slow  # `make check` runs it
def test_imports_point_one_way() -> None:
    found = [line for module, path in MODULES.items() for line in violations(path.read_text("utf-8"), module)]
    assert found == []


@pytest.mark.slow  # `make check` runs it
def test_no_file_imports_one_that_imports_it() -> None:
    assert import_graph.circles(import_graph.graph()) == []


def test_a_room_imports_only_rooms_above_it() -> None:
    rooms = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        above = rooms[: rooms.index(room)]
        assert all(any(covers(one, other) for other in above) or one == "cookbook" for one in allowed), room


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if part != "cookbook"])
def test_every_rule_covers_a_module(part: str) -> None:
    assert any(covers(part, module) for module in MODULES)


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        (
            "cookbook.types",
            "import torch\nfrom cookbook.engine.model import packing",
            "cookbook.engine.model.packing",
        ),
        ("cookbook.errors", "from cookbook.types import Datum", "cookbook.types"),
        ("cookbook.engine.training.trainer", "import renderers", "renderers"),
        (
            "cookbook.engine.training.trainer",
            "def f():\n    from cookbook.supervised import train",
            "cookbook.supervised.train",
        ),
        ("cookbook.engine.training.trainer", "from cookbook.eval.samples import x", "cookbook.eval.samples"),
        ("cookbook.engine.training.trainer", "import chz", "chz"),
        ("cookbook.engine.training.trainer", "from chz.blueprint import Reference", "chz.blueprint"),
        ("cookbook.engine.training.trainer", "from ...clients import service", "cookbook.clients.service"),
        (
            "cookbook.engine.training.trainer",
            "from ...clients.service import ServiceClient",
            "cookbook.clients.service",
        ),
        ("cookbook.engine", "from ..clients.futures import APIFuture", "cookbook.clients.futures"),
        ("cookbook.engine.training.trainer", "import cookbook", "cookbook"),
        ("cookbook.engine.new", "from cookbook import Datum", "cookbook"),
        ("cookbook.clients.service", "from renderers import Message", "renderers"),
        ("cookbook.data", "from cookbook.engine.model import packing", "cookbook.engine.model.packing"),
        ("cookbook.data", "import recipes.sft", "recipes.sft"),
        ("cookbook.eval.samples", "from cookbook.supervised import train", "cookbook.supervised.train"),
        ("renderers.base", "if TYPE_CHECKING:\n    import torch", "torch"),
        ("renderers.base", "from torch import Tensor", "torch"),
        ("renderers.base", "from cookbook import models", "cookbook.models"),
        ("renderers.base", "from cookbook.clients.futures import APIFuture", "cookbook.clients.futures"),
        ("cookbook.config.cli", "from recipes import sft", "recipes.sft"),
    ],
)
def test_the_check_finds_a_forbidden_import(module: str, line: str, imported: str) -> None:
    assert violations(f"from __future__ import annotations\n{line}\n", module) == [
        f"{module} imports {imported}"
    ]


def test_the_check_accepts_permitted_imports() -> None:
    assert (
        violations(
            "import torch\nfrom cookbook import models\nfrom .packing import pack", "cookbook.engine.x"
        )
        == []
    )
    assert violations("import cookbook\nfrom renderers import Message\nimport chz", "recipes.x") == []


def test_a_module_without_a_rule_is_reported() -> None:
    assert violations("", "cookbook.brand_new") == [
        "cookbook.brand_new has no rule: say in MAY_IMPORT what it may import"
    ]
