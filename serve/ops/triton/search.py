"""Binary search, a function of kernels."""

from __future__ import annotations

import triton.language as tl

from serve.ops.triton.dispatch import kernel

__all__ = ["first_not_below"]


@kernel
def first_not_below(ordered, key, count: int, steps: int, ABOVE: tl.constexpr):  # pragma: no cover - compiled
    """Find the first place of sorted numbers not below `key`, or with `ABOVE` above it; `count` if there is none.

    `steps` is the bit length of `count`.
    """
    low = tl.zeros_like(key)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        value = tl.load(ordered + middle, mask=searching, other=0)
        right = (value <= key) if ABOVE else (value < key)
        low = tl.where(searching & right, middle + 1, low)
        high = tl.where(searching & (right == 0), middle, high)
    return low
