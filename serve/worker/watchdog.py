"""Watchdog that ends a worker which computes one batch for too long.

TorchServe watches only the batches that pass through it. This watchdog is a thread without Python (`faulthandler`), so
that it fires even if a kernel never returns to the interpreter: it prints the stacks of all threads to standard error,
which is TorchServe's log, and ends the process with exit code 1, after which TorchServe starts another worker. It
cannot fire while the whole process is stopped.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["watchdog"]


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End the process if the `with` block takes longer than `seconds`; 0 for no limit.

    A process has only one such timer: do not use it in two threads at a time.

    Raises:
        RuntimeError: standard error has no file descriptor.
    """
    if not seconds:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
