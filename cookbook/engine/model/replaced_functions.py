"""Replaces the functions that a module's code calls by their names, for a while or from now on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn


class ReplacedFunctions:
    """The functions of these names in the code of a module's parts, and what they are replaced by."""

    def __init__(
        self, module: nn.Module, names: Collection[str], replacement: Callable[[str, Any], Any]
    ) -> None:
        """`replacement(name, theirs)` returns the function that is called instead of `theirs`."""
        modules = {type(part).__module__ for part in module.modules()}
        self._replaced: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        """The globals of each Python module, and their values with and without the replacements."""
        for namespace in (vars(sys.modules[name]) for name in sorted(modules)):
            theirs = {name: namespace[name] for name in names if name in namespace}
            if theirs:
                ours = {name: replacement(name, function) for name, function in theirs.items()}
                self._replaced.append((namespace, ours, theirs))

    @property
    def are_found(self) -> bool:
        """Whether the module's code has any of these functions."""
        return bool(self._replaced)

    def install(self) -> None:
        """Lets the module's code call the replacements from now on."""
        for namespace, ours, _ in self._replaced:
            namespace.update(ours)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the module's code call the replacements in the body."""
        self.install()
        try:
            yield
        finally:
            for namespace, _, theirs in self._replaced:
                namespace.update(theirs)
