"""The one way our CPU kernels are compiled: numba, nogil, cached on disk where a disk can be written.

Knows nothing about the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

__all__ = ["jit", "jit_contracted"]

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` on first call and keep the machine code beside its source."""
    return _compiled(function, {})


def jit_contracted(function: F) -> F:
    """As `jit`, and products may be fused into sums (one rounding instead of two): for inner products."""
    return _compiled(function, {"fastmath": {"contract", "nsz"}})


def _compiled(function: F, options: dict[str, Any]) -> F:
    """Numba with its cache on disk where there is a place for it.

    With a read-only source tree and a read-only home numba finds none and says so by raising
    RuntimeError; then every process compiles for itself.
    """
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    return compiled  # type: ignore[no-any-return]
