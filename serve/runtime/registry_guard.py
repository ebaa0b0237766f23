"""Guard against code execution by configs: ``type`` may name registered classes only.

mmengine's registries treat an unregistered name as the path of an object, import its module and call it with the
config's arguments (`Registry.get`, for dumps of lazy configs): ``type='subprocess.Popen'`` would run a program.
`restrict_registry` limits such paths to registered classes. `serve.ops.patches` handles upstream's uses of `eval`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["restrict_registry"]

# Packages whose modules may be imported for a path.
_OPENMMLAB = frozenset({"mmcv", "mmdet", "mmdet3d", "mmengine", "mmpretrain", "mmseg"})


def restrict_registry() -> None:
    """Restrict the registries of this process to registered classes and functions."""
    from mmengine.registry import registry

    registry.get_object_from_string = _find_registered


def _find_registered(path: str) -> Any:
    """Find the class or function at `path` if any registry has it, else None."""
    from mmengine.utils import get_object_from_string

    package, _, rest = path.partition(".")
    if path.startswith("torch.nn."):
        return _find_layer(get_object_from_string(path))
    if package not in _OPENMMLAB or not rest:
        return None
    found = get_object_from_string(path)
    if any(found is known for one in _registries() for known in one.module_dict.values()):
        return found
    return None


def _find_layer(found: Any) -> Any:
    """Accept a layer of torch's own, which lazy configs name by its path; building one runs no foreign code."""
    from torch import nn

    is_layer = (
        isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("torch.nn.")
    )
    return found if is_layer else None


def _registries() -> Iterator[Any]:
    from mmengine import registry

    ahead = [one for one in vars(registry).values() if isinstance(one, registry.Registry)]
    while ahead:
        one = ahead.pop()
        yield one
        ahead += one.children.values()
