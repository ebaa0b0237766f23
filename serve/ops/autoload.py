"""Finder that installs `serve.ops` at the first import of mmcv, mmengine, mmdet or mmdet3d in an environment.

The wheel puts a copy of this file into site-packages (``setup.py``), beside a ``.pth`` file that calls `register` at
interpreter start. The copy imports nothing then but this file; `serve.ops` is imported when mmcv is. It is a copy
because importing ``serve.ops.autoload`` at every start would shadow a module named ``serve`` in a user's folder.
"""

from __future__ import annotations

import sys

__all__ = ["register"]


class _Autoload:
    """Installs `serve.ops` at the first import of mmcv and asks its finder; finds nothing itself."""

    def __init__(self) -> None:
        self.done = False

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if self.done or fullname.partition(".")[0] not in ("mmcv", "mmengine", "mmdet", "mmdet3d"):
            return None
        self.done = True
        try:
            from serve import ops
            from serve.upstream import patches
        except ImportError:
            # The project is gone, or another `serve` comes first on the path; mmcv reports what it lacks.
            return None
        patches.apply()
        return ops.install().find_spec(fullname, path, target)


def register() -> None:
    """Put the finder on ``sys.meta_path``. Idempotent."""
    if not any(type(finder).__name__ == "_Autoload" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Autoload())
