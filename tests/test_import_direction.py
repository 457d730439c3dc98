"""Imports point one way: types <- renderers <- supervised <- recipes, and types <- engine <- clients.

Each part of the code lists what it may import of this project; whatever is not listed is refused,
so a new arrow is a decision somebody takes here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cookbook", "renderers", "recipes")

BASE = (
    "cookbook.errors",
    "cookbook.files",
    "cookbook.json_files",
    "cookbook.nearest",
    "cookbook.notes",
    "cookbook.types",
)
TOOLS = (
    "cookbook.consoles",
    "cookbook.control_characters",
    "cookbook.embedded",
    "cookbook.environment",
    "cookbook.hub",
    "cookbook.hyperparameters",
    "cookbook.jsonl",
    "cookbook.lines",
    "cookbook.models",
    "cookbook.pretrained",
    "cookbook.run_rows",
    "cookbook.schedules",
    "cookbook.tables",
    "cookbook.trace",
)
CLIENTS = (
    "cookbook.futures",
    "cookbook.sampling_client",
    "cookbook.service",
    "cookbook.training_client",
    "cookbook.vllm_client",
)
RUN = (
    "cookbook.checkpoints",
    "cookbook.cli",
    "cookbook.config_files",
    "cookbook.documents",
    "cookbook.keys",
    "cookbook.loggers",
    "cookbook.other_trainers",
    "cookbook.run_metrics",
)
EVAL = ("cookbook.eval",)
REPORT = ("cookbook.report",)
SUPERVISED = ("cookbook.supervised",)
WORLD = ("cookbook.engine.mesh",)
"""The other processes of a run, with which a loop agrees as an engine does. It loads no torch by itself."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cookbook.errors": (),
    "cookbook.files": ("cookbook.errors",),
    "cookbook.nearest": (),
    "cookbook.json_files": ("cookbook.errors", "cookbook.files", "cookbook.nearest"),
    "cookbook.notes": (),
    "cookbook.types": ("cookbook.errors",),
    "cookbook.futures": (),
    **dict.fromkeys((*TOOLS, *RUN), (*BASE, *TOOLS, *RUN)),
    "cookbook.engine": (*BASE, "cookbook.engine", "cookbook.models", "cookbook.pretrained", "cookbook.trace"),
    **dict.fromkeys(CLIENTS[1:], (*BASE, *TOOLS, *CLIENTS, "cookbook.engine")),
    "cookbook.eval": (*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, "renderers"),
    # Prompts with references are read as training data are.
    **dict.fromkeys(
        ("cookbook.eval.generation", "cookbook.eval.questions"),
        (*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, "cookbook.supervised.data", "renderers"),
    ),
    "cookbook.chat": (*BASE, *TOOLS, *CLIENTS, *EVAL, "cookbook.chat", "renderers"),
    # A report reads what a run wrote, whatever wrote it.
    "cookbook.report": (*BASE, *TOOLS, *RUN, *REPORT),
    # Which way a metric is better is the same in a report as for the best checkpoint.
    "cookbook.report.summary": (*BASE, *TOOLS, *RUN, *REPORT, "cookbook.supervised.best"),
    # One of several processes tells of a failure.
    "cookbook.cli": (*BASE, *TOOLS, *RUN, *WORLD),
    "cookbook.supervised": (*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, *REPORT, *SUPERVISED, *WORLD, "renderers"),
    # How the engine runs is said in a run's config.
    "cookbook.supervised.train": (
        *(*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, *REPORT, *SUPERVISED, *WORLD, "renderers"),
        "cookbook.engine.options",
    ),
    # What the engine would refuse later is refused first.
    "cookbook.supervised.preflight": (
        *(*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, *REPORT, *SUPERVISED, *WORLD, "renderers"),
        "cookbook.engine.options",
        "cookbook.engine.state",
    ),
    # A run looks at the folders of its checkpoints before anything is loaded.
    "cookbook.supervised.start": (
        *(*BASE, *TOOLS, *RUN, *CLIENTS, *EVAL, *REPORT, *SUPERVISED, *WORLD, "renderers"),
        "cookbook.engine.state",
    ),
    # An export reads what an engine saved and what a run wrote; it runs neither.
    "cookbook.export": (
        *(*BASE, *TOOLS, *RUN, *REPORT, "cookbook.export", "renderers"),
        "cookbook.engine.loading",
        "cookbook.engine.peft_settings",
        "cookbook.engine.state",
        "cookbook.supervised.data.sources",
    ),
    # Many runs, or runs elsewhere: each one is a recipe, which is known by its name.
    "cookbook.clusters": BASE,
    "cookbook.recipe": (*BASE, *RUN, "cookbook.supervised.train"),
    "cookbook.sweeps": (
        *(*BASE, *RUN, *REPORT, "cookbook.clusters", "cookbook.jsonl", "cookbook.recipe", "cookbook.sweeps"),
        *("cookbook.consoles", "cookbook.control_characters", "cookbook.run_rows"),
        "cookbook.supervised.run_folder",
        "cookbook.supervised.train",
    ),
    "cookbook.jobs": (*BASE, *RUN, "cookbook.clusters", "cookbook.jobs", "cookbook.jsonl", "cookbook.recipe"),
    "renderers": (*BASE, "renderers"),
    "recipes": ("cookbook", "renderers", "recipes"),
    # The public names, imported lazily.
    "cookbook": (*BASE, *CLIENTS),
}
"""The longest name that covers a module counts."""

