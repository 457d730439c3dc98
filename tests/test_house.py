"""Limits on figures about the code; `python -m benchmarks.house` prints all figures."""

from __future__ import annotations

import pytest

from benchmarks import house, rooms
from benchmarks.import_graph import circles, imports, imports_by_name
from tests.test_import_direction import MAY_IMPORT


def test_at_most_six_modules_are_beside_the_rooms() -> None:
    assert len(house.modules_beside_rooms()) <= 6, house.modules_beside_rooms()


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": "b", "b": "c", "c": ""}, []),
        ({"a": "b", "b": "a", "c": "a"}, [["a", "b"]]),
        ({"a": "b", "b": "c", "c": "a", "d": "e", "e": "d"}, [["a", "b", "c"], ["d", "e"]]),
        ({"a": "bc", "b": "a", "c": "a"}, [["a", "b", "c"]]),
    ],
)
def test_a_circle_is_a_group_whose_members_reach_each_other(
    edges: dict[str, str], found: list[list[str]]
) -> None:
    assert circles(edges) == found


@pytest.mark.slow  # `make check` runs it
def test_no_import_points_up() -> None:
    """Includes imports by name, which `tests/test_import_direction.py` does not read."""
    assert house.arrows_up() == []


@pytest.mark.parametrize(
    "line",
    ["importlib.import_module('recipes.sft')", "import_module('recipes.sft')", "__import__('recipes.sft')"],
)
def test_an_import_by_name_is_seen(line: str) -> None:
    assert list(imports_by_name(f"import os\n{line}\n", "cookbook.config.cli")) == ["os", "recipes.sft"]


def test_a_table_of_recipes_to_import_is_seen() -> None:
    source = "import importlib\nRECIPES = {'sft': 'recipes.sft'}\n"
    assert list(imports_by_name(source, "cookbook.supervised.recipe")) == ["importlib"]
    source += "importlib.import_module(RECIPES['sft'])\n"
    assert list(imports_by_name(source, "cookbook.supervised.recipe")) == ["importlib", "recipes.sft"]


def test_a_package_may_export_its_modules_but_they_may_not_import_it() -> None:
    assert list(imports("from renderers.base import Renderer", "renderers.streaming")) == ["renderers.base"]
    assert list(imports("from renderers import Renderer", "renderers.streaming")) == ["renderers"]


@pytest.mark.slow  # `make check` runs it
def test_no_two_classes_share_a_name() -> None:
    assert house.shared_class_names() == []


def test_the_picture_of_the_rooms_matches_the_import_rules() -> None:
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.drawn()
    drawn = [room for level in rooms.levels() for room in level]
    assert sorted(drawn) == sorted(rooms.PURPOSE)
    assert {room.removeprefix("cookbook.") for room in MAY_IMPORT} == {*drawn, "vllm_client", "cookbook"}
