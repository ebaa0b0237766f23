"""Open-addressing hash table of int64 keys for compiled CPU kernels.

The table is an array of keys, -1 if empty, whose size is a power of two; it is at most half full.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["find_or_insert", "table_size"]

# Knuth's multiplicative constant for 64 bits (The Art of Computer Programming, vol. 3, 6.4).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def table_size(capacity: int) -> int:
    """Return the smallest power of two of at least twice `capacity` keys and at least 16."""
    return 1 << max(4, int(2 * capacity - 1).bit_length())


@jit
def find_or_insert(
    keys: npt.NDArray[np.int64], key: np.int64, insert: bool
) -> np.int64:  # pragma: no cover - compiled
    """Find the slot of `key`, or the empty slot for it, or -1 if it is absent and not `insert`.

    The caller writes a new key into the empty slot itself.
    """
    mask = keys.shape[0] - 1
    at: np.int64 = np.int64((np.uint64(key) * _GOLDEN) >> np.uint64(32)) & mask
    while True:
        found = keys[at]
        if found == key:
            return at
        if found == -1:
            return at if insert else np.int64(-1)
        at = (at + 1) & mask