MAY_NOT_LOAD: dict[str, tuple[str, ...]] = {
    "cookbook.engine": ("chz", "datasets", "wandb"),
    **dict.fromkeys(CLIENTS, ("chz", "datasets", "wandb")),
    "renderers": ("chz", "datasets", "peft", "torch", "wandb"),
}
"""Third-party packages that a part keeps away from, even lazily."""


def covers(part: str, module: str) -> bool:
    return module == part or module.startswith(part + ".")


def rule_for(rules: dict[str, tuple[str, ...]], module: str) -> tuple[str, ...] | None:
    parts = [part for part in rules if (part == module if part == "cookbook" else covers(part, module))]
    return rules[max(parts, key=len)] if parts else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {
        module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
    }


MODULES = modules()


def imports(source: str, module: str) -> Iterator[str]:
    """The full name of every module that `source` imports: at the top, lazily, or for types alone."""
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                home = ".".join([*above, *([home] if home else [])])
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                yield whole if whole in MODULES else home


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of a module, one line each."""
    allowed = rule_for(MAY_IMPORT, module)
    if allowed is None:
        return [f"{module} has no rule: say in MAY_IMPORT what it may import"]
    forbidden = rule_for(MAY_NOT_LOAD, module) or ()
    found = []
    for name in imports(source, module):
        is_ours = name.split(".")[0] in PACKAGES
        if is_ours and not any(covers(part, name) for part in allowed):
            found.append(f"{module} imports {name}")
        if not is_ours and any(covers(package, name) for package in forbidden):
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert violations(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if part != "cookbook"])
def test_every_rule_is_about_something(part: str) -> None:
    assert any(covers(part, module) for module in MODULES)


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        ("cookbook.types", "import torch\nfrom cookbook.engine import packing", "cookbook.engine.packing"),
        ("cookbook.errors", "from cookbook.types import Datum", "cookbook.types"),
        ("cookbook.engine.trainer", "import renderers", "renderers"),
        (
            "cookbook.engine.trainer",
            "def f():\n    from cookbook.supervised import train",
            "cookbook.supervised.train",
        ),
        ("cookbook.engine.trainer", "from cookbook.eval.samples import x", "cookbook.eval.samples"),
        ("cookbook.engine.trainer", "import chz", "chz"),
        ("cookbook.engine.trainer", "from chz.blueprint import Reference", "chz.blueprint"),
        ("cookbook.engine.trainer", "from .. import service", "cookbook.service"),
        ("cookbook.engine.trainer", "from ..service import ServiceClient", "cookbook.service"),
        ("cookbook.engine", "from ..futures import APIFuture", "cookbook.futures"),
        ("cookbook.engine.trainer", "import cookbook", "cookbook"),
        ("cookbook.engine.new", "from cookbook import Datum", "cookbook"),
        ("cookbook.service", "from renderers import Message", "renderers"),
        ("cookbook.supervised.data", "from cookbook.engine import packing", "cookbook.engine.packing"),
        ("cookbook.supervised.data", "import recipes.sft", "recipes.sft"),
        ("cookbook.eval.samples", "from cookbook.supervised import train", "cookbook.supervised.train"),
        ("renderers.base", "if TYPE_CHECKING:\n    import torch", "torch"),
        ("renderers.base", "from torch import Tensor", "torch"),
        ("renderers.base", "from cookbook import models", "cookbook.models"),
        ("renderers.base", "from cookbook.futures import APIFuture", "cookbook.futures"),
        ("cookbook.cli", "from recipes import sft", "recipes.sft"),
    ],
)
def test_the_check_sees_a_bad_import(module: str, line: str, imported: str) -> None:
    assert violations(f"from __future__ import annotations\n{line}\n", module) == [
        f"{module} imports {imported}"
    ]


def test_the_check_lets_good_imports_pass() -> None:
    assert (
        violations(
            "import torch\nfrom cookbook import models\nfrom .packing import pack", "cookbook.engine.x"
        )
        == []
    )
    assert violations("import cookbook\nfrom renderers import Message\nimport chz", "recipes.x") == []


def test_a_module_without_a_rule_is_found() -> None:
    assert violations("", "cookbook.brand_new") == [
        "cookbook.brand_new has no rule: say in MAY_IMPORT what it may import"
    ]
