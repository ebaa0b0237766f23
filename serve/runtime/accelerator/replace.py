"""Whether a part of a network still has the method of the class for which a replacement was written."""

from __future__ import annotations

from typing import Any

__all__ = ["overrides"]


def overrides(part: Any, kind: type, *methods: str) -> bool:
    """Return whether `part` has other `methods` than class `kind`: a derived class, or one set on the object."""
    return any(
        getattr(type(part), method, None) is not getattr(kind, method, None) or method in vars(part)
        for method in methods
    )
