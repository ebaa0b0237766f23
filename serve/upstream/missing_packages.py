"""Stand-ins for packages that upstream imports for one data set only, so that the others work without them.

`mmdet3d.evaluation` imports Lyft's and nuScenes' kits for two of its nine metrics, `mmdet3d.visualization` imports
trimesh for one function. While such a module is imported, a package of its row in `PACKAGES` that is not installed is
replaced by a stand-in, of which every class raises `MissingPackage` on use. The stand-ins are gone afterwards: other
code that asks whether the package is there gets the true answer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from serve.errors import MissingPackage

__all__ = ["PACKAGES", "explain_missing_package", "stand_in"]

_CONVERTERS = "tools.dataset_converters"
PACKAGES: dict[str, tuple[str, ...]] = {
    "mmdet3d.datasets.convert_utils": ("nuscenes",),
    "mmdet3d.evaluation.functional.lyft_eval": ("lyft_dataset_sdk",),
    "mmdet3d.evaluation.metrics.lyft_metric": ("lyft_dataset_sdk", "pandas"),
    "mmdet3d.evaluation.metrics.nuscenes_metric": ("nuscenes",),
    "mmdet3d.visualization.vis_utils": ("trimesh",),
    f"{_CONVERTERS}.kitti_converter": ("nuscenes",),
    f"{_CONVERTERS}.kitti_data_utils": ("skimage",),
    f"{_CONVERTERS}.lyft_converter": ("lyft_dataset_sdk",),
    f"{_CONVERTERS}.nuscenes_converter": ("nuscenes",),
    f"{_CONVERTERS}.update_infos_to_v2": ("nuscenes",),
}
"""Module of upstream → top-level packages that it imports and seldom uses."""

# What to install, by the package that upstream imports; all else comes with `make setup-train`.
_ELSEWHERE = {
    "waymo_open_dataset": "waymo-open-dataset-tf-2-12-0 and tensorflow 2.12, which exist for Python 3.8 to 3.10 only",
    "tensorflow": "waymo-open-dataset-tf-2-12-0 and tensorflow 2.12, which exist for Python 3.8 to 3.10 only",
    "open3d": "open3d, for windows on a display only",
}


def explain_missing_package(name: str) -> str:
    """Sentence about a package of upstream's that is not installed.

    Args:
        name: the module that was imported, such as ``nuscenes.eval``.
    """
    package = name.partition(".")[0]
    if package in _ELSEWHERE:
        return f"upstream's code for this needs {_ELSEWHERE[package]}"
    return f"upstream's code for this needs the package '{package}', which is not installed; run `make setup-train`"


class _MissingClass(type):
    """Type of stand-ins for classes and functions: usable in annotations, not otherwise."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise MissingPackage(explain_missing_package(cls.__module__))

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingPackage(explain_missing_package(cls.__module__))


class _MissingModule(ModuleType):
    """Module of a missing package: every name in it is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _MissingClass(name, (), {"__module__": self.__name__})


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder, asked last, that supplies stand-ins for the modules of some packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _MissingModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no content."""


@contextmanager
def stand_in(packages: Sequence[str]) -> Iterator[None]:
    """Supply stand-ins for those of `packages` that are not installed, within the block."""
    finder = _StandInFinder(packages)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _MissingModule):
                del sys.modules[name]
