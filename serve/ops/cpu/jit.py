"""Compilation of CPU kernels: numba without the GIL, with the cache folders of `serve.ops.cpu.jit_cache`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config

from serve.ops.cpu import jit_cache

__all__ = ["jit", "jit_contracted", "keep_machine_code"]

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` on its first call and cache the machine code for other processes."""
    return _compile(function, {})


def jit_contracted(function: F) -> F:
    """Compile like `jit`, allowing fused multiply-add (one rounding instead of two), for inner products."""
    return _compile(function, {"fastmath": {"contract", "nsz"}})


def _compile(function: F, options: dict[str, Any]) -> F:
    compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    source = Path(function.__code__.co_filename).resolve()
    keep_machine_code(compiled, ".".join(source.relative_to(jit_cache.SOURCES).with_suffix("").parts))
    return compiled  # type: ignore[no-any-return]


def keep_machine_code(compiled: Any, module: str) -> None:
    """Have numba keep what it compiles on disk, if there is a folder for it; its own setting takes precedence.

    Args:
        compiled: what numba's decorator returned.
        module: name of the folder, see `serve.ops.cpu.jit_cache.folder`.
    """
    chosen = config.CACHE_DIR
    place = chosen or str(jit_cache.folder(module) or "")
    if place and not config.DISABLE_JIT:
        config.CACHE_DIR = place
        try:
            with contextlib.suppress(RuntimeError):  # numba cannot write there after all
                compiled.enable_caching()
                compiled._cache = _FaultTolerantCache(compiled._cache)
        finally:
            config.CACHE_DIR = chosen


class _FaultTolerantCache:
    """Cache of numba that treats disk errors and corrupt files as misses: the kernel is just compiled."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return self._cache.load_overload(signature, target_context)
        except Exception:  # unpickling a truncated file raises anything
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            self._cache.save_overload(signature, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
