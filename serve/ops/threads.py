"""Shares the rows of one CPU kernel out over as many threads as torch uses.

Numba code compiled by `serve.ops.jit.jit` releases the GIL, so plain threads do. Every row is computed by
the same instructions whatever the number of threads: results do not depend on it. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["in_parts"]


def in_parts(work: Callable[[int, int], Any], total: int) -> None:
    """Call ``work(first, last)`` for ranges that together cover ``range(total)``, and wait for all of them."""
    threads = min(torch.get_num_threads(), total)
    if threads <= 1:
        if total > 0:
            work(0, total)
        return
    bounds = [total * i // threads for i in range(threads + 1)]
    for part in [_pool(threads).submit(work, a, b) for a, b in pairwise(bounds)]:
        part.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="serve-ops")
