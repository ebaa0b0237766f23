"""Bitmaps with rank: the rank of a set bit is the number of set bits before it. For compiled code.

Rank by population counts: G. Jacobson, "Space-efficient static trees and graphs", FOCS 1989.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["popcount", "prefix_popcounts"]


@jit
def popcount(word: np.uint64) -> int:  # pragma: no cover - compiled
    """Count the set bits, by adding within ever wider fields."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@jit
def prefix_popcounts(
    marks: npt.NDArray[np.uint64], before: npt.NDArray[np.int32]
) -> int:  # pragma: no cover - compiled
    """Write the number of set bits before each word to `before`; return their total."""
    total = 0
    for w in range(marks.shape[0]):
        before[w] = total
        if marks[w] != np.uint64(0):
            total += popcount(marks[w])
    return total
