"""A text in an archive's config names what OpenMMLab registered, and nothing else.

mmengine's registries take a text that nobody registered for the path of an object, import its module and call it with
what else the config says (`Registry.get`, meant for dumps of lazy configs): ``type='subprocess.Popen'`` would run a
program. Here that way leads to registered classes only. Where upstream evaluates a text as Python,
`serve.ops.patches` takes names. Knows nothing about archives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["restrict_registry"]

# Whose modules may be imported for a class that a path names.
_OPENMMLAB = frozenset({"mmcv", "mmdet", "mmdet3d", "mmengine", "mmpretrain", "mmseg"})


def restrict_registry() -> None:
    """From now on, registries of this process build registered classes and functions only."""
    from mmengine.registry import registry

    registry.get_object_from_string = _find_registered


def _find_registered(path: str) -> Any:
    """The class or function at `path` if it is registered somewhere, else None."""
    from mmengine.utils import get_object_from_string

    package, _, rest = path.partition(".")
    if package not in _OPENMMLAB or not rest:
        return None
    found = get_object_from_string(path)
    if any(found is known for one in _registries() for known in one.module_dict.values()):
        return found
    return None


def _registries() -> Iterator[Any]:
    from mmengine import registry

    ahead = [one for one in vars(registry).values() if isinstance(one, registry.Registry)]
    while ahead:
        one = ahead.pop()
        yield one
        ahead += one.children.values()
