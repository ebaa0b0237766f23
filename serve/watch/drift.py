"""Distance of two histograms, and the distance that chance alone makes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FLOOR", "chance_limit", "distance"]

Numbers = npt.NDArray[np.number[Any]]

#: Least limit: a shift below it is small, whatever its significance.
FLOOR = 0.1
# Draws of the bootstrap, their quantile, and the margin above it.
_DRAWS, _QUANTILE, _MARGIN = 1000, 0.99, 1.75


def distance(one: Numbers, other: Numbers) -> float | None:
    """Return the Jensen-Shannon distance of two histograms: 0 for equal shares, 1 for none in common.

    The square root of the Jensen-Shannon divergence to base 2 (Lin 1991, "Divergence measures based on the Shannon
    entropy"), which is a metric (Endres and Schindelin 2003). Unlike the population stability index it is bounded, and
    defined where one histogram has nothing in a bin.

    Args:
        one: counts by bin.
        other: counts of the same bins.

    Returns:
        The distance; None if one has no counts at all.
    """
    found = _distances(np.asarray(one, np.float64)[None], np.asarray(other, np.float64)[None])[0]
    return None if np.isnan(found) else float(found)


def _distances(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distances of the rows of two arrays (N, bins); NaN without counts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = one / one.sum(axis=1, keepdims=True)
        q = other / other.sum(axis=1, keepdims=True)
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0) + np.where(q > 0, q * np.log2(q / middle), 0)
        empty = np.isnan(p).any(axis=1) | np.isnan(q).any(axis=1)
    found = np.sqrt(np.clip(terms.sum(axis=1) / 2, 0, 1))
    return np.where(empty, np.nan, found)


def chance_limit(blocks: Numbers, window: int) -> float:
    """Return the distance to a reference above which a window of frames is no chance any more.

    Frames that follow each other resemble each other, and so do the detections of a frame. Reference and window are
    therefore drawn anew from runs of blocks (the circular block bootstrap of Politis and Romano, 1992), each as long as
    the cube root of their number; the limit lies by three quarters above the distance that one pair in a hundred
    exceeds, and not below `FLOOR`.

    Args:
        blocks: (M, bins) counts of the frames of the reference, or of groups of frames, in the order of time.
        window: number of blocks of a window.
    """
    blocks = np.asarray(blocks, np.float64)
    number = len(blocks)
    run = math.ceil(number ** (1 / 3))
    around = np.concatenate(
        [np.zeros((1, blocks.shape[1])), np.cumsum(np.vstack([blocks, blocks[:run]]), axis=0)]
    )
    runs = around[run : run + number] - around[:number]
    random = np.random.default_rng(0)
    share = np.full(number, 1 / number)
    drawn = [
        # One draw after the other: together they need 16 kB for each block.
        np.stack([random.multinomial(max(1, round(size / run)), share) @ runs for _ in range(_DRAWS)])
        for size in (number, window)
    ]
    found = _distances(drawn[0], drawn[1])
    found = found[~np.isnan(found)]
    if not len(found):
        return 1.0  # too rare to say anything of
    return float(min(1.0, max(FLOOR, _MARGIN * np.quantile(found, _QUANTILE))))
