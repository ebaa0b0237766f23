"""Portable kernels that stand in for ``mmcv._ext``, mmcv's compiled extension.

All of mmcv, mmdet and mmdet3d call their kernels through that one module. `install` puts a
finder on ``sys.meta_path`` that supplies it on demand, written in torch (any device) and numba
(CPU), so that no compiler and no prebuilt mmcv wheel is needed (mmcv#3319, mmdetection#11763). It also mends the few
modules of mmcv whose own Python assumes CUDA (`serve.ops.patches`).

This package knows tensors only: nothing of detectors, archives, HTTP or the environment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

__all__ = ["Preference", "install", "kernels_in_use"]

EXTENSION = "mmcv._ext"
Preference = Literal["auto", "portable"]


class _PortableExtension(importlib.abc.Loader):
    """Creates ``mmcv._ext`` from our kernels."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        from serve.ops import extension

        return extension.build(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """All was done in `create_module`."""


class _ExtensionFinder(importlib.abc.MetaPathFinder):
    """Answers for ``mmcv._ext``, and for the modules of mmcv and mmdet3d that need a mend.

    A compiled extension goes first unless `preference` says otherwise; None: nobody has chosen yet.
    """

    def __init__(self) -> None:
        self.preference: Preference | None = None
        self.ask: Callable[[], None] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(("mmcv.", "mmdet3d.")):
            return None
        if fullname != EXTENSION:
            return _mended(fullname, path)
        if self.preference is None and self.ask is not None:
            self.ask()
        if self.preference != "portable":
            compiled = importlib.machinery.PathFinder.find_spec(fullname, path)
            if compiled is not None:
                return compiled
        return importlib.machinery.ModuleSpec(fullname, _PortableExtension(), origin="serve.ops")


def _mended(fullname: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    from serve.ops.patches import MENDS, MendingLoader

    if fullname not in MENDS:
        return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None:
        spec.loader = MendingLoader(spec.loader, MENDS[fullname])
    return spec


def install(
    preference: Preference | None = None,
    *,
    cache_dir: Path | None = None,
    ask: Callable[[], None] | None = None,
) -> importlib.abc.MetaPathFinder:
    """Make ``import mmcv.ops`` work in this process. Cheap, idempotent; imports nothing heavy.

    Must run before the first ``import mmcv.ops`` (so before mmdet and mmdet3d); afterwards the
    extension that was found first stays in use.

    Args:
        preference: ``"auto"`` takes a compiled ``mmcv._ext`` where one is installed;
            ``"portable"`` always takes ours; None keeps what was asked for before, ``"auto"`` at first.
        cache_dir: where compiled kernels are kept if the package's own folder cannot be written.
        ask: called when the extension is needed and no preference was given by then; may call `install`.

    Returns:
        The finder, the only one of its kind on ``sys.meta_path``.
    """
    finder = next((one for one in sys.meta_path if isinstance(one, _ExtensionFinder)), None)
    if finder is None:
        finder = _ExtensionFinder()
        sys.meta_path.insert(0, finder)
    finder.preference = preference or finder.preference
    finder.ask = ask or finder.ask
    if cache_dir is not None:
        from serve.ops.cpu import jit_cache

        jit_cache.fallback = cache_dir
    return finder


def kernels_in_use() -> str:
    """``"portable"`` or ``"compiled"`` after ``mmcv.ops`` was imported, else ``"none"``."""
    module = sys.modules.get(EXTENSION)
    if module is None:
        return "none"
    return "portable" if hasattr(module, "PORTABLE") else "compiled"
