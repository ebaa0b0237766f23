"""Makes ``import mmcv.ops`` work in every Python of an environment, without a call of ours.

tools/setup_env.py copies this file into the environment's site-packages, beside a ``.pth`` file that calls
`register` at interpreter start. That costs a look at one module of two imports; nothing of ours, and nothing
heavy, is imported before mmcv is. A copy, because importing it as ``serve.ops.autoload``
at every start would put our package in the place of a module called ``serve`` in somebody's own folder.

Knows where to ask (`serve.ops`, `serve.settings`), not what kernels are.
"""

from __future__ import annotations

import sys

__all__ = ["register"]


class _Autoload:
    """Answers nothing by itself: at the first import of mmcv it installs `serve.ops` and asks that."""

    def __init__(self) -> None:
        self.done = False

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if self.done or fullname.partition(".")[0] != "mmcv":
            return None
        self.done = True
        try:
            from serve import ops
        except ImportError:
            # The project is gone, or another `serve` is first on the path: mmcv says itself what it lacks.
            return None
        return ops.install(ask=_choose).find_spec(fullname, path, target)


def _choose() -> None:
    """What the environment asks for; called when the extension is needed and nobody has chosen by then."""
    from serve import ops
    from serve.settings import Settings

    settings = Settings.from_environment()
    ops.install(settings.ops, cache_dir=settings.cache_dir)


def register() -> None:
    """Put the finder on ``sys.meta_path``. Idempotent."""
    if not any(type(finder).__name__ == "_Autoload" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Autoload())
