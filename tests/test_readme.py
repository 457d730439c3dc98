"""The commands and programs of the README and of every page in docs/ run, and what they name exists.

A block that another test runs says so in the line before it: <!-- run by tests/cookbook/test_that.py -->
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import chz
import pytest

from cookbook import embedded
from cookbook.config import cli
from cookbook.data.formats import FORMATS, recognise
from cookbook.export.config import ExportConfig
from cookbook.supervised import memory_table, train
from cookbook.supervised.recipe import find_recipe
from cookbook.sweeps import make_plan
from recipes import dpo, jobs, preview, sft

REPOSITORY = Path(__file__).parents[1]
RUN_ELSEWHERE = {
    ("docs/rollouts.md", "bash"): "tests/test_rollouts_page.py",
    ("docs/rollouts.md", "python"): "tests/test_rollouts_page.py",
    ("docs/server.md", "python"): "tests/cookbook/server/test_page.py",
}
"""Commands and programs of pages that another test runs."""
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RENDERERS = (REPOSITORY / "renderers" / "README.md").read_text(encoding="utf-8")
SECURITY = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
}
BLOCK = re.compile(
    r"^(<!-- run by (?P<test>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.M
)


class Block(NamedTuple):
    page: str
    text: str
    run_by: str | None


def blocks(language: str) -> list[Block]:
    return [
        Block(page, match["text"], match["test"] or RUN_ELSEWHERE.get((page, match["language"])))
        for page, text in PAGES.items()
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


LINES = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    if block.run_by is None
    for line in block.text.replace("\\\n", " ").splitlines()
]
VARIABLES = re.compile(r"^(?:[A-Z_]+=(?:\S*\$\([^)]*\)|\S+)\s+)+")
"""The environment variables that stand before a command."""
COMMANDS = sorted({VARIABLES.sub("", line) for line in LINES if line})
MAKE_TARGETS = sorted({command.split()[1] for command in COMMANDS if command.startswith("make ")})
RECIPE_COMMANDS = [
    re.sub(r"^sft-cookbook (?=\w+)", "python -m recipes.", command)
    for command in COMMANDS
    if re.match(r"(python -m recipes\.|sft-cookbook \w+)", command)
]
INSTALLATIONS = [command for command in COMMANDS if re.match(r"(uv )?pip install ", command)]
OTHER_COMMANDS = {  # each with the test that runs it
    "source .venv/bin/activate": None,
    "uv venv": None,
    "python my_program.py": "tests/tinker/test_programs.py",
    "sft-cookbook": "tests/recipes/test_console.py",
    "sft-cookbook --version": "tests/recipes/test_console.py",
    'eval "$(sft-cookbook completion bash)"': "tests/recipes/test_console.py",
}
TRAINING_CONFIGS = {"recipes.sft": (train.Config, sft), "recipes.preview": (preview.PreviewConfig, preview)}
OTHER_CONFIGS = {"recipes.export": ExportConfig, "recipes.dpo": dpo.DpoConfig}
"""Config classes of recipes that do not define one themselves."""
SUBCOMMANDS = {"recipes.estimate": {"table"}}
PROGRAMS = [*(block for block in blocks("python") if block.run_by is None)]


def test_every_command_is_tested() -> None:
    makes = [command for command in COMMANDS if command.startswith("make ")]
    assert len(COMMANDS) == len(RECIPE_COMMANDS) + len(makes) + len(INSTALLATIONS) + len(OTHER_COMMANDS)
    assert set(COMMANDS) >= set(OTHER_COMMANDS)
    assert len(RECIPE_COMMANDS) >= 20
    for language in ("bash", "python"):
        for block in blocks(language):
            assert block.run_by is None or (REPOSITORY / block.run_by).is_file(), block.run_by


def own_config(recipe: ModuleType) -> type:
    """Returns the config class that a recipe defines."""
    (found,) = (
        value
        for value in vars(recipe).values()
        if isinstance(value, type) and chz.is_chz(value) and value.__module__ == recipe.__name__
    )
    return found


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_extra_exists(page: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"(?:sft-cookbook|'\.)\[([\w,-]+)\]", PAGES[page])
    extras = {extra for names in named for extra in names.split(",")}
    assert extras <= set(project["optional-dependencies"])


def test_the_start_page_lists_every_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = PAGES["docs/start.md"].partition("| extra | for |")[2].partition("\n\n")[0]
    listed = {
        extra for row in table.splitlines() for extra in re.findall(r"`([\w-]+)`", row[1:].split("|")[0])
    }
    assert listed == set(project["optional-dependencies"])


def test_installations_install_this_project() -> None:
    assert INSTALLATIONS
    for command in INSTALLATIONS:
        assert re.fullmatch(
            r"(uv )?pip install (-e ('\.\[[\w,-]+\]'|\.)|'sft-cookbook\[[\w,-]+\]')", command
        ), command


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_every_recipe_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Builds the configs of commands with models of the hub; test_sft runs the embedded default."""
    monkeypatch.chdir(REPOSITORY)
    _, _, recipe, *argv = shlex.split(command)
    if recipe == "recipes.sweep":
        assert len(make_plan(argv).runs) > 1
        return
    if recipe == "recipes.jobs":
        arguments = jobs.parse(argv)
        assert find_recipe(arguments.recipe).make_config(arguments.keys)
        return
    if recipe == "recipes.doctor":
        assert not argv, "it takes no keys"
        return
    if recipe == "recipes.tinker":  # runs a program; tests/tinker/test_programs.py runs some
        assert argv
        return
    if recipe not in TRAINING_CONFIGS:
        given = [argument for argument in argv if "=" in argument]
        others = set(argv) - set(given) - SUBCOMMANDS.get(recipe, set())
        assert not others or recipe == "recipes.report"
        module = importlib.import_module(recipe)
        target = OTHER_CONFIGS.get(recipe) or own_config(module)
        assert cli.make_config(target, getattr(module, "DEFAULTS", {}), given)
        return
    target, module = TRAINING_CONFIGS[recipe]
    if argv == ["--help"]:
        with pytest.raises(SystemExit) as caught:
            module.main(argv)
        assert caught.value.code == 0
        assert "learning_rate=" in capsys.readouterr().out
        return
    config = cli.make_config(target, sft.DEFAULTS, argv)
    for argument in argv:
        key, _, value = argument.partition("=")
        holders = (config, config.dataset_builder, config.dataset_builder.common_config)
        found = next((getattr(holder, key) for holder in holders if hasattr(holder, key)), None)
        if key != "config":
            assert str(found) == str(type(found)(value.split(",") if isinstance(found, list) else value)) or (
                [float(one) for one in value.split(",")] == found
            )


