"""Shares the rows of one CPU kernel out over as many threads as torch uses.

Numba code compiled by `serve.ops.cpu.jit.jit` releases the GIL, so plain threads do. Every row is computed by
the same instructions whatever the number of threads: results do not depend on it. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["parallel_for"]


# A thread that wakes up late, on a machine that others use too, finds the rest done instead of holding all up.
_CHUNKS_PER_THREAD = 4


def parallel_for(work: Callable[[int, int], Any], total: int, *, min_per_thread: int = 1) -> None:
    """Call ``work(first, last)`` for ranges that together cover ``range(total)``, and wait for all of them.

    The caller works too; who does which range is not fixed, so `work` must not care.

    Args:
        work: the kernel.
        total: how many rows there are.
        min_per_thread: rows that a thread is worth waking up for, which takes it some 0.1 ms.
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
        for first, last in shared:  # of a list: two threads never get the same one
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
