"""IoU of rotated boxes and quadrilaterals in the arithmetic of mmcv's kernels.

The reference is mmcv 2.1.0 `csrc/common/box_iou_rotated_utils.hpp`: the corners of the shared polygon are the crossings
of sides and the corners that lie in the other box; their convex hull is found by Graham's scan. All is in the
precision of the boxes, float32 or float64. A corner counts as inside where its projections on the first and the last
side say so, which is right for rectangles only; for other quadrilaterals the areas are not those of geometry, and may
even exceed the quadrilateral, as they do in the reference.

The reference sorts by angle in two ways, and both are here: insertion, as libstdc++'s `std::sort` does, on the CPU, and
exchange on CUDA. They differ where directions agree to 1e-6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["IOF", "IOU", "half_turns", "pair_ious", "suppress"]

Floats = npt.NDArray[np.floating]
I64 = npt.NDArray[np.int64]
IOU, IOF = 0, 1
# 16 crossings of sides and 4 corners of each box.
MAX_POINTS = 24
# Boxes of a smaller area overlap nothing, and sides with a smaller cross product are parallel.
NOTHING = 1e-14
SAME_DIRECTION, SAME_POINT = 1e-6, 1e-8


@jit
def half_turns(boxes: Floats, half: Floats) -> None:  # pragma: no cover - compiled
    """Fill `half` (N, 2): half the cosine and half the sine of each angle of boxes (N, 5)."""
    for n in range(boxes.shape[0]):
        angle = np.float64(boxes[n, 4])
        half[n, 0], half[n, 1] = np.cos(angle), np.sin(angle)
        half[n, 0] *= half.dtype.type(0.5)
        half[n, 1] *= half.dtype.type(0.5)


@jit
def _place_rotated(
    a: Floats, half_a: Floats, b: Floats, half_b: Floats, p: Floats, q: Floats
) -> None:  # pragma: no cover - compiled
    """Write the corners (4, 2) of both boxes, relative to the midpoint of their centres."""
    two = p.dtype.type(2)
    for axis in range(2):
        middle = np.float64(a[axis] + b[axis]) / 2
        # Rounded to the boxes' precision by being written there.
        p[0, axis], q[0, axis] = np.float64(a[axis]) - middle, np.float64(b[axis]) - middle
    for box, half, out in ((a, half_a, p), (b, half_b, q)):
        x, y, w, h, cos, sin = out[0, 0], out[0, 1], box[2], box[3], half[0], half[1]
        out[0, 0], out[0, 1] = x - sin * h - cos * w, y + cos * h - sin * w
        out[1, 0], out[1, 1] = x + sin * h - cos * w, y - cos * h - sin * w
        out[2, 0], out[2, 1] = two * x - out[0, 0], two * y - out[0, 1]
        out[3, 0], out[3, 1] = two * x - out[1, 0], two * y - out[1, 1]


@jit
def _place_quadrilaterals(a: Floats, b: Floats, p: Floats, q: Floats) -> None:  # pragma: no cover - compiled
    """Write the corners of quadrilaterals (8,), relative to the mean of all corners."""
    for axis in range(2):
        total = a[axis] + b[axis]
        for k in range(1, 4):
            total = total + a[2 * k + axis]
            total = total + b[2 * k + axis]
        middle = np.float64(total) / 8
        for k in range(4):
            p[k, axis] = np.float64(a[2 * k + axis]) - middle
            q[k, axis] = np.float64(b[2 * k + axis]) - middle


@jit
def _quadrilateral_area(p: Floats) -> Any:  # pragma: no cover - compiled
    ax, ay, bx, by = p[1, 0] - p[0, 0], p[1, 1] - p[0, 1], p[2, 0] - p[0, 0], p[2, 1] - p[0, 1]
    cx, cy = p[3, 0] - p[0, 0], p[3, 1] - p[0, 1]
    return (abs(ax * by - bx * ay) + abs(bx * cy - cx * by)) * p.dtype.type(0.5)


@jit
def _append_projected(
    p: Floats, q: Floats, x: Floats, y: Floats, n: int
) -> int:  # pragma: no cover - compiled
    """Append the corners of `p` that project on the first and last side of `q`; return the new count."""
    bx, by = q[1, 0] - q[0, 0], q[1, 1] - q[0, 1]
    dx, dy = q[0, 0] - q[3, 0], q[0, 1] - q[3, 1]
    long, wide = bx * bx + by * by, dx * dx + dy * dy
    for i in range(4):
        px, py = p[i, 0] - q[0, 0], p[i, 1] - q[0, 1]
        along, across = px * bx + py * by, -(px * dx + py * dy)
        if along >= 0 and across >= 0 and along <= long and across <= wide:
            x[n], y[n] = p[i, 0], p[i, 1]
            n += 1
    return n


@jit
def _candidates(p: Floats, q: Floats, x: Floats, y: Floats, crossings: bool) -> int:
    # pragma: no cover - compiled
    """Write the corners of the shared polygon, unordered and with repetitions; return their number."""
    n = 0
    zero, one = p.dtype.type(0), p.dtype.type(1)
    if crossings:
        for i in range(4):
            e = i + 1 if i < 3 else 0
            ux, uy = p[e, 0] - p[i, 0], p[e, 1] - p[i, 1]
            for j in range(4):
                f = j + 1 if j < 3 else 0
                vx, vy = q[f, 0] - q[j, 0], q[f, 1] - q[j, 1]
                det = vx * uy - ux * vy
                if abs(det) <= NOTHING:
                    continue
                wx, wy = q[j, 0] - p[i, 0], q[j, 1] - p[i, 1]
                t = (vx * wy - wx * vy) / det
                s = (ux * wy - wx * uy) / det
                if t >= zero and t <= one and s >= zero and s <= one:
                    x[n], y[n] = p[i, 0] + ux * t, p[i, 1] + uy * t
                    n += 1
    return _append_projected(q, p, x, y, _append_projected(p, q, x, y, n))


@jit
def _before(ax: float, ay: float, bx: float, by: float) -> bool:  # pragma: no cover - compiled
    turn = ax * by - bx * ay
    if abs(turn) < SAME_DIRECTION:
        return bool(ax * ax + ay * ay < bx * bx + by * by)
    return bool(turn > 0)


@jit
def _sort_by_insertion(x: Floats, y: Floats, n: int) -> None:  # pragma: no cover - compiled
    """Sort all but the first as libstdc++ does up to 16 of them; the comparison is not transitive."""
    for i in range(2, n):
        ax, ay = x[i], y[i]
        at = i
        if _before(ax, ay, x[1], y[1]):
            at = 1
            for k in range(i, 1, -1):
                x[k], y[k] = x[k - 1], y[k - 1]
        else:
            while _before(ax, ay, x[at - 1], y[at - 1]):
                x[at], y[at] = x[at - 1], y[at - 1]
                at -= 1
        x[at], y[at] = ax, ay


@jit
def _sort_by_exchange(x: Floats, y: Floats, n: int) -> None:  # pragma: no cover - compiled
    for i in range(1, n - 1):
        for j in range(i + 1, n):
            turn = x[i] * y[j] - x[j] * y[i]
            if turn < -SAME_DIRECTION or (
                abs(turn) < SAME_DIRECTION and x[i] * x[i] + y[i] * y[i] > x[j] * x[j] + y[j] * y[j]
            ):
                x[i], x[j] = x[j], x[i]
                y[i], y[j] = y[j], y[i]


@jit
def _hull_area(x: Floats, y: Floats, n: int, exchange: bool) -> Any:  # pragma: no cover - compiled
    """Compute the area of the convex hull of the first `n` points, which are overwritten."""
    nothing = x.dtype.type(0)
    if n <= 2:
        return nothing
    # 1. The lowest point, of equally low ones the leftmost, comes first and becomes the origin.
    first = 0
    for i in range(1, n):
        if y[i] < y[first] or (y[i] == y[first] and x[i] < x[first]):
            first = i
    ox, oy = x[first], y[first]
    for i in range(n):
        x[i] -= ox
        y[i] -= oy
    x[0], x[first] = x[first], x[0]
    y[0], y[first] = y[first], y[0]
    # 2. The others by direction.
    if exchange:
        _sort_by_exchange(x, y, n)
    else:
        _sort_by_insertion(x, y, n)
    # 3. Graham's scan, from the first point that is not the origin.
    k = 1
    while k < n and not x[k] * x[k] + y[k] * y[k] > SAME_POINT:
        k += 1
    if k == n:
        return nothing
    x[1], y[1] = x[k], y[k]
    m = 2
    for i in range(k + 1, n):
        while m > 1:
            ax, ay = x[i] - x[m - 2], y[i] - y[m - 2]
            bx, by = x[m - 1] - x[m - 2], y[m - 1] - y[m - 2]
            if not ax * by - bx * ay >= 0:
                break
            m -= 1
        x[m], y[m] = x[i], y[i]
        m += 1
    if m <= 2:
        return nothing
    area = nothing
    for i in range(1, m - 1):
        ax, ay, bx, by = x[i] - x[0], y[i] - y[0], x[i + 1] - x[0], y[i + 1] - y[0]
        area += abs(ax * by - bx * ay)
    return area * x.dtype.type(0.5)


@jit
def _bounds(boxes: Floats, rotated: bool) -> npt.NDArray[np.float64]:  # pragma: no cover - compiled
    """Compute least and greatest x and y (N, 4), with room for rounding."""
    out = np.empty((boxes.shape[0], 4))
    for n in range(boxes.shape[0]):
        box = boxes[n]
        if rotated:
            reach = np.sqrt(np.float64(box[2]) * box[2] + np.float64(box[3]) * box[3]) / 2
            for axis in range(2):
                out[n, axis], out[n, 2 + axis] = box[axis] - reach, box[axis] + reach
        else:
            for axis in range(2):
                low, high = min(box[axis], box[2 + axis]), max(box[axis], box[2 + axis])
                out[n, axis] = min(low, box[4 + axis], box[6 + axis])
                out[n, 2 + axis] = max(high, box[4 + axis], box[6 + axis])
        slack = 1e-5 * (abs(out[n, 0]) + abs(out[n, 1]) + abs(out[n, 2]) + abs(out[n, 3]))
        out[n, 0], out[n, 1] = out[n, 0] - slack, out[n, 1] - slack
        out[n, 2], out[n, 3] = out[n, 2] + slack, out[n, 3] + slack
    return out


@jit
def _apart(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:  # pragma: no cover - compiled
    return bool((a[0] > b[2]) | (b[0] > a[2]) | (a[1] > b[3]) | (b[1] > a[3]))


@jit
def _iou(
    a: Floats,
    half_a: Floats,
    b: Floats,
    half_b: Floats,
    far: bool,
    mode: int,
    rotated: bool,
    exchange: bool,
    p: Floats,
    q: Floats,
    x: Floats,
    y: Floats,
) -> Any:  # pragma: no cover - compiled
    """Compute IoU or IoF of two boxes; `p` and `q` (4, 2), `x` and `y` (MAX_POINTS,) are scratch memory."""
    nothing = x.dtype.type(0)
    if rotated:
        area_a, area_b = a[2] * a[3], b[2] * b[3]
        if area_a < NOTHING or area_b < NOTHING or far:
            return nothing
        _place_rotated(a, half_a, b, half_b, p, q)
    else:
        _place_quadrilaterals(a, b, p, q)
        area_a, area_b = _quadrilateral_area(p), _quadrilateral_area(q)
        if area_a < NOTHING or area_b < NOTHING:
            return nothing
    # Sides of quadrilaterals that are apart do not cross, yet a corner may count as inside.
    shared = _hull_area(x, y, _candidates(p, q, x, y, not far), exchange)
    return shared / (area_a if mode == IOF else area_a + area_b - shared)


@jit
def pair_ious(
    a: Floats,
    half_a: Floats,
    b: Floats,
    half_b: Floats,
    mode: int,
    aligned: bool,
    rotated: bool,
    exchange: bool,
    out: Floats,
) -> None:  # pragma: no cover - compiled
    """Fill `out` (N, M), or (N, 1) pair by pair when `aligned`.

    Boxes are (N, 5) when `rotated`, with halves of cosine and sine (N, 2); else they are quadrilaterals (N, 8), and the
    halves are not looked at. All arrays are of one dtype.
    """
    p, x = np.empty((4, 2), dtype=a.dtype), np.empty(MAX_POINTS, dtype=a.dtype)
    q, y = np.empty_like(p), np.empty_like(x)
    around_a, around_b = _bounds(a, rotated), _bounds(b, rotated)
    for i in range(out.shape[0]):
        for column in range(out.shape[1]):
            j = i if aligned else column
            far = _apart(around_a[i], around_b[j])
            out[i, column] = _iou(
                a[i], half_a[i], b[j], half_b[j], far, mode, rotated, exchange, p, q, x, y
            )  # fmt: skip


@jit
def suppress(
    boxes: Floats, half: Floats, threshold: float, inclusive: bool, rotated: bool, exchange: bool
) -> I64:  # pragma: no cover - compiled
    """Return the rows of boxes, best first, whose IoU with kept ones is not above (`inclusive`: at) `threshold`."""
    n = boxes.shape[0]
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    p, x = np.empty((4, 2), dtype=boxes.dtype), np.empty(MAX_POINTS, dtype=boxes.dtype)
    q, y = np.empty_like(p), np.empty_like(x)
    around = _bounds(boxes, rotated)
    skip = rotated and threshold > 0
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        for j in range(i + 1, n):
            if dropped[j]:
                continue
            far = _apart(around[i], around[j])
            if far and skip:
                continue
            iou = _iou(
                boxes[i], half[i], boxes[j], half[j], far, IOU, rotated, exchange, p, q, x, y
            )  # fmt: skip
            dropped[j] = iou > threshold or (inclusive and iou == threshold)
    return keep[:kept]
