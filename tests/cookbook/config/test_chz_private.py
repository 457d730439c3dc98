"""Tests of every undocumented part of chz that this project uses."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chz
import pytest
from chz.blueprint import Blueprint, Castable, Reference

from cookbook.config import chz_private
from cookbook.config.chz_private import CHECKED_WITH

REPOSITORY = Path(__file__).parents[3]
PUBLIC = {
    *(name for name in chz.__all__ if name not in ("blueprint", "factories", "tiepin")),
    *("blueprint.Blueprint", "blueprint.Castable", "blueprint.Reference", "blueprint", "mungers.if_none"),
    *("validators.typecheck", "chz"),
}
PRIVATE = ("_arg_map", "_default", "_default_factory", "_make_lazy", "_munger", "meta_factory")


@chz.chz
class Part:
    size: int = 1


@chz.chz
class OtherPart(Part):
    colour: str = "red"


@chz.chz
class Whole:
    name: str
    """This field has no default."""
    part: Part = chz.field(default_factory=Part, doc="its part")
    counts: list[int] = chz.field(default_factory=list)
    count: int = chz.field(default=3, validator=chz.validators.ge(0))


@chz.chz
class Munged:
    size: int | None = chz.field(default=None, munger=chz.mungers.if_none(lambda self: 7))


@contextmanager
def naming_the_versions() -> Iterator[None]:
    """Adds to a failure the version of chz that fails here and the version that was checked."""
    try:
        yield
    except Exception as error:
        found = importlib.metadata.version("chz")
        pytest.fail(
            f"chz {found} differs from chz {CHECKED_WITH}, with which cookbook/config/chz_private.py was "
            f"checked: {type(error).__name__}: {error}. Adapt that file, or use chz {CHECKED_WITH}."
        )


def test_the_checked_version_of_chz_is_that_of_the_constraints() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"chz=={CHECKED_WITH}" in constraints


def test_the_parameters_of_a_blueprint_are_those_of_its_classes() -> None:
    with naming_the_versions():
        params = chz_private.params_of(Blueprint(Whole))
        assert list(params) == ["name", "part", "part.size", "counts", "count"]
        assert (params["count"].type, params["part"].doc) == (int, "its part")
        assert "part.colour" in chz_private.params_of(Blueprint(Whole).apply({"part": OtherPart}))
        assert list(chz_private.missing_params(Blueprint(Whole))) == ["name"]
        assert chz_private.missing_params(Blueprint(Whole).apply({"name": "x"})) == {}


def test_the_value_of_a_key_is_that_of_the_last_layer() -> None:
    with naming_the_versions():
        blueprint = Blueprint(Whole).apply({"count": 4, "name": Reference("x")}).apply({"count": 5})
        chz_private.params_of(blueprint)
        assert chz_private.value_at(blueprint, "count") == (5,)
        found = chz_private.value_at(blueprint, "name")
        assert found is not None
        assert found[0].ref == "x"
        assert chz_private.value_at(blueprint, "part.size") is None


def test_defaults_are_read_from_parameters_and_from_classes() -> None:
    with naming_the_versions():
        params = chz_private.params_of(Blueprint(Whole))
        assert chz_private.default_of(params["count"]) == (3,)
        assert chz_private.default_of(params["counts"]) == ([],)
        assert chz_private.default_of(params["name"]) is None
        defaults = chz_private.class_defaults(Whole)
        assert (defaults["part"], defaults["counts"], defaults["count"]) == (Part(), [], 3)
        assert chz_private.plain_default(Whole, "count") == (3,)
        assert chz_private.plain_default(Whole, "counts") == ([],)
        assert chz_private.plain_default(Whole, "cuont") is None


def test_a_text_is_cast_and_a_name_of_a_class_is_looked_up() -> None:
    with naming_the_versions():
        params = chz_private.params_of(Blueprint(Whole))
        assert chz_private.can_be_cast(params["count"], "12")
        assert not chz_private.can_be_cast(params["count"], "twelve")
        assert chz_private.class_named(params["part"], f"{__name__}:OtherPart") is OtherPart
        assert chz_private.class_named(params["part"], "no_such_module:Part") is None
        assert chz_private.class_named(params["part"], "pathlib:Path") is None
        item = chz_private.param_of_an_item(params["counts"], "counts.0", int)
        assert (item.name, item.type, item.default) == ("counts.0", int, None)
        assert chz_private.can_be_cast(item, "7")
        assert not chz_private.can_be_cast(item, "seven")
        assert chz_private.is_subtype_instance(None, int | None)
        assert not chz_private.is_subtype_instance(None, int)


def test_the_given_value_of_a_field_is_the_one_before_its_munger() -> None:
    with naming_the_versions():
        munged = Munged()
        assert (munged.size, chz_private.given_value(munged, "size")) == (7, None)
        assert chz_private.given_value(chz.replace(munged, size=7), "size") == 7


def test_errors_have_the_classes_and_the_notes_that_are_expected() -> None:
    with naming_the_versions():
        with pytest.raises(chz_private.EntrypointException):
            Blueprint(Whole).apply({"name": "x", "nmae": "y"}).make()
        assert issubclass(chz_private.EntrypointHelpException, Exception)
        with pytest.raises(Exception, match="twelve") as caught:
            Blueprint(Whole).apply({"name": "x", "part.size": Castable("twelve")}).make()
        notes = getattr(caught.value, "__notes__", [])
        assert all(note.startswith(chz_private.NOTE_OF_AN_ARGUMENT) for note in notes)


def test_a_failure_names_both_versions() -> None:
    with (
        pytest.raises(pytest.fail.Exception, match=f"differs from chz {CHECKED_WITH}, with"),
        naming_the_versions(),
    ):
        raise AttributeError("all_params")


def test_no_other_file_uses_undocumented_parts_of_chz() -> None:
    found = []
    for path in sorted(REPOSITORY.glob("[cr]*/**/*.py")):
        if path.name == "chz_private.py":
            continue
        code = path.read_text(encoding="utf-8")
        if not any(word in code for word in ("chz", *PRIVATE)):
            continue
        for node in ast.walk(ast.parse(code)):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chz":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and re.fullmatch(r"chz(\.\w+)+", ast.unparse(node)):
                names = [ast.unparse(node)]
            found += [f"{path.name}: {name}" for name in names if name.removeprefix("chz.") not in PUBLIC]
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
                found.append(f"{path.name}: {node.attr}")
    assert found == []
