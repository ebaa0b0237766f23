"""Lock of a file that is being written, across processes and threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

__all__ = ["hold_lock"]


@contextmanager
def hold_lock(target: Path) -> Iterator[None]:
    """Hold the lock of `target` in the ``with`` block; its lock file is removed afterwards."""
    path = target.with_name(target.name + ".lock")
    with FileLock(path):
        try:
            yield
        finally:
            # Safe while held: FileLock notices that its file was removed and starts again.
            path.unlink(missing_ok=True)
