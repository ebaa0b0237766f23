"""Portable kernels in place of ``mmcv._ext``, mmcv's compiled extension.

mmcv, mmdet and mmdet3d call all their kernels through that one module. `install` puts a finder on
``sys.meta_path`` that supplies it on demand, written in torch (any device) and numba (CPU), so that neither a
compiler nor a prebuilt mmcv wheel is needed (mmcv#3319, mmdetection#11763). It also patches the few modules of
mmcv and mmdet3d whose own Python assumes CUDA (`serve.ops.patches`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from serve.settings.kernels import KernelSettings, Preference

__all__ = ["Preference", "install", "kernels_in_use"]

EXTENSION = "mmcv._ext"


class _PortableExtension(importlib.abc.Loader):
    """Loader that builds ``mmcv._ext`` from the kernels of this package."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        from serve.ops import extension

        return extension.build(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` returns a complete module."""


class _CompiledExtension(importlib.abc.Loader):
    """Loader of mmcv's own extension, which names the way out if it does not fit the installed torch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        try:
            module: ModuleType | None = self._loader.create_module(spec)
        except ImportError as error:
            error.add_note(
                f"{spec.origin} was compiled for another torch. MMDET3D_SERVE_OPS=portable takes the kernels of "
                "mmdet3d-serve instead of it; or put mmcv-lite in mmcv's place"
            )
            raise
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)


class _ExtensionFinder(importlib.abc.MetaPathFinder):
    """Finder for ``mmcv._ext`` and for the modules of mmcv, mmdet and mmdet3d that need a patch.

    A compiled extension takes precedence unless `preference` is ``"portable"``. While `preference` is None,
    the settings of the environment decide when the extension is first needed.
    """

    def __init__(self) -> None:
        self.preference: Preference | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ("mmcv", "mmdet", "mmdet3d", "mmengine"):
            return None
        if fullname != EXTENSION:
            return _find_patched(fullname, path)
        if self.preference is None:
            settings = KernelSettings.from_environment()
            install(settings.ops, cache_dir=settings.cache_dir)
        if self.preference != "portable":
            compiled = importlib.machinery.PathFinder.find_spec(fullname, path)
            if compiled is not None:
                compiled.loader = _CompiledExtension(compiled.loader)
                return compiled
        return importlib.machinery.ModuleSpec(fullname, _PortableExtension(), origin="serve.ops")


def _find_patched(fullname: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    from serve.ops.patches import PATCHES, PatchingLoader
    from serve.ops.version_bounds import BOUNDED_PACKAGES, RaisedBound

    if fullname not in PATCHES and fullname not in BOUNDED_PACKAGES:
        return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is None or spec.loader is None:
        return None
    if fullname in BOUNDED_PACKAGES:
        spec.loader = RaisedBound(spec.loader)
    else:
        spec.loader = PatchingLoader(spec.loader, PATCHES[fullname])
    return spec


def install(
    preference: Preference | None = None, *, cache_dir: Path | None = None
) -> importlib.abc.MetaPathFinder:
    """Make ``import mmcv.ops`` work in this process. Cheap, idempotent; imports nothing heavy.

    Call it before the first ``import mmcv.ops`` (hence before mmdet and mmdet3d): the extension that is imported
    first stays in use.

    Args:
        preference: ``"auto"`` uses a compiled ``mmcv._ext`` if one is installed, ``"portable"`` always uses the
            kernels of this package. None keeps an earlier choice; without one, ``MMDET3D_SERVE_OPS`` decides
            when the extension is first imported.
        cache_dir: folder for compiled kernels if the package's own folder is not writable.

    Returns:
        The finder, the only one of its kind on ``sys.meta_path``.
    """
    finder = next((each for each in sys.meta_path if isinstance(each, _ExtensionFinder)), None)
    if finder is None:
        finder = _ExtensionFinder()
        sys.meta_path.insert(0, finder)
    finder.preference = preference or finder.preference
    if cache_dir is not None:
        from serve.ops.cpu import jit_cache

        jit_cache.fallback = cache_dir
    return finder


def kernels_in_use() -> str:
    """Return ``"portable"`` or ``"compiled"`` once ``mmcv.ops`` is imported, else ``"none"``."""
    module = sys.modules.get(EXTENSION)
    if module is None:
        return "none"
    return "portable" if hasattr(module, "PORTABLE") else "compiled"
