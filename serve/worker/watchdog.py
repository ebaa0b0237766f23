"""Ends a worker that computes one batch for too long, and says where it was.

TorchServe watches only batches that go through it. The watch here is a thread without Python (`faulthandler`), so it
goes off when the interpreter itself is held by a kernel that does not return: every thread's stack goes to standard
error, which is TorchServe's log, and the process ends with 1, upon which TorchServe starts another. It cannot do so
while the whole process is stopped. Knows nothing about batches.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["watchdog"]


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Let the process end if what is inside takes longer than `seconds` (0: however long it takes).

    A process has one such watch: not to be used in two threads at a time.

    Raises:
        RuntimeError: standard error is no file.
    """
    if not seconds:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
