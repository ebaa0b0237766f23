"""The model of known cost: 20 ms per batch and 2 ms per frame, slept, as a GPU would take them.

With batches of 16 that is 22 ms for a lone frame and 308 frames per second at the most, whoever serves it.
Knows no server. Standard library only: the servers we compare ourselves with have an environment of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ["BATCH", "BATCH_S", "FRAME_S", "answers", "ideal_rate", "lone_s"]

BATCH = 16
BATCH_S = 0.020
FRAME_S = 0.002


def answers(sizes: Sequence[int]) -> list[dict[str, int]]:
    """What a batch of frames of so many bytes each comes to: those sizes, and how many frames the batch had."""
    time.sleep(BATCH_S + FRAME_S * len(sizes))
    return [{"bytes": size, "batch": len(sizes)} for size in sizes]


def lone_s() -> float:
    """Seconds that a lone frame takes at least."""
    return BATCH_S + FRAME_S


def ideal_rate() -> float:
    """Frames per second of full batches without a gap."""
    return BATCH / (BATCH_S + FRAME_S * BATCH)
