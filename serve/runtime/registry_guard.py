"""Guard against code execution by configs: ``type`` may name registered classes only.

mmengine's registries treat an unregistered name as the path of an object, import its module and call it with the
config's arguments (`Registry.get`, for dumps of lazy configs): ``type='subprocess.Popen'`` would run a program. They
also import ``X.registry`` for a scope, ``_scope_='X'`` or ``type='X.Class'``. `restrict_registry` limits such paths to
registered classes, and the imports to OpenMMLab's packages. `serve.runtime.build_guard` refuses what a registered class
does with its arguments, beyond building a network.

A lazy config names its author's own classes by path, too: `allow_modules` admits those of modules that were imported
on purpose, and the unregistered ones among them only if their author is trusted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

__all__ = [
    "OPENMMLAB",
    "allow_modules",
    "find_registered",
    "is_importable",
    "is_torch_layer_path",
    "registries",
    "registry_scopes",
    "restrict_registry",
]

# Packages whose modules may be imported for a path.
OPENMMLAB = frozenset({"mmcv", "mmdet", "mmdet3d", "mmengine", "mmpretrain", "mmseg"})
# Top-level names of imported custom modules; of those, the trusted ones.
_imported: set[str] = set()
_trusted: set[str] = set()


def restrict_registry() -> None:
    """Restrict the registries of this process to registered classes and functions, and to known packages."""
    from mmengine.registry import registry

    registry.get_object_from_string = find_registered
    registry.import_module = _import_known


def allow_modules(names: Iterable[str], *, trusted: bool) -> None:
    """Let configs name registered classes of these top-level modules; if `trusted`, any class defined in them."""
    _imported.update(names)
    if trusted:
        _trusted.update(names)


def is_torch_layer_path(path: str) -> bool:
    """Whether a path names a layer of torch, which needs no module of anybody's."""
    return path.startswith("torch.nn.")


def registry_scopes() -> frozenset[str]:
    """Scopes of all registries: ``mmdet.FCOS`` names a class in the scope mmdet."""
    return frozenset(str(one.scope) for one in registries())


def is_importable(name: str) -> bool:
    """Whether a config may have the module `name` imported: one of OpenMMLab's, or of a package imported on purpose."""
    return name.partition(".")[0] in OPENMMLAB | _imported


def _import_known(name: str) -> ModuleType:
    """Import a module for a registry, as `importlib.import_module`, if `is_importable`."""
    if not is_importable(name):
        raise ModuleNotFoundError(f"a config may not import {name}", name=name)
    return importlib.import_module(name)


def find_registered(path: str) -> Any:
    """Find the class or function at `path` if any registry has it, else None."""
    from mmengine.utils import get_object_from_string

    package, _, rest = path.partition(".")
    if is_torch_layer_path(path):
        return _find_layer(get_object_from_string(path))
    if not is_importable(package) or not rest:
        return None
    found = get_object_from_string(path)
    if package in _trusted and str(getattr(found, "__module__", "")).partition(".")[0] in _trusted:
        return found  # not what such a module imported: mymodule.subprocess.Popen stays refused
    if any(found is known for one in registries() for known in one.module_dict.values()):
        return found
    return None


def _find_layer(found: Any) -> Any:
    """Accept a layer of torch's own, which lazy configs name by its path; building one runs no foreign code."""
    from torch import nn

    is_layer = (
        isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("torch.nn.")
    )
    return found if is_layer else None


def registries() -> Iterator[Any]:
    """All registries of this process."""
    from mmengine import registry

    ahead = [one for one in vars(registry).values() if isinstance(one, registry.Registry)]
    # mmdet3d's registry of set abstractions has no parent.
    builder = sys.modules.get("mmdet3d.models.layers.pointnet_modules.builder")
    ahead += [builder.SA_MODULES] if builder else []
    while ahead:
        one = ahead.pop()
        yield one
        ahead += one.children.values()
