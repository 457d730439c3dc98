"""Refuses to run with an unrelated package `renderers` in the place of this project's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAME = "renderers"
OURS = b"This is the package of sft-cookbook"


def refuse_another_renderers() -> None:
    """Raises ImportError, with the command that helps, if `import renderers` finds another package.

    A package of that name hides this project's, which is beside `cookbook`, if its folder is earlier on the
    path, and overwrites it if both are installed in the same folder. The error's `name` is that of the
    package; commands print its text alone (`recipes`).
    """
    spec = importlib.util.find_spec(NAME)
    found = Path(spec.origin) if spec is not None and spec.origin is not None else None
    if found is not None and OURS in found.read_bytes()[:2000]:
        return
    message = f"`import {NAME}` finds {found or 'no package'}, which is not the package of sft-cookbook."
    if found is None or {"site-packages", "dist-packages"} & {*found.parts}:
        message += (
            f" An unrelated package of that name is on the package index. Run: pip uninstall {NAME}. Then "
            f"install sft-cookbook again, because both may have been written into one folder."
        )
    else:
        message += " Rename it, or take its folder off PYTHONPATH and start from another folder."
    raise ImportError(message, name=NAME)
