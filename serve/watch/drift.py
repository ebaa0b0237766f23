"""Distance of two histograms, and the distance that chance alone makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FLOOR", "LEAST_BLOCKS", "chance_limit", "distance", "distances"]

Numbers = npt.NDArray[np.number[Any]]

#: Least limit: a shift below it is small, whatever its significance.
FLOOR = 0.1
# Draws of the bootstrap, their quantile, and the margin above it.
_DRAWS, _QUANTILE, _MARGIN = 1000, 0.99, 1.75
#: Fewer blocks than that are one run, which every draw repeats: they would have no distance at all.
LEAST_BLOCKS = 3


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
    found = float(distances(one, other, [0])[0])
    return None if math.isnan(found) else found


def distances(one: Numbers, other: Numbers, starts: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the distances of several histograms that lie in one array, one after the other; NaN without counts.

    Args:
        one: (..., bins) counts.
        other: (..., bins) counts of the same bins.
        starts: place of the first bin of each histogram, rising from 0.

    Returns:
        (..., histograms) distances, as `distance` has them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (_shares(np.asarray(each, np.float64), starts) for each in (one, other))
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0) + np.where(q > 0, q * np.log2(q / middle), 0)
    found: npt.NDArray[np.float64] = np.sqrt(np.clip(np.add.reduceat(terms, starts, axis=-1) / 2, 0, 1))
    is_empty = np.isnan(np.add.reduceat(p + q, starts, axis=-1))
    found[is_empty] = np.nan
    return found


def _shares(counts: npt.NDArray[np.float64], starts: Sequence[int]) -> npt.NDArray[np.float64]:
    """Divide each histogram by its sum; NaN without counts."""
    sums = np.add.reduceat(counts, starts, axis=-1)
    lengths = np.diff([*starts, counts.shape[-1]])
    shares: npt.NDArray[np.float64] = counts / np.repeat(sums, lengths, axis=-1)
    return shares


def chance_limit(blocks: Numbers, window: int) -> float:
    """Return the distance to a reference above which a window of frames is no chance any more.

    Frames that follow each other resemble each other, and so do the detections of a frame. Reference and window are
    therefore drawn anew from runs of blocks (the circular block bootstrap of Politis and Romano, 1992), each as long as
    the cube root of their number; the limit lies by three quarters above the distance that one pair in a hundred
    exceeds, and not below `FLOOR`. Of one or two blocks it is 1, because they do not tell how much chance changes.

    Args:
        blocks: (M, bins) counts of the frames of the reference, or of groups of frames, in the order of time.
        window: number of blocks of a window.
    """
    blocks = np.asarray(blocks, np.float64)
    number = len(blocks)
    if number < LEAST_BLOCKS:
        return 1.0
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
    found = distances(drawn[0], drawn[1], [0])[:, 0]
    found = found[~np.isnan(found)]
    if not len(found):
        return 1.0  # too rare to say anything of
    return float(min(1.0, max(FLOOR, _MARGIN * np.quantile(found, _QUANTILE))))
