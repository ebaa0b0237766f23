"""Pair the rows of two sets of boxes one to one, independent of their order.

Candidates are found by sorting on the most selective column, so that thousands of rows stay cheap, and each
connected group of candidates is settled by minimum-cost assignment. Four rounds, each on what the one before
left over:

1. same label, everything within tolerance   (agreement)
2. any label, everything within tolerance    (the label is wrong)
3. same label, boxes within reach            (the numbers deviate)
4. any label, boxes within reach             (both)

Numpy and scipy's assignment only. Knows nothing about dictionaries, masks, thresholds or verdicts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["YAW", "Rows", "angle_between", "match_rows"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

YAW = 6  #: column of the angle in a 3D box x, y, z, dx, dy, dz, yaw[, vx, vy]
_DENSE_LIMIT = 1500  # a group of candidates larger than this is paired greedily
_BLOCK_ROWS = 512  # rows whose candidates are tested at once: bounds the memory


class Rows(NamedTuple):
    """One side: boxes (N, C) float64, scores (N,) float64, labels (N,) int64, all finite."""

    boxes: Floats
    scores: Floats
    labels: Ints


def match_rows(one: Rows, two: Rows, *, box: float, score: float, yaw: float | None, reach: float) -> Ints:
    """Pair the rows of two sides in the four rounds of the module docstring.

    Args:
        one: first side.
        two: second side; its boxes have as many columns as the first's.
        box: limit per box value (metres or pixels) for agreement, inclusive.
        score: limit for scores, inclusive.
        yaw: limit for column `YAW` in radians modulo a full turn; None when that column is no angle.
        reach: limit per box value for rows that disagree but may be the same object.

    Returns:
        (M, 2) positions in the first and second side; each position occurs at most once.
    """
    width = one.boxes.shape[1]
    tight = np.full(width + 1, box)
    tight[-1] = score
    loose = np.full(width + 1, reach)
    loose[-1] = np.inf
    if yaw is not None:
        tight[YAW], loose[YAW] = yaw, np.inf
    left, right = np.arange(len(one.scores)), np.arange(len(two.scores))
    found = []
    for limits, same_label in ((tight, True), (tight, False), (loose, True), (loose, False)):
        pairs, cost = _candidates(one, two, left, right, limits, same_label, yaw is not None)
        chosen = _assign(pairs, cost)
        found.append(chosen)
        left, right = np.setdiff1d(left, chosen[:, 0]), np.setdiff1d(right, chosen[:, 1])
    return np.concatenate(found)


def _candidates(
    one: Rows, two: Rows, left: Ints, right: Ints, limits: Floats, same_label: bool, has_yaw: bool
) -> tuple[Ints, Floats]:
    """All pairs (i, j) of ``left`` and ``right`` within ``limits`` per column, and a cost in 0..1 each."""
    a = np.column_stack([one.boxes[left], one.scores[left]])
    b = np.column_stack([two.boxes[right], two.scores[right]])
    pairs, costs = [np.empty((0, 2), np.int64)], [np.empty(0)]
    angle = YAW if has_yaw else -1
    # 1. The column whose window holds the fewest pairs; a small slack keeps the limits inclusive.
    best: tuple[int, Ints, Ints, Ints] | None = None
    for column in range(a.shape[1]):
        if column == angle or not np.isfinite(limits[column]):
            continue
        order = np.argsort(b[:, column], kind="stable")
        slack = limits[column] * (1 + 1e-9) + 1e-12
        low = np.searchsorted(b[order, column], a[:, column] - slack, "left")
        high = np.searchsorted(b[order, column], a[:, column] + slack, "right")
        total = int((high - low).sum())
        if best is None or total < best[0]:
            best = (total, order, low, high)
    if best is None or best[0] == 0:
        return pairs[0], costs[0]
    # 2. Expand the windows, a block of rows at a time, and test every column.
    _, order, low, high = best
    for start in range(0, len(a), _BLOCK_ROWS):
        counts = (high - low)[start : start + _BLOCK_ROWS]
        rows = np.repeat(np.arange(start, start + len(counts)), counts)
        first = np.repeat(low[start : start + _BLOCK_ROWS] - (np.cumsum(counts) - counts), counts)
        columns = order[np.arange(len(rows)) + first]
        if same_label:
            keep = one.labels[left[rows]] == two.labels[right[columns]]
            rows, columns = rows[keep], columns[keep]
        deviation = np.abs(a[rows] - b[columns])
        if has_yaw:
            deviation[:, YAW] = angle_between(a[rows, YAW] - b[columns, YAW])
        keep = (deviation <= limits).all(1)
        pairs.append(np.column_stack([left[rows[keep]], right[columns[keep]]]))
        scale = np.where(np.isfinite(limits), np.maximum(limits, 1e-30), np.pi if has_yaw else 1.0)
        costs.append(np.minimum(deviation[keep] / scale, 1.0).mean(1))
    return np.concatenate(pairs), np.concatenate(costs)


def _assign(pairs: Ints, cost: Floats) -> Ints:
    """Most pairs, then least cost, each position used once; groups that do not touch are settled apart."""
    if not len(pairs):
        return pairs
    left, a = np.unique(pairs[:, 0], return_inverse=True)
    right, b = np.unique(pairs[:, 1], return_inverse=True)
    alone = (np.bincount(a)[a] == 1) & (np.bincount(b)[b] == 1)
    chosen = [pairs[alone]]
    rest = np.flatnonzero(~alone)
    group = np.arange(len(left))  # smallest left index reachable: spreads until nothing changes
    while len(rest):
        lowest = np.full(len(right), len(left))
        np.minimum.at(lowest, b[rest], group[a[rest]])
        spread = group.copy()
        np.minimum.at(spread, a[rest], lowest[b[rest]])
        if np.array_equal(spread, group):
            break
        group = spread
    order = rest[np.argsort(group[a[rest]], kind="stable")]
    cuts = np.flatnonzero(np.diff(group[a[order]])) + 1
    for members in np.split(order, cuts) if len(order) else ():
        chosen.append(pairs[members[_settle(a[members], b[members], cost[members])]])
    return np.concatenate(chosen)


def _settle(a: Ints, b: Ints, cost: Floats) -> Ints:
    """Positions of the chosen edges of one connected group."""
    from scipy.optimize import linear_sum_assignment

    rows, a = np.unique(a, return_inverse=True)
    columns, b = np.unique(b, return_inverse=True)
    if max(len(rows), len(columns)) > _DENSE_LIMIT:
        taken_a, taken_b, greedy = set[int](), set[int](), []
        for edge in np.argsort(cost, kind="stable").tolist():
            if a[edge] not in taken_a and b[edge] not in taken_b:
                taken_a.add(int(a[edge]))
                taken_b.add(int(b[edge]))
                greedy.append(edge)
        return np.asarray(greedy, np.int64)
    absent = 4.0 * max(len(rows), len(columns))  # dearer than any complete set of edges
    dense = np.full((len(rows), len(columns)), absent)
    dense[a, b] = cost
    edge_at = np.full(dense.shape, -1, np.int64)
    edge_at[a, b] = np.arange(len(a))
    edges = edge_at[linear_sum_assignment(dense)]
    return np.asarray(edges[edges >= 0], np.int64)


def angle_between(angle: Floats) -> Floats:
    """Size of an angle difference in radians (any shape), modulo a full turn: 0..π."""
    return np.asarray(np.abs((angle + np.pi) % (2 * np.pi) - np.pi))
