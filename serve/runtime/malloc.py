"""Malloc tuning: keep freed memory in the process for the next frame.

A network frees and allocates the same megabytes for every frame. By default glibc returns large blocks to the system,
which hands them out again as zeroed pages: a frame of SECOND took 36,000 page faults, a tenth of its CPU time
(docs/decisions/0005-portable-kernels.md). A serving process may keep its peak memory.
"""

from __future__ import annotations

import ctypes

__all__ = ["disable_malloc_trim"]

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = -1
_LARGEST_KEPT_BYTES = 1 << 30


def disable_malloc_trim() -> bool:
    """Make glibc's malloc keep freed memory, for the whole process; return False with another C library."""
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows
        return False
    # One arena: those of other threads consist of small heaps, too small for large blocks.
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in wanted])
