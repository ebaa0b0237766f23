"""Lock of a file that is being written, across processes and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["hold_lock"]


@contextmanager
def hold_lock(target: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of `target` in the ``with`` block; its lock file is removed afterwards.

    Args:
        target: the file.
        waiting: called once if another process or thread holds it.
    """
    path = target.with_name(target.name + ".lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        # Safe while held: FileLock notices that its file was removed and starts again.
        path.unlink(missing_ok=True)
        lock.release()
