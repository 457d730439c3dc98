"""The private parts of jinja2 that are used equal those of the version for which the code was written."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import pytest
from jinja2 import compiler, runtime, sandbox, utils

from renderers.jinja import private

CHECKED_WITH = "3.1"
"""The version of jinja2 whose parts are listed below."""

PARAMETERS: dict[str, list[str]] = {
    "CodeGenerator.visit_Template": ["self", "node", "frame"],
    "CodeGenerator.blockvisit": ["self", "nodes", "frame"],
    "CodeGenerator.write": ["self", "x"],
    "CodeGenerator.writeline": ["self", "x", "node", "extra"],
    "CodeGenerator._output_child_to_const": ["self", "node", "frame", "finalize"],
    "CodeGenerator._output_child_pre": ["self", "node", "frame", "finalize"],
    "CodeGenerator._output_child_post": ["self", "node", "frame", "finalize"],
    "CodeGenerator.visit_Concat": ["self", "node", "frame"],
    "CodeGenerator.visit_Add": ["self", "node", "frame"],
    "CodeGenerator.visit_List": ["self", "node", "frame"],
    "Context.derived": ["self", "locals"],
    "LoopContext": ["iterable", "undefined", "recurse", "depth0"],
    "Namespace": ["args", "kwargs"],
    "SandboxedEnvironment.call": [
        "_SandboxedEnvironment__self",
        "_SandboxedEnvironment__context",
        "_SandboxedEnvironment__obj",
        "args",
        "kwargs",
    ],
    "SandboxedEnvironment.wrap_str_format": ["self", "value"],
    "SandboxedFormatter.get_field": ["self", "field_name", "args", "kwargs"],
    "generate_lorem_ipsum": ["n", "html", "min", "max"],
}
"""The functions that are overridden or called, with their parameters in jinja2 3.1."""


def parts() -> Mapping[str, Any]:
    found = {}
    for module in (compiler, runtime, sandbox, utils):
        found.update(vars(module))
    return found


def differences(found: Mapping[str, Any]) -> list[str]:
    """Returns the functions of `PARAMETERS` that are missing or have different parameters."""
    different = []
    for path, parameters in PARAMETERS.items():
        name, _, method = path.partition(".")
        part = found.get(name)
        part = getattr(part, method, None) if method else part
        if part is None:
            different.append(f"{path} is missing")
        elif (present := [*inspect.signature(part).parameters]) != parameters:
            different.append(f"{path} has the parameters {present}, not {parameters}")
    return different


def complaint(different: list[str]) -> str:
    return (
        f"renderers/jinja/private.py was checked with jinja2 {CHECKED_WITH}, and this is "
        f"{jinja2.__version__}: {'; '.join(different)}. Adapt private.py and this test."
    )


def test_every_private_part_equals_that_of_the_checked_version() -> None:
    different = differences(parts())
    assert not different, complaint(different)


def test_a_missing_or_different_part_is_named() -> None:
    class CodeGenerator(compiler.CodeGenerator):
        def blockvisit(self, nodes: Any, frame: Any, new: int = 0) -> None: ...

    found = {**parts(), "LoopContext": None, "CodeGenerator": CodeGenerator}
    assert differences(found) == [
        "CodeGenerator.blockvisit has the parameters ['self', 'nodes', 'frame', 'new'], "
        "not ['self', 'nodes', 'frame']",
        "LoopContext is missing",
    ]
    assert f"jinja2 {CHECKED_WITH}, and this is {jinja2.__version__}" in complaint(["x"])


def test_the_attributes_of_a_namespace_can_be_read_and_replaced() -> None:
    namespace = utils.Namespace(a=1)
    assert private.attributes_of(namespace) == {"a": 1}, complaint(["Namespace has other attributes"])
    private.set_attributes(namespace, {"b": 2})
    assert namespace.b == 2
    assert jinja2.Template("{{ ns.b }}").render(ns=namespace) == "2"


def test_compiled_code_has_the_names_that_are_used_here() -> None:
    loop = "{% for m in ms %}{% set x = m %}{{ f(x) ~ loop.index }}{% endfor %}"
    source = f"{{% block b %}}{{{{ f(1) }}}}{loop}{{% endblock %}}"
    code = jinja2.Environment().compile(source, raw=True)
    for name in ["LoopContext", "str_join", "markup_join"]:
        assert name in code + " ".join(runtime.exported), complaint([f"compiled code has no {name}"])
    for name in private.PASSED_TO_CALLS:
        assert f", {name}={name}" in code, complaint([f"no {name} in a call"])
    assert jinja2.Template("").new_context().eval_ctx.autoescape is False


def test_the_loop_variable_of_a_template_can_be_replaced() -> None:
    class Loud(runtime.LoopContext):
        @property
        def index(self) -> int:
            return 100

    template = jinja2.Template("{% for m in 'ab' %}{{ loop.index }} {% endfor %}")
    private.set_loop_context(template, Loud)
    assert template.render() == "100 100 "


def test_the_template_of_a_frame_of_compiled_code_is_found() -> None:
    seen: list[Any] = []

    def look() -> str:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            seen.append(private.template_of(frame))
            frame = frame.f_back
        return ""

    template = jinja2.Template("{{ look() }}")
    template.render(look=look)
    assert template in seen, complaint(["compiled code does not name its template"])
    assert seen[0] is None


def test_the_number_of_arguments_before_the_value_of_a_filter_is_known() -> None:
    filters = jinja2.Environment().filters
    assert (private.num_passed(filters["map"]), private.num_passed(filters["trim"])) == (1, 0)


@pytest.mark.parametrize(
    "path", sorted(Path(private.__file__).parents[1].rglob("*.py")), ids=lambda p: p.stem
)
def test_no_other_file_uses_a_private_part(path: Path) -> None:
    private_names = re.compile(
        r"_Namespace__attrs|jinja2\.(?:compiler|utils)\b|__jinja_template__|_loop_vars|jinja_pass_arg"
        r"|_compile_jinja_template|LoopContext\b.*import|import.*\bLoopContext\b|SandboxedFormatter, "
    )
    if path.name != "private.py":
        found = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if private_names.search(line) and "renderers.jinja.private" not in line
        ]
        assert found == []
