"""Find the classes and functions that a config holds as values, under the rules for ``type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.archive.config_json import ObjectPath
from serve.errors import ArchiveError
from serve.runtime.registry_guard import find_registered

__all__ = ["resolve_objects"]


def resolve_objects(value: Any) -> Any:
    """Copy a config value with every `ObjectPath` replaced by its object.

    Raises:
        ArchiveError: a path names something that a config may not name.
    """
    if isinstance(value, ObjectPath):
        found = find_registered(str(value))
        if found is None:
            raise ArchiveError(
                f"the config holds {value} as a value, which is neither a layer of torch.nn nor registered nor in a "
                "module of its own; name it by a string, or import it in a module of your own"
            )
        return found
    if isinstance(value, Mapping):
        return {name: resolve_objects(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        made = [resolve_objects(inner) for inner in value]
        return tuple(made) if isinstance(value, tuple) else made
    return value
