"""Watchdog that ends a worker which decodes or computes for too long.

TorchServe watches only the batches that pass through it. This watchdog is a thread without Python (`faulthandler`), so
that it fires even if a decoder or a kernel never returns to the interpreter: it prints the stacks of all threads to
standard error, which is TorchServe's log, and ends the process with exit code 1, after which TorchServe starts another
worker. It cannot fire while the whole process is stopped.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["watchdog"]

# A process has a single timer; it is set to the earliest of these deadlines, by the monotonic clock.
_lock = threading.Lock()
_deadlines: dict[object, float] = {}


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End the process if the `with` block takes longer than `seconds`; 0 for no limit. Threads may overlap.

    Raises:
        RuntimeError: standard error has no file descriptor.
    """
    if not seconds:
        yield
        return
    block = object()
    with _lock:
        deadline = time.monotonic() + seconds
        is_earliest = deadline < min(_deadlines.values(), default=float("inf"))
        if is_earliest:
            faulthandler.dump_traceback_later(seconds, exit=True)
        _deadlines[block] = deadline
    try:
        yield
    finally:
        with _lock:
            was_earliest = deadline == min(_deadlines.values())
            del _deadlines[block]
            if was_earliest:
                _set_timer()


def _set_timer() -> None:
    if _deadlines:
        left_s = min(_deadlines.values()) - time.monotonic()
        faulthandler.dump_traceback_later(max(0.001, left_s), exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()
