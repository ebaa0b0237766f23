"""The order of the corners of the overlap of two rectangles, in the comparisons of mmcv's kernel.

The reference is mmcv 2.1.0 `csrc/common/cuda/diff_iou_rotated_cuda_kernel.cuh`, float32, which has no CPU version. Its
comparison is not an order: corners on the x axis come before none, and one that coincides with another is not found, so
that the first candidate takes its place. Areas in training are computed from just those rings.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["INTERSECTIONS_FROM", "MOST_CORNERS", "order_vertices"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# Of the 24 candidate corners of the overlap of two rectangles the first 8 are corners of one of them.
INTERSECTIONS_FROM = 8
# Corners of the overlap of two rectangles, and the first once more.
MOST_CORNERS = 8
EPSILON = 1e-8


@jit
def _before(x1: np.float32, y1: np.float32, x2: np.float32, y2: np.float32) -> bool:
    # pragma: no cover - compiled
    """Whether corner 1 comes before corner 2, from the x axis towards the y axis."""
    if abs(x1 - x2) < EPSILON and abs(y2 - y1) < EPSILON:
        return False
    if y1 > 0 and y2 < 0:
        return True
    if y1 < 0 and y2 > 0:
        return False
    n1, n2 = np.float32(x1 * x1 + y1 * y1 + EPSILON), np.float32(x2 * x2 + y2 * y2 + EPSILON)
    more = abs(x1) * x1 / n1 - abs(x2) * x2 / n2
    if y1 > 0 and y2 > 0:
        return bool(more > EPSILON)
    # Below the axis directions that are alike come before each other.
    return bool(y1 < 0 and y2 < 0 and more < EPSILON)


@jit
def order_vertices(vertices: F32, mask: U8, number: I32, ring: I32) -> None:  # pragma: no cover - compiled
    """Fill the rings (R, 9) of corners (R, V, 2), of which `number` (R,), at most 8, are valid by `mask` (R, V)."""
    for row in range(vertices.shape[0]):
        count = vertices.shape[1]
        pad = INTERSECTIONS_FROM
        for k in range(count - 1, INTERSECTIONS_FROM - 1, -1):
            if not mask[row, k]:
                pad = k
        ring[row, :] = pad
        valid = number[row]
        if valid < 3 or valid > MOST_CORNERS:
            continue
        for place in range(valid):
            x, y, taken = np.float32(1), np.float32(-EPSILON), 0
            last = ring[row, place - 1] if place > 0 else 0
            for k in range(count):
                u, v = vertices[row, k, 0], vertices[row, k, 1]
                if not mask[row, k] or not _before(u, v, x, y):
                    continue
                if place == 0 or _before(vertices[row, last, 0], vertices[row, last, 1], u, v):
                    x, y, taken = u, v, k
            ring[row, place] = taken
        ring[row, valid] = ring[row, 0]
        # Two boxes that are the same have each corner twice: the second round is cut off.
        if valid == MOST_CORNERS:
            again = 0
            for place in range(4):
                for k in range(4, MOST_CORNERS):
                    again += ring[row, k] == ring[row, place]
            if again == 4:
                ring[row, 4] = ring[row, 0]
                ring[row, 5:] = pad