def _with_mark(program: str) -> Any:
    """Returns a program, marked as slow if it trains a whole run."""
    return pytest.param(program, marks=pytest.mark.slow) if "train.main(" in program else program


@pytest.mark.parametrize(
    "program",
    [
        *(_with_mark(block.text) for block in PROGRAMS),
        "".join(re.findall(r"^```python\n(.*?)^```", RENDERERS, re.S | re.M)),
    ],
    ids=lambda program: program.strip().splitlines()[0],
)
def test_every_program_runs(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = compile(program, "page.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    awaited = eval(code, {"__name__": "__main__"})
    if awaited is not None:  # as in a cell of a notebook
        asyncio.run(awaited)
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+ loss ([\d.]+)", out)]
    assert out.strip()
    assert not losses or losses[-1] < 0.5 * losses[0]


def test_rows_of_all_data_formats_can_be_trained_on(tmp_path: Path) -> None:
    """Trains on a file with one row of every format."""
    (block,) = (block.text for block in blocks("json") if block.page == "docs/data.md")
    assert [recognise(json.loads(row)) for row in block.splitlines()] == list(FORMATS)
    (tmp_path / "chats.jsonl").write_text(block * 5, encoding="utf-8")
    argv = [f"dataset={tmp_path / 'chats.jsonl'}", f"log_path={tmp_path / 'run'}", "max_steps=1"]
    assert sft.main(argv).is_finished


@pytest.mark.parametrize("page", [*PAGES, "renderers/README.md"])
def test_every_named_path_exists(page: str) -> None:
    text = PAGES.get(page, RENDERERS)
    for path in re.findall(r"`((?:tests|recipes|renderers|configs|cookbook|examples)/[\w./]+)`", text):
        assert (REPOSITORY / path).exists() or path == embedded.MODEL_NAME, path


def assembler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assemble", REPOSITORY / "docs" / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    shown = set(assembler().pages().values())
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"([\w/.-]+\.md)$", navigation, re.MULTILINE)) == sorted(shown)


