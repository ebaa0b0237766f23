"""Model of known cost: it sleeps 20 ms per batch and 2 ms per frame, without CPU use, like a GPU.

With batches of 16 that is 22 ms for a single frame and at most 308 frames per second on any server. It uses the
standard library only, because the peers run in an environment of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ["BATCH", "BATCH_S", "FRAME_S", "answers", "ideal_rate", "lone_s"]

BATCH = 16
BATCH_S = 0.020
FRAME_S = 0.002


def answers(sizes: Sequence[int]) -> list[dict[str, int]]:
    """Run a batch of frames of `sizes` bytes; answer each with its size and the size of the batch."""
    time.sleep(BATCH_S + FRAME_S * len(sizes))
    return [{"bytes": size, "batch": len(sizes)} for size in sizes]


def lone_s() -> float:
    """Return the minimum seconds of a single frame."""
    return BATCH_S + FRAME_S


def ideal_rate() -> float:
    """Return the frames per second of full batches without a gap."""
    return BATCH / (BATCH_S + FRAME_S * BATCH)
