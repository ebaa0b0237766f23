"""Parallel loop over the rows of a CPU kernel, with torch's number of threads.

Numba code compiled by `serve.ops.cpu.jit.jit` releases the GIL, so plain threads suffice. Each row is computed by the
same instructions for any number of threads, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["parallel_for"]


# Dynamic scheduling: a thread that wakes up late, on a busy machine, does not delay the others.
_CHUNKS_PER_THREAD = 4


def parallel_for(work: Callable[[int, int], Any], total: int, *, min_per_thread: int = 1) -> None:
    """Call ``work(first, last)`` for ranges that cover ``range(total)``, in parallel, and wait for them.

    The caller's thread takes part. Ranges are assigned to threads dynamically.

    Args:
        work: kernel of a range.
        total: number of rows.
        min_per_thread: rows that justify waking up a thread, which takes about 0.1 ms.
    """
    threads = min(torch.get_num_threads(), total // min_per_thread)
    if threads <= 1:
        if total > 0:
            work(0, total)
        return
    count = min(total, threads * _CHUNKS_PER_THREAD)
    ranges = pairwise(total * i // count for i in range(count + 1))
    shared = iter(list(ranges))

    def take() -> None:
        for first, last in shared:  # a list iterator is atomic: no range is taken twice
            work(first, last)

    others = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        awake = [one for one in others if not one.cancel()]
        wait(awake)
    for one in awake:
        one.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="serve-ops")
