"""Names of the configs that a config inherits from, read from its syntax tree without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

__all__ = ["config_bases"]


def config_bases(tree: ast.Module) -> Iterator[str]:
    """Yield the bases of a config.

    Both styles of mmengine are read: strings in ``_base_ = […]`` and relative imports, which new-style configs have
    in ``with read_base():``.

    Yields:
        Paths relative to the config's folder (``../_base_/default.py``), and names in installed packages as they
        are written (``mmdet3d::second/….py``).

    Raises:
        ValueError: `_base_` is computed, not a literal.
        TypeError: `_base_` holds something else than text.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            getattr(target, "id", "") == "_base_" for target in node.targets
        ):
            value = ast.literal_eval(node.value)
            bases = [value] if isinstance(value, str) else value
            if not isinstance(bases, list | tuple) or not all(isinstance(base, str) for base in bases):
                raise TypeError(f"_base_ is {value!r}, neither a path nor a list of paths")
            yield from bases
        elif isinstance(node, ast.ImportFrom) and node.level and node.module:
            yield "../" * (node.level - 1) + node.module.replace(".", "/") + ".py"
