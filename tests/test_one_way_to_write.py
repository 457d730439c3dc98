"""Only `cookbook.utils.files` writes, renames and removes files; exceptions are listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cookbook", "renderers", "recipes")
THE_MODULE = "cookbook/utils/files.py"

EXCEPTIONS = {
    "cookbook/utils/consoles.py": {"os.open(os.devnull, os.O_WRONLY)"},
    "cookbook/utils/clusters.py": {  # Ray's token and folder are private, whatever the umask is
        "file.parent.mkdir(mode=448, parents=True, exist_ok=True)",
        "tempfile.mkstemp(dir=file.parent, prefix=f'.{file.name}-')",
        "open(descriptor, 'w', encoding='utf-8')",
        "os.link(unfinished, file)",
        "os.unlink(unfinished)",
        "file.chmod(384)",
        "tempfile.mkdtemp(prefix=prefix, dir=base)",
    },
    "cookbook/data/store.py": {"np.save(file, array)"},  # a file of `files.replacing`
    "cookbook/runs/checkpoints.py": {  # hard links to a checkpoint's files, in a new folder
        "os.link(source, target)",
        "shutil.copy2(source, target)",
        "shutil.copytree(folder, unfinished, ignore=others, copy_function=link, dirs_exist_ok=True)",
    },
}
"""Calls that write no permanent file, or into a folder that is not in its final place yet."""

IN_NEW_FOLDERS = {
    "cookbook/engine/model/adapters.py", "cookbook/engine/model/full_weights.py",
    "cookbook/export/chat_format.py",
    "cookbook/embedded/pretrain.py",  # the developer's own tool
}  # fmt: skip
"""Modules in which a library writes files itself, into a folder of `files.writing_folder`."""

MODULES = {
    "os": {
        "chmod", "fdopen", "link", "makedirs", "mkdir", "open", "remove", "removedirs", "rename", "renames",
        "replace", "rmdir", "symlink", "truncate", "unlink",
    },
    "shutil": {"copy", "copy2", "copyfile", "copymode", "copytree", "move", "rmtree"},
    "fcntl": {"flock", "lockf"},
    "np": {"save", "savez", "savetxt"},
    "torch": {"save"},
    "logging": {"FileHandler"},
}  # fmt: skip
METHODS = {
    "chmod", "hardlink_to", "mkdir", "rename", "rmdir", "symlink_to", "touch", "unlink", "write_bytes",
    "write_text", "FileHandler",
}  # fmt: skip
LIBRARIES = {"save_file", "save_pretrained", "to_csv", "to_parquet", "write_parquet", "sink_parquet"}
TEMPORARY = {"NamedTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp"}
NAMES = {"open", "replace"}.union(METHODS, LIBRARIES, TEMPORARY, *MODULES.values())
"""The names of the functions above, without those of their owners."""


def direct_writes(code: str) -> Iterator[ast.Call]:
    """Yields the calls that write, rename or remove files, which may follow links."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and _is_direct(node):
            yield node


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_direct(call: ast.Call) -> bool:
    function, name = call.func, _name(call)
    if name not in NAMES:
        return False
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if owner == "files":
        return False
    if owner in MODULES:
        return name in MODULES[owner]
    if name == "open":
        position = 0 if owner else 1
        named = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        modes = [*named, *call.args[position : position + 1]]
        return any(_writes(mode) for mode in modes)
    if name in TEMPORARY:  # files in the system's temporary folder are exclusive and private
        return name == "NamedTemporaryFile" or any(keyword.arg == "dir" for keyword in call.keywords)
    if name == "replace":  # Path.replace takes one argument, str.replace two, chz.replace keywords
        is_of_path = len(call.args) == 1 and not isinstance(call.args[0], ast.Starred)
        return bool(owner) and is_of_path and not call.keywords
    return (bool(owner) and name in METHODS) or name in LIBRARIES


def _writes(mode: ast.expr) -> bool:
    text = str(mode.value) if isinstance(mode, ast.Constant) else ""
    return set(text) <= set("rwxabt+") and bool(set(text) & set("wxa+"))


@pytest.mark.slow  # `make check` runs it
@pytest.mark.parametrize("folder", FOLDERS)
def test_only_the_files_module_writes_and_removes_files(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for call in direct_writes(path.read_text(encoding="utf-8")) if place != THE_MODULE else ():
            text = ast.unparse(call)
            by_library = place in IN_NEW_FOLDERS and _name(call) in LIBRARIES
            if not by_library and text not in EXCEPTIONS.get(place, ()):
                found.append(f"{place}:{call.lineno}: {text}")
    assert not found, "\n".join(found)


def test_every_exception_covers_a_call() -> None:
    for place, texts in EXCEPTIONS.items():
        calls = direct_writes((ROOT / place).read_text(encoding="utf-8"))
        assert texts <= {ast.unparse(call) for call in calls}
    for place in IN_NEW_FOLDERS:
        assert list(direct_writes((ROOT / place).read_text(encoding="utf-8"))), place


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('r+')", True),
        ("path.open('rb')", False),
        ("open(path)", False),
        ("path.write_text(text)", True),
        ("path.unlink()", True),
        ("path.replace(other)", True),
        ("text.replace('a', 'b')", False),
        ("chz.replace(config, log_path=path)", False),
        ("os.replace(a, b)", True),
        ("os.open(path, os.O_RDONLY)", True),
        ("shutil.rmtree(path)", True),
        ("shutil.which('ray')", False),
        ("files.rename(a, b)", False),
        ("tempfile.mkdtemp(prefix='ray-')", False),
        ("tempfile.mkdtemp(dir=folder)", True),
        ("logging.FileHandler(path)", True),
        ("model.save_pretrained(folder)", True),
    ],
)
def test_the_check_distinguishes_writing_from_reading(code: str, is_found: bool) -> None:
    assert bool(list(direct_writes(code))) == is_found
