"""Pair the rows of two sets of boxes one to one, independent of their order.

A k-d tree finds the candidates, so that thousands of rows stay cheap, and minimum-cost assignment chooses among those
of each connected component. Four rounds, each on the rows that the previous ones left unpaired:

1. same label, all columns within tolerance   (agreement)
2. any label, all columns within tolerance    (wrong label)
3. same label, boxes within reach             (deviating values)
4. any label, boxes within reach              (both)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["YAW", "Rows", "angle_between", "match_rows"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

YAW = 6  #: column of the angle in a 3D box x, y, z, dx, dy, dz, yaw[, vx, vy]
_DENSE_LIMIT = 1500  # larger components are paired greedily
_BLOCK_ROWS = 512  # rows tested at a time, which bounds the memory


class Rows(NamedTuple):
    """One side: boxes (N, C) float64, scores (N,) float64, labels (N,) int64, all finite."""

    boxes: Floats
    scores: Floats
    labels: Ints


def match_rows(one: Rows, two: Rows, *, box: float, score: float, yaw: float | None, reach: float) -> Ints:
    """Pair the rows of two sides in the four rounds of the module docstring.

    Args:
        one: first side.
        two: second side, whose boxes have as many columns.
        box: limit per box value (metres or pixels) for agreement, inclusive.
        score: limit for scores, inclusive.
        yaw: limit for column `YAW` in radians modulo a full turn; None if that column is not an angle.
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
        pairs, cost = _find_candidates(one, two, left, right, limits, same_label, yaw is not None)
        chosen = _assign(pairs, cost)
        found.append(chosen)
        left, right = np.setdiff1d(left, chosen[:, 0]), np.setdiff1d(right, chosen[:, 1])
    return np.concatenate(found)


def _find_candidates(
    one: Rows, two: Rows, left: Ints, right: Ints, limits: Floats, same_label: bool, has_yaw: bool
) -> tuple[Ints, Floats]:
    """All pairs (i, j) of ``left`` and ``right`` within ``limits`` per column, and their costs in 0..1."""
    from scipy.spatial import cKDTree

    a = np.column_stack([one.boxes[left], one.scores[left]])
    b = np.column_stack([two.boxes[right], two.scores[right]])
    if not len(a) or not len(b):
        return np.empty((0, 2), np.int64), np.empty(0)
    # Columns scaled by their limits, so that all candidates lie within a Chebyshev distance of 1; a margin covers
    # rounding, and the exact comparison below decides. An angle wraps around and is left to that comparison.
    linear = np.isfinite(limits) & (np.arange(len(limits)) != (YAW if has_yaw else -1))
    unit = limits[linear] * (1 + 1e-9) + 1e-12
    with np.errstate(over="ignore"):
        scaled = [np.clip(side[:, linear] / unit, -1e150, 1e150) for side in (a, b)]
    tree = cKDTree(scaled[1])
    scale = np.where(np.isfinite(limits), np.maximum(limits, 1e-30), np.pi if has_yaw else 1.0)
    pairs, costs = [], []
    for start in range(0, len(a), _BLOCK_ROWS):
        near = tree.query_ball_point(
            scaled[0][start : start + _BLOCK_ROWS], 1.001, p=np.inf, return_sorted=True
        )
        rows = np.repeat(np.arange(start, start + len(near)), [len(columns) for columns in near])
        columns = np.concatenate([np.asarray(columns, np.int64) for columns in near])
        deviation = np.abs(a[rows] - b[columns])
        if has_yaw:
            deviation[:, YAW] = angle_between(a[rows, YAW] - b[columns, YAW])
        keep = (deviation <= limits).all(1)
        if same_label:
            keep &= one.labels[left[rows]] == two.labels[right[columns]]
        pairs.append(np.column_stack([left[rows[keep]], right[columns[keep]]]))
        costs.append(np.minimum(deviation[keep] / scale, 1.0).mean(1))
    return np.concatenate(pairs), np.concatenate(costs)


def _assign(pairs: Ints, cost: Floats) -> Ints:
    """Choose most pairs, then least total cost, with each position used at most once."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return pairs
    left, a = np.unique(pairs[:, 0], return_inverse=True)
    right, b = np.unique(pairs[:, 1], return_inverse=True)
    size = len(left) + len(right)
    graph = coo_array((np.ones(len(pairs)), (a, len(left) + b)), shape=(size, size))
    component = connected_components(graph, directed=False)[1][a]
    order = np.argsort(component, kind="stable")
    cuts = np.flatnonzero(np.diff(component[order])) + 1
    groups = np.split(order, cuts)
    chosen = [edges[_choose(a[edges], b[edges], cost[edges])] for edges in groups]
    return np.asarray(pairs[np.concatenate(chosen)])


def _choose(a: Ints, b: Ints, cost: Floats) -> Ints:
    """Positions of the chosen edges of one connected component."""
    from scipy.optimize import linear_sum_assignment

    if len(a) == 1:
        return np.zeros(1, np.int64)
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
    # No edge: costlier than any complete set of edges.
    dense = np.full((len(rows), len(columns)), 4.0 * max(len(rows), len(columns)))
    dense[a, b] = cost
    edge_at = np.full(dense.shape, -1, np.int64)
    edge_at[a, b] = np.arange(len(a))
    edges = edge_at[linear_sum_assignment(dense)]
    return np.asarray(edges[edges >= 0], np.int64)


def angle_between(angle: Floats) -> Floats:
    """Size of an angle difference in radians (any shape), modulo a full turn: 0..π."""
    return np.asarray(np.abs((angle + np.pi) % (2 * np.pi) - np.pi))
