"""Compiles the C++ part of the fake CUDA device into `build`, once for each content, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from cookbook.utils import files

SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[2] / "build" / "fake_cuda"


def why_unavailable() -> str | None:
    """Returns why there is no fake CUDA device in this environment, or None if there can be one."""
    if (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "needs a build of torch without CUDA, whose place the fake device takes"
    if _compiler() is None:
        return "needs a C++ compiler (g++ or clang++)"
    return None


@functools.cache
def load() -> None:
    """Registers the device with torch, once. Raises RuntimeError if torch was imported before.

    Torch looks up its devices when it is first imported, and keeps the answer.
    """
    if "torch" in sys.modules:
        raise RuntimeError(
            "The fake CUDA device is loaded after torch. Call `load` before torch is imported."
        )
    if (reason := why_unavailable()) is not None:
        raise RuntimeError(f"There is no fake CUDA device here: it {reason}.")
    library = compiled()
    ctypes.CDLL(str(_torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def compiled() -> Path:
    """Returns the shared library. It is compiled if `build` has none for this source and torch."""
    content = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    folder = BUILD / hashlib.blake2b(content, digest_size=16).hexdigest()
    library = folder / "device.so"
    if library.exists():
        return library
    torch_folder = _torch_folder()
    files.make_folder(folder.parent)
    with files.writing_folder(folder, replace=True, must_hold=[library.name]) as unfinished:
        command = [
            str(_compiler()), "-std=c++20", "-fPIC", "-shared", str(SOURCE),
            "-o", str(unfinished / library.name),
            f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if ended.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile against this torch:\n{ended.stderr}")
    return library


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