def test_links_of_the_site_lead_from_page_to_page() -> None:
    """`make docs` refuses links to nothing; a source file is no page, so a link to one becomes its text."""
    module = assembler()

    def rewritten(text: str, source: str) -> str:
        return module.with_links_of_the_site(text, source, module.pages())

    assert rewritten("[a](docs/data.md#x)", "README.md") == "[a](data.md#x)"
    assert rewritten("[a](../CONTRIBUTING.md)", "docs/data.md") == "[a](project/CONTRIBUTING.md)"
    assert rewritten("[a](../../README.md)", "cookbook/eval/README.md") == "[a](../../../index.md)"
    assert rewritten("![a](rooms.svg)", "docs/architecture.md") == "![a](rooms.svg)"
    assert rewritten("[a](../recipes/sft.py)", "docs/data.md") == "a"
    for unchanged in ("[a](nothing.md)", "[a](#x)", "[a](https://example.org/x)"):
        assert rewritten(unchanged, "docs/data.md") == unchanged


def test_the_security_page_lists_every_command_and_its_links_exist() -> None:
    recipes = {path.stem for path in (REPOSITORY / "recipes").glob("[!_]*.py")}
    assert set(re.findall(r"`recipes\.(\w+)`", SECURITY)) == recipes
    links = re.findall(r"\]\(([\w./]+)\)", SECURITY)
    assert links
    for path in links:
        assert (REPOSITORY / path).exists(), path


def test_the_embedded_model_is_named() -> None:
    assert embedded.MODEL_NAME in README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page != "README.md"} == set(
        re.findall(r"\]\((docs/[\w/]+\.md)\)", README)
    )


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_as_many_families_are_said_to_pass_as_the_page_of_models_says(page: str) -> None:
    found = re.search(r"^\*\*(\d+ of \d+) families pass", PAGES["docs/models.md"], re.MULTILINE)
    assert found is not None
    assert re.findall(r"\d+ of \d+", PAGES[page]) == [found[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-0.6B",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("Qwen/Qwen3-8B",)),
    ],
)
def test_the_memory_table_is_what_the_estimate_says(name: str) -> None:
    rows = list(memory_table.rows({name: memory_table.SHAPES[name]}))
    header, rule, *lines = memory_table.markdown(rows).splitlines()
    assert len(lines) == len(memory_table.METHODS)
    for page in ("README.md", "docs/estimate.md"):
        assert {header, rule, *lines} <= set(PAGES[page].splitlines())
    assert set(memory_table.longest_markdown(rows).splitlines()) <= set(
        PAGES["docs/estimate.md"].splitlines()
    )


@pytest.mark.slow
def test_the_largest_models_are_those_of_the_table_of_longest_sequences() -> None:
    lines = PAGES["docs/estimate.md"].splitlines()
    headers = [number for number, line in enumerate(lines) if line.endswith(" 80 GB | 141 GB |")]
    longest, largest = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in _table_at(lines, number)]
        for number in headers
    )
    order = [name.rpartition("/")[2] for name in memory_table.SHAPES]
    assert len(longest) == len(memory_table.METHODS) * len(order)
    for method, *models in largest:
        for size, model in enumerate(models):
            fits = {
                name.rpartition("/")[2]
                for name, by, *cells in longest
                if by == method and int(cells[size].strip("+").replace(",", "").replace("-", "0")) >= 2048
            }
            assert (model in fits) if fits else model == "-"


def _table_at(lines: list[str], header: int) -> list[str]:
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[header + 2 :])
    return list(rows)
