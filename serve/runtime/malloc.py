"""Lets the C library keep memory that was freed, so that the next frame finds it.

A network frees and asks for the same megabytes on every frame. glibc gives large blocks back to the system each time,
and the system hands them out again page by page, cleared: a frame of SECOND took 36,000 page faults, a tenth of its CPU
time (docs/decisions/0005-portable-kernels.md). A process that serves models may keep the most it ever needed. Knows
nothing about models.
"""

from __future__ import annotations

import ctypes

__all__ = ["disable_malloc_trim"]

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = -1
_LARGEST_KEPT_BYTES = 1 << 30


def disable_malloc_trim() -> bool:
    """Tell glibc's malloc to keep what is freed, for the whole process; False where the C library is another one."""
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return False
    # One arena: another thread's, beyond the first, is made of small heaps that large blocks do not fit.
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in wanted])
