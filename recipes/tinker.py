"""Runs a program written for the Tinker SDK in this process, on models of this machine.

    python -m recipes.tinker tinker_cookbook.recipes.sl_loop model_name=Qwen/Qwen3-0.6B
    python -m recipes.tinker my_program.py some arguments

`import tinker` in the program imports this package. Model names are folders or hub ids.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

import cookbook


def main(argv: Sequence[str] | None = None) -> None:
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    program = arguments[0]
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


if __name__ == "__main__":
    main()
