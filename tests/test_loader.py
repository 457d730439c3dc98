"""Published models are loaded in one module, and foreign JSON is read in one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("cookbook", "recipes", "renderers", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
LOADER = ROOT / "cookbook" / "utils" / "pretrained.py"
LOADS_IN_A_BENCHMARK = {
    "benchmarks/fake_cuda/outline.py": "AutoModelForCausalLM.from_config",  # on a device without memory
    "benchmarks/gpu_step.py": "FastLanguageModel.from_pretrained",  # Unsloth's
    "benchmarks/peer_renderers.py": "AutoTokenizer.from_pretrained",  # in another package's environment
}
UNPICKLERS = {"pickle", "dill", "joblib", "torch", "cloudpickle"}
READS_JSON = {
    "cookbook/utils/json_files.py",
    "cookbook/config/documents.py",  # configs, with the lines of their keys
    "cookbook/clients/vllm.py",  # answers of a server
    "cookbook/chat/remote.py",
    "cookbook/clients/pickled.py",  # a handle, whose values are checked
    "cookbook/types/values.py",  # text that a program passes
    "cookbook/eval/samples.py",  # a value of the command line
    "cookbook/export/chat_format.py",  # written by transformers just before
    "cookbook/export/gguf_vocabulary.py",  # a tokenizer in memory
    "cookbook/eval/chat.py",
    "cookbook/eval/integrations/inspect_model.py",
    "cookbook/eval/token_bytes.py",
}
"""Modules that read other JSON, besides readers of rows and of model output, and benchmarks."""


def _attributes(path: Path, *names: str) -> Iterator[ast.Attribute]:
    """Yields the attributes with these names in a file."""
    code = path.read_text(encoding="utf-8")
    if any(name in code for name in names):  # most files have none and are not parsed
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and node.attr in names:
                yield node


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_nothing_is_loaded_outside_the_loader() -> None:
    found = [
        f"{_name(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in FILES
        if path != LOADER
        for node in _attributes(path, "from_pretrained", "from_config", "get_class_from_dynamic_module")
        if ast.unparse(node) != LOADS_IN_A_BENCHMARK.get(_name(path))
    ]
    assert not found, "use cookbook.utils.pretrained"


def test_nothing_is_unpickled() -> None:
    found = [
        f"{_name(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in FILES
        for node in _attributes(path, "load", "loads")
        if isinstance(node.value, ast.Name) and node.value.id in UNPICKLERS
    ]
    assert not found


def test_the_loader_asks_in_each_of_its_calls_whether_code_may_run() -> None:
    tree = ast.parse(LOADER.read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]
    # A class of transformers itself runs no code of a model; only its Auto classes look for such code.
    automatic = [call for call in calls if ast.unparse(call.func).startswith("Auto")]
    others = {ast.unparse(call.func) for call in calls if call not in automatic}
    assert len(automatic) == 2
    assert others == {"found.from_pretrained", "PeftModel.from_pretrained"}
    for call in automatic:
        (trusts,) = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
        assert trusts in ("needs_code", "runs_code_of(location)"), ast.unparse(call)


def test_json_is_read_by_the_checking_reader() -> None:
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in FILES
        if _name(path) not in READS_JSON
        and not _name(path).startswith(("benchmarks/", "renderers/", "cookbook/data/"))
        for node in _attributes(path, "load", "loads", "JSONDecoder")
        if ast.unparse(node) in ("json.load", "json.loads", "json.JSONDecoder")
    ]
    assert not found, "use cookbook.utils.json_files"
