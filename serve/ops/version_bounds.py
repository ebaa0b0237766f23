"""Upper bounds on mmcv's version that mmdet and mmdet3d assert when they are imported.

mmdet 3.3.0 and mmdet3d 1.4.0 refuse mmcv 2.2.0, which was released after them: "MMCV==2.2.0 is used but incompatible"
(mmcv#3096). People edit the two files by hand. `RaisedBound` executes them with the bound up to which they were tried
here (tests/deployment/test_bare_environment.py); newer versions stay refused.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
from types import ModuleType
from typing import Any

__all__ = ["BOUNDED_PACKAGES", "RaisedBound"]

BOUNDED_PACKAGES = ("mmdet", "mmdet3d")
_BOUND = "mmcv_maximum_version"
# The first release of mmcv that no test of this project has run with.
_TRIED_BELOW = "2.3.0"


class RaisedBound(importlib.abc.Loader):
    """Loader that executes a package's source with a higher `mmcv_maximum_version`."""

    def __init__(self, loader: Any) -> None:
        """Wrap the package's own `loader`, one with ``get_source``."""
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute the source, its bound raised if it is a lower one."""
        tree = ast.parse(self._loader.get_source(module.__name__))
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(bound))) if (
                    name == _BOUND and _release(bound) < _release(_TRIED_BELOW)
                ):
                    node.value = ast.copy_location(ast.Constant(_TRIED_BELOW), node.value)
        exec(compile(tree, self._loader.get_filename(module.__name__), "exec"), module.__dict__)


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version such as ``2.2.0rc1``, without what follows them."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
