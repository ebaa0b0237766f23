"""The one way our CPU kernels are compiled: numba, nogil, cached on disk where a disk can be written.

Knows nothing about the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

__all__ = ["jit"]

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` on first call and keep the machine code beside its source.

    With a read-only source tree and a read-only home numba finds no place for its cache and says
    so by raising RuntimeError; then every process compiles for itself.
    """
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled  # type: ignore[no-any-return]
