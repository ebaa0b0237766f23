"""Bird's-eye-view overlap of upright 3D boxes in the arithmetic of mmcv's CUDA kernel.

The reference is mmcv 2.1.0 `csrc/common/cuda/iou3d_cuda_kernel.cuh`, which has no CPU version: float32 throughout,
corners up to `MARGIN` outside of the other box count as inside it, and the polygon is put in order by angle around the
mean of its corners. Results for boxes that nearly touch therefore differ from exact geometry by up to
`MARGIN` times the length of a side, and models are tuned to those results.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["bev_corners", "bev_overlaps", "suppress_bev", "suppress_unrotated"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
# Metres beyond its sides within which a box claims a corner of the other one.
MARGIN = np.float32(1e-2)
EPSILON = np.float32(1e-8)
# 16 crossings of sides and 4 corners of each box.
MAX_POINTS = 24
# Columns of a frame: centre, extended half sizes, cosine and sine, reach.
X, Y, HALF_X, HALF_Y, COS, SIN, REACH = range(7)


@jit
def bev_corners(boxes: F32, corners: F32, frames: F32) -> None:  # pragma: no cover - compiled
    """Fill the corners (N, 4, 2) and the frames (N, 7) of boxes (N, 7): x, y, z, dx, dy, dz, heading."""
    half = np.float32(0.5)
    for n in range(boxes.shape[0]):
        x, y = boxes[n, 0], boxes[n, 1]
        hx, hy = boxes[n, 3] * half, boxes[n, 4] * half
        cos, sin = np.cos(boxes[n, 6]), np.sin(boxes[n, 6])
        for k in range(4):
            px = x + hx if k == 1 or k == 2 else x - hx
            py = y + hy if k >= 2 else y - hy
            corners[n, k, 0] = (px - x) * cos - (py - y) * sin + x
            corners[n, k, 1] = (px - x) * sin + (py - y) * cos + y
        frames[n, X], frames[n, Y] = x, y
        frames[n, HALF_X], frames[n, HALF_Y] = hx + MARGIN, hy + MARGIN
        frames[n, COS], frames[n, SIN] = cos, sin
        # How far from the centre a shared point can be, rounding of the coordinates included.
        reach = np.sqrt(np.float64(hx) * hx + np.float64(hy) * hy) + 0.03
        frames[n, REACH] = reach * 1.001 + 2e-6 * (abs(x) + abs(y))


@jit
def _apart(a: F32, b: F32) -> bool:  # pragma: no cover - compiled
    """Return whether two boxes, given by their frames, are too far apart to share a point."""
    dx, dy = np.float64(a[X]) - b[X], np.float64(a[Y]) - b[Y]
    reach = np.float64(a[REACH]) + b[REACH]
    return bool(dx * dx + dy * dy > reach * reach)


@jit
def _turn(p1x: float, p1y: float, p2x: float, p2y: float, ox: float, oy: float) -> float:
    # pragma: no cover - compiled
    """Compute the cross product of p1 - o and p2 - o."""
    return (p1x - ox) * (p2y - oy) - (p2x - ox) * (p1y - oy)


@jit
def _crossing(a: F32, i: int, b: F32, j: int, x: F32, y: F32, n: int) -> int:  # pragma: no cover - compiled
    """Append the point in which side i of `a` (4, 2) crosses side j of `b`, if any; return the new count."""
    e, f = (i + 1) % 4, (j + 1) % 4
    ax, ay, bx, by = a[i, 0], a[i, 1], a[e, 0], a[e, 1]
    cx, cy, dx, dy = b[j, 0], b[j, 1], b[f, 0], b[f, 1]
    if not (
        min(ax, bx) <= max(cx, dx)
        and min(cx, dx) <= max(ax, bx)
        and min(ay, by) <= max(cy, dy)
        and min(cy, dy) <= max(ay, by)
    ):
        return n
    s1, s2 = _turn(cx, cy, bx, by, ax, ay), _turn(bx, by, dx, dy, ax, ay)
    s3, s4 = _turn(ax, ay, dx, dy, cx, cy), _turn(dx, dy, bx, by, cx, cy)
    if not (s1 * s2 > 0 and s3 * s4 > 0):
        return n
    s5 = _turn(dx, dy, bx, by, ax, ay)
    if abs(s5 - s1) > EPSILON:
        x[n] = (s5 * cx - s1 * dx) / (s5 - s1)
        y[n] = (s5 * cy - s1 * dy) / (s5 - s1)
    else:
        a0, b0, c0 = ay - by, bx - ax, ax * by - bx * ay
        a1, b1, c1 = cy - dy, dx - cx, cx * dy - dx * cy
        det = a0 * b1 - a1 * b0
        x[n] = (b0 * c1 - b1 * c0) / det
        y[n] = (a1 * c0 - a0 * c1) / det
    return n + 1


@jit
def _claims(frame: F32, x: float, y: float) -> bool:  # pragma: no cover - compiled
    dx, dy = x - frame[X], y - frame[Y]
    along = dx * frame[COS] + dy * frame[SIN]
    across = dx * -frame[SIN] + dy * frame[COS]
    return bool(abs(along) < frame[HALF_X] and abs(across) < frame[HALF_Y])


@jit
def _overlap(a: F32, frame_a: F32, b: F32, frame_b: F32, x: F32, y: F32, angle: F32) -> np.float32:
    # pragma: no cover - compiled
    """Compute the area in float32; `x`, `y` and `angle` (MAX_POINTS,) are scratch memory."""
    n = 0
    for i in range(4):
        for j in range(4):
            n = _crossing(a, i, b, j, x, y, n)
    for k in range(4):
        if _claims(frame_a, b[k, 0], b[k, 1]):
            x[n], y[n] = b[k, 0], b[k, 1]
            n += 1
        if _claims(frame_b, a[k, 0], a[k, 1]):
            x[n], y[n] = a[k, 0], a[k, 1]
            n += 1
    mean_x, mean_y = np.float32(0), np.float32(0)
    for k in range(n):
        mean_x += x[k]
        mean_y += y[k]
    mean_x /= np.float32(n)
    mean_y /= np.float32(n)
    # Equal angles keep their order, as in the reference's exchange of neighbours.
    for k in range(n):
        angle[k] = np.arctan2(y[k] - mean_y, x[k] - mean_x)
        at, turn, px, py = k, angle[k], x[k], y[k]
        while at > 0 and angle[at - 1] > turn:
            angle[at], x[at], y[at] = angle[at - 1], x[at - 1], y[at - 1]
            at -= 1
        angle[at], x[at], y[at] = turn, px, py
    area = np.float32(0)
    for k in range(n - 1):
        area += (x[k] - x[0]) * (y[k + 1] - y[0]) - (y[k] - y[0]) * (x[k + 1] - x[0])
    return abs(area) * np.float32(0.5)


@jit
def bev_overlaps(
    a: F32, frames_a: F32, b: F32, frames_b: F32, out: F32
) -> None:  # pragma: no cover - compiled
    """Write into `out` (N, M) the areas in square metres; arguments as `bev_corners` fills them."""
    x = np.empty(MAX_POINTS, dtype=np.float32)
    y, angle = np.empty_like(x), np.empty_like(x)
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            if _apart(frames_a[i], frames_b[j]):
                out[i, j] = 0
            else:
                out[i, j] = _overlap(a[i], frames_a[i], b[j], frames_b[j], x, y, angle)


@jit
def suppress_bev(
    boxes: F32, corners: F32, frames: F32, threshold: np.float32
) -> I64:  # pragma: no cover - compiled
    """Return the rows of boxes (N, 7), best first, that no kept one overlaps by an IoU above `threshold`."""
    n = boxes.shape[0]
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    x = np.empty(MAX_POINTS, dtype=np.float32)
    y, angle = np.empty_like(x), np.empty_like(x)
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        area = boxes[i, 3] * boxes[i, 4]
        for j in range(i + 1, n):
            # An IoU of zero is above no threshold that is not negative.
            if dropped[j] or (threshold >= 0 and _apart(frames[i], frames[j])):
                continue
            shared = _overlap(corners[i], frames[i], corners[j], frames[j], x, y, angle)
            union = area + boxes[j, 3] * boxes[j, 4] - shared
            dropped[j] = shared / (union if union > EPSILON else EPSILON) > threshold
    return keep[:kept]


@jit
def suppress_unrotated(boxes: F32, threshold: np.float32) -> I64:  # pragma: no cover - compiled
    """Suppress as `suppress_bev` with all headings zero and no margin."""
    n = boxes.shape[0]
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    half, zero = np.float32(0.5), np.float32(0)
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        left, right = boxes[i, 0] - boxes[i, 3] * half, boxes[i, 0] + boxes[i, 3] * half
        top, bottom = boxes[i, 1] - boxes[i, 4] * half, boxes[i, 1] + boxes[i, 4] * half
        area = boxes[i, 3] * boxes[i, 4]
        for j in range(i + 1, n):
            if dropped[j]:
                continue
            hx, hy = boxes[j, 3] * half, boxes[j, 4] * half
            width = max(min(right, boxes[j, 0] + hx) - max(left, boxes[j, 0] - hx), zero)
            height = max(min(bottom, boxes[j, 1] + hy) - max(top, boxes[j, 1] - hy), zero)
            shared = width * height
            union = area + boxes[j, 3] * boxes[j, 4] - shared
            dropped[j] = shared / (union if union > EPSILON else EPSILON) > threshold
    return keep[:kept]
