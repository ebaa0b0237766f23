"""Convex hulls of nine points: their smallest rectangles, and their IoU with quadrilaterals, as in mmcv's kernels.

The references are mmcv 2.1.0 `csrc/common/cuda/min_area_polygons_cuda.cuh`, in float32, and
`convex_iou_cuda_kernel.cuh`, in float64 with lengths and areas below `EPSILON` taken as zero. They exist for CUDA only.
Hulls are found by gift wrapping from the lowest to the highest point, along both sides. The overlap of two polygons is
the sum over pairs of sides of the signed overlaps of the triangles that they have with the coordinate origin: the
gradient carries the derivatives of each corner through the cuts of those triangles. So a hull in which points coincide
or lie on one line, and polygons with common corners, get the gradient that the reference picks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["POINTS", "hull_gious", "hull_ious", "smallest_rectangles"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
POINTS = 9
EPSILON = 1e-8
# Most corners of a hull around both polygons, and of a triangle cut three times (twice as many each time at worst).
MOST_HULL, MOST_CUT = 16, 24
# π and the largest area as the reference writes them, in float32.
PI = np.float32(3.1415926)
HUGE = np.float32(1e12)


@jit
def _turn(o: Floats, a: Floats, b: Floats) -> Any:  # pragma: no cover - compiled
    """Compute the cross product of a - o and b - o."""
    return (a[0] - o[0]) * (b[1] - o[1]) - (b[0] - o[0]) * (a[1] - o[1])


@jit
def _distance(a: Floats, b: Floats) -> Any:  # pragma: no cover - compiled
    return (a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1])


@jit
def _sign(value: float) -> int:  # pragma: no cover - compiled
    return int(value > EPSILON) - int(value < -EPSILON)


@jit
def _same(a: F64, b: F64) -> bool:  # pragma: no cover - compiled
    return bool(_sign(a[0] - b[0]) == 0 and _sign(a[1] - b[1]) == 0)


@jit
def _chain(points: Floats, n: int, top: int, side: int, chain: I64) -> int:  # pragma: no cover - compiled
    """List the corners from row 0, the lowest, to row `top` along the right (`side` 1) or the left (-1)."""
    chain[0] = 0
    length, at = 1, 0
    # Points that are no numbers would never lead to the top.
    while at != top and length < chain.shape[0]:
        last, at = chain[length - 1], top
        for i in range(1, n):
            turn = side * _turn(points[last], points[i], points[at])
            if turn > 0 or (
                turn == 0 and _distance(points[last], points[i]) > _distance(points[last], points[at])
            ):
                at = i
        chain[length] = at
        length += 1
    return length


@jit
def _wrap(points: Floats, n: int, hull: Floats) -> int:  # pragma: no cover - compiled
    """Write the hull of the first `n` points, which are reordered, counter-clockwise; return its size."""
    # The lowest point, of equally low ones the leftmost, goes to row 0. If the highest was there, it is in row 1 then.
    top = 0
    high_x, high_y = points[0, 0], points[0, 1]
    for i in range(n):
        if points[i, 1] < points[0, 1] or (points[i, 1] == points[0, 1] and points[i, 0] < points[0, 0]):
            for axis in range(2):
                points[0, axis], points[i, axis] = points[i, axis], points[0, axis]
        if points[i, 1] > high_y or (points[i, 1] == high_y and points[i, 0] > high_x):
            high_x, high_y, top = points[i, 0], points[i, 1], i
    top = max(top, 1)
    right, left = np.empty(MOST_HULL, dtype=np.int64), np.empty(MOST_HULL, dtype=np.int64)
    going_up, going_down = _chain(points, n, top, 1, right), _chain(points, n, top, -1, left)
    corners = 0
    for i in range(going_up):
        hull[corners] = points[right[i]]
        corners += 1
    for i in range(going_down - 2, 0, -1):
        hull[corners] = points[left[i]]
        corners += 1
    return corners


@jit
def _area(polygon: F64, n: int) -> float:  # pragma: no cover - compiled
    total = 0.0
    for i in range(n):
        j = i + 1 if i + 1 < n else 0
        total += polygon[i, 0] * polygon[j, 1] - polygon[i, 1] * polygon[j, 0]
    return total / 2


@jit
def _area_slope(polygon: F64, n: int, i: int) -> tuple[float, float]:  # pragma: no cover - compiled
    """Compute the derivatives of `_area` by x and y of corner i."""
    before, after = i - 1 if i > 0 else n - 1, i + 1 if i + 1 < n else 0
    return (polygon[after, 1] - polygon[before, 1]) / 2, (polygon[before, 0] - polygon[after, 0]) / 2


@jit
def _reverse(polygon: F64, n: int) -> None:  # pragma: no cover - compiled
    for i in range(n // 2):
        for axis in range(2):
            polygon[i, axis], polygon[n - 1 - i, axis] = polygon[n - 1 - i, axis], polygon[i, axis]


@jit
def _cut(p: F64, by: F64, n: int, a: F64, b: F64, q: F64, by_q: F64) -> int:  # pragma: no cover - compiled
    """Keep the part of the polygon `p` (n corners) left of the line from `a` to `b`; return its size.

    ``by[i]`` (2, 4) holds the derivatives of corner i by the four coordinates of the uncut triangle; `q` and `by_q` are
    scratch memory.
    """
    m = 0
    for i in range(n):
        j = i + 1 if i + 1 < n else 0
        s1, s2 = _turn(a, b, p[i]), _turn(a, b, p[j])
        if _sign(s1) > 0:
            q[m], by_q[m] = p[i], by[i]
            m += 1
        if _sign(s1) == _sign(s2):
            continue
        step = s2 - s1
        if _sign(step) == 0:
            # The reference leaves the corner unwritten.
            q[m], by_q[m] = p[i], by[i]
            m += 1
            continue
        # Derivatives of s1 by p[i], and of s2 by p[j].
        dx, dy = -(b[1] - a[1]), b[0] - a[0]
        for axis in range(2):
            c, d = p[i, axis], p[j, axis]
            top = c * s2 - d * s1
            q[m, axis] = top / step
            own = s2 if axis == 0 else 0.0
            c_x = ((own - d * dx) * step + top * dx) / (step * step)
            own = s2 if axis == 1 else 0.0
            c_y = ((own - d * dy) * step + top * dy) / (step * step)
            own = s1 if axis == 0 else 0.0
            d_x = ((c * dx - own) * step - top * dx) / (step * step)
            own = s1 if axis == 1 else 0.0
            d_y = ((c * dy - own) * step - top * dy) / (step * step)
            for k in range(4):
                by_q[m, axis, k] = (
                    c_x * by[i, 0, k] + c_y * by[i, 1, k] + d_x * by[j, 0, k] + d_y * by[j, 1, k]
                )
        m += 1
    n = 0
    for i in range(m):
        if i == 0 or not _same(q[i], q[i - 1]):
            p[n], by[n] = q[i], by_q[i]
            n += 1
    while n > 1 and _same(p[n - 1], p[0]):
        n -= 1
    return n


@jit
def _shared(
    hull: F64, n: int, quadrilateral: F64, slope: F64, p: F64, by: F64, q: F64, by_q: F64
) -> float:  # pragma: no cover - compiled
    """Compute the shared area; add its derivatives by the corners of the hull to `slope` (n, 2).

    Both are turned counter-clockwise in place; the other arrays are scratch memory.
    """
    if _area(hull, n) < 0:
        _reverse(hull, n)
    if _area(quadrilateral, 4) < 0:
        _reverse(quadrilateral, 4)
    origin = np.zeros(2)
    total = 0.0
    for i in range(n):
        a, b = hull[i], hull[i + 1 if i + 1 < n else 0]
        side = _sign(_turn(origin, a, b))
        if side == 0:
            continue
        for j in range(4):
            c, d = quadrilateral[j], quadrilateral[j + 1 if j < 3 else 0]
            other = _sign(_turn(origin, c, d))
            if other == 0:
                continue
            # The triangles (origin, a, b) and (origin, c, d), both counter-clockwise.
            p[0], p[1], p[2] = origin, a if side > 0 else b, b if side > 0 else a
            by[:3] = 0
            by[1, 0, 0] = by[1, 1, 1] = by[2, 0, 2] = by[2, 1, 3] = 1
            start, end = (c, d) if other > 0 else (d, c)
            m = _cut(p, by, 3, origin, start, q, by_q)
            m = _cut(p, by, m, start, end, q, by_q)
            m = _cut(p, by, m, end, origin, q, by_q)
            sign = side * other
            total += sign * _area(p, m)
            for corner in range(m):
                by_x, by_y = _area_slope(p, m, corner)
                for k in range(4):
                    # Columns 0 and 1 belong to the corner that came first.
                    row = i if (k < 2) == (side > 0) else (i + 1 if i + 1 < n else 0)
                    slope[row, k % 2] += sign * (by_x * by[corner, 0, k] + by_y * by[corner, 1, k])
    return total


@jit
def _around(hull: F64, n: int, quadrilateral: F64, slope: F64, points: F64, outer: F64) -> float:
    # pragma: no cover - compiled
    """Compute the area of the hull of both; write its derivatives by the corners of `hull` to `slope` (n, 2).

    `quadrilateral` is overwritten, `points` and `outer` are scratch memory.
    """
    # Corners that both have are taken once.
    left = 4
    for i in range(n):
        for j in range(4):
            if _same(hull[i], quadrilateral[j]):
                for k in range(j, 3):
                    quadrilateral[k] = quadrilateral[k + 1]
                left -= 1
                break
    count = n + max(left, 0)
    for i in range(count):
        points[i] = hull[i] if i < n else quadrilateral[i - n]
    corners = _wrap(points, count, outer)
    area = _area(outer, corners)
    for i in range(corners):
        for j in range(n):
            if outer[i, 0] == hull[j, 0] and outer[i, 1] == hull[j, 1]:
                by_x, by_y = _area_slope(outer, corners, i)
                slope[j, 0], slope[j, 1] = (by_x, by_y) if area >= 0 else (-by_x, -by_y)
                break
    return abs(area)


@jit
def hull_ious(points: F64, quadrilaterals: F64, out: F32) -> None:  # pragma: no cover - compiled
    """Write the IoU of the hull of each set of points (N, 9, 2) with each of (K, 4, 2) into `out` (N, K)."""
    hull, other = np.empty((2 * MOST_HULL, 2)), np.empty((4, 2))
    p, by, q, by_q = _scratch()
    slope = np.empty((2 * MOST_HULL, 2))
    for i in range(points.shape[0]):
        n = _wrap(points[i].copy(), POINTS, hull)
        for j in range(quadrilaterals.shape[0]):
            other[:] = quadrilaterals[j]
            shared = _shared(hull, n, other, slope, p, by, q, by_q)
            out[i, j] = shared / (abs(_area(hull, n)) + abs(_area(other, 4)) - shared)


@jit
def hull_gious(points: F64, quadrilaterals: F64, out: F32) -> None:  # pragma: no cover - compiled
    """Write the derivatives of the generalized IoU by the 18 coordinates, and the IoU itself, into `out` (N, 19).

    Args:
        points: (N, 9, 2).
        quadrilaterals: (N, 4, 2), paired with them.
        out: zeros.
    """
    hull, other = np.empty((2 * MOST_HULL, 2)), np.empty((4, 2))
    spare, outer = np.empty((2 * MOST_HULL, 2)), np.empty((2 * MOST_HULL, 2))
    p, by, q, by_q = _scratch()
    by_shared, by_outer = np.empty((2 * MOST_HULL, 2)), np.empty((2 * MOST_HULL, 2))
    for row in range(points.shape[0]):
        n = _wrap(points[row].copy(), POINTS, hull)
        places = np.full(2 * MOST_HULL, -1, dtype=np.int64)
        for i in range(n):
            for j in range(POINTS):
                if _same(hull[i], points[row, j]):
                    places[i] = j
                    break
        by_shared[:], by_outer[:] = 0, 0
        other[:] = quadrilaterals[row]
        shared = _shared(hull, n, other, by_shared, p, by, q, by_q)
        own = _area(hull, n)
        union = abs(own) + abs(_area(other, 4)) - shared
        iou = shared / union
        around = _around(hull, n, other, by_outer, spare, outer)
        for i in range(n):
            slopes = _area_slope(hull, n, i)
            for axis in range(2):
                by_own = slopes[axis] if own >= 0 else -slopes[axis]
                if places[i] >= 0:
                    out[row, 2 * places[i] + axis] = (
                        (union + shared) / (union * union) * by_shared[i, axis]
                        - iou / union * by_own
                        - 1 / around * (by_shared[i, axis] - by_own)
                        - union / around / around * by_outer[i, axis]
                    )
        out[row, 18] = iou - (around - union) / around


@jit
def _scratch() -> tuple[F64, F64, F64, F64]:  # pragma: no cover - compiled
    """Allocate corners and their derivatives, twice."""
    return (
        np.empty((MOST_CUT, 2)), np.empty((MOST_CUT, 2, 4)), np.empty((MOST_CUT, 2)), np.empty((MOST_CUT, 2, 4)),
    )  # fmt: skip


@jit
def _angle(dx: np.float32, dy: np.float32) -> np.float32:  # pragma: no cover - compiled
    """Compute the angle of a side modulo a quarter turn; a negative one may end in the second quarter."""
    angle = np.float32(np.arctan2(np.float64(dy), np.float64(dx)))
    quarter = np.float32(PI / np.float32(2))
    if angle >= 0:
        return np.float32(np.fmod(np.float64(angle), np.float64(PI) / 2))
    turns = np.float32(int(np.float32(angle / quarter) - np.float32(1)))
    return np.float32(angle - np.float32(turns * quarter))


@jit
def smallest_rectangles(points: F32, out: F32) -> None:  # pragma: no cover - compiled
    """Write the corners of the smallest rectangle around each set of points (N, 9, 2) into `out` (N, 8)."""
    hull = np.empty((2 * MOST_HULL, 2), dtype=np.float32)
    for row in range(points.shape[0]):
        n = _wrap(points[row].copy(), POINTS, hull)
        least = HUGE
        angle, x0, y0, x1, y1 = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(n):
            j = i + 1 if i + 1 < n else 0
            turn = _angle(hull[j, 0] - hull[i, 0], hull[j, 1] - hull[i, 1])
            cos, sin = np.cos(turn), np.sin(turn)
            low_x, low_y, high_x, high_y = HUGE, HUGE, -HUGE, -HUGE
            for k in range(n):
                x = cos * hull[k, 0] + sin * hull[k, 1]
                y = -sin * hull[k, 0] + cos * hull[k, 1]
                # Infinite and undefined coordinates do not count.
                if np.isfinite(x):
                    low_x, high_x = min(low_x, x), max(high_x, x)
                if np.isfinite(y):
                    low_y, high_y = min(low_y, y), max(high_y, y)
            area = (high_x - low_x) * (high_y - low_y)
            if area < least:
                least, angle, x0, y0, x1, y1 = area, turn, low_x, low_y, high_x, high_y
        cos, sin = np.cos(angle), np.sin(angle)
        for k in range(4):
            x = x1 if k == 0 or k == 3 else x0
            y = y0 if k < 2 else y1
            out[row, 2 * k] = x * cos + y * -sin
            out[row, 2 * k + 1] = x * sin + y * cos
