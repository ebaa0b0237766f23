"""Lossless JSON encoding of resolved OpenMMLab configs: tuples stay tuples.

mmcv and mmdet check ``isinstance(x, tuple)`` in many places, so a plain JSON round trip would change the meaning of a
config. Types without a JSON equivalent are wrapped in an object with one tag: ``{"__tuple__": […]}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from serve.errors import ArchiveError

__all__ = ["ObjectPath", "from_json", "to_json"]

_TAGS = frozenset({"__tuple__", "__set__", "__float__", "__dict__", "__object__"})


class ObjectPath(str):
    """Path of a class or function that is a value of a config, as in ``dict(type=Net, layer=torch.nn.GELU)``.

    A ``type`` stays plain text, which the registries look up.
    """


def to_json(value: Any, where: str = "config") -> Any:
    """Convert a config value to JSON types.

    Raises:
        ArchiveError: a value is not data (a function, a class, an object); the message names its path.
    """
    if isinstance(value, ObjectPath):
        return {"__object__": str(value)}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, tuple):
        return {"__tuple__": [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {"__set__": sorted((to_json(item, where) for item in value), key=repr)}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) for key in value) and not _TAGS & set(value)
        if plain:
            return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
        return {"__dict__": [[to_json(k, where), to_json(v, f"{where}.{k}")] for k, v in value.items()]}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy scalars and arrays
        return to_json(value.tolist(), where)
    raise ArchiveError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, not data; register the class and name it "
        "by a string in the config"
    )


def from_json(value: Any) -> Any:
    """Inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "__tuple__":
            return tuple(from_json(item) for item in inner)
        if tag == "__set__":
            return {from_json(item) for item in inner}
        if tag == "__object__":
            return ObjectPath(inner)
        if tag == "__float__":
            return float(inner)
        if tag == "__dict__":
            return {from_json(k): from_json(v) for k, v in inner}
    return {key: from_json(item) for key, item in value.items()}
