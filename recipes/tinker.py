"""Runs a program written for the Tinker SDK in this process, on models of this machine.

    python -m recipes.tinker tinker_cookbook.recipes.sl_loop model_name=Qwen/Qwen3-0.6B
    python -m recipes.tinker my_program.py some arguments

`import tinker` in the program imports this package. Model names are folders or hub ids.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

import cookbook
from cookbook.config import cli
from cookbook.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    program = arguments[0]
    with cli.exiting_on_errors():
        _check_there(program)
    cookbook.install_as_tinker()
    before = sys.argv
    sys.argv = arguments
    try:
        if program.endswith(".py"):
            sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before


def _check_there(program: str) -> None:
    """Raises ConfigError if there is no such file or installed package."""
    if program.endswith(".py") or os.sep in program:
        if not os.path.isfile(program):
            raise ConfigError(f"There is no file {program}.")
        return
    package, _, rest = program.partition(".")
    spec = importlib.util.find_spec(package) if package else None
    # The folders are looked through, because importing a package to look it up would run its code.
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    paths = [os.path.join(folder, *rest.split(".")) for folder in folders]
    is_in_package = any(os.path.isfile(f"{path}.py") or os.path.isdir(path) for path in paths)
    if spec is None or (rest and not is_in_package):
        raise ConfigError(
            f"There is no module {program}. Install the package that has it, or give a program as "
            f"path/to/program.py."
        )


if __name__ == "__main__":
    main()
