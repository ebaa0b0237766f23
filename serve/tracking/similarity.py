"""Similarity of boxes in space: generalised IoU of turned boxes.

Generalised IoU is that of H. Rezatofighi et al., *Generalized Intersection over Union*, CVPR 2019: IoU less the share
of the common hull that neither box covers, from -1 to 1. It goes on falling where boxes are apart, which matters for
fast objects between two frames.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["space_gious"]

Floats = NDArray[np.float64]
_CORNERS = np.array([(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)])


def space_gious(one: Floats, two: Floats, least: float = -1.0) -> Floats:
    """Generalised IoU of boxes x, y, z of the bottom centre, dx, dy, dz and yaw about z.

    Args:
        one: (N, 7) metres and radians.
        two: (M, 7).
        least: pairs that are too far apart to reach it are not computed.

    Returns:
        (N, M) from -1 to 1; -1 for pairs that were not computed.
    """
    found = np.full((len(one), len(two)), -1.0)
    reach = (np.hypot(one[:, 3], one[:, 4])[:, None] + np.hypot(two[:, 3], two[:, 4])[None]) / 2
    apart = np.hypot(one[:, None, 0] - two[None, :, 0], one[:, None, 1] - two[None, :, 1])
    # Boxes apart reach `least` while their hull is at most their volumes over 1 + least, and a hull is no smaller than
    # the distance of the centres times the shortest side and the greater height.
    volumes = (one[:, 3:6].prod(1)[:, None] + two[:, 3:6].prod(1)[None]) / max(1 + least, 1e-9)
    narrow = np.minimum(one[:, 3:5].min(1)[:, None], two[:, 3:5].min(1)[None])
    high = np.maximum(one[:, 5][:, None], two[:, 5][None])
    near = np.argwhere(apart <= np.maximum(reach, volumes / np.maximum(narrow * high, 1e-9)))
    if not len(near):
        return found
    corners, others = _corners(one), _corners(two)
    for i, j in near.tolist():
        top = min(one[i, 2] + one[i, 5], two[j, 2] + two[j, 5])
        span = max(one[i, 2] + one[i, 5], two[j, 2] + two[j, 5]) - min(one[i, 2], two[j, 2])
        shared = 0.0
        if (tall := top - max(one[i, 2], two[j, 2])) > 0 and apart[i, j] < reach[i, j]:
            shared = cv2.intersectConvexConvex(corners[i], others[j])[0] * tall
        union = one[i, 3:6].prod() + two[j, 3:6].prod() - shared
        hull = cv2.contourArea(cv2.convexHull(np.concatenate([corners[i], others[j]]))) * span
        found[i, j] = shared / max(union, 1e-9) - max(hull - union, 0.0) / max(hull, 1e-9)
    return found


def _corners(boxes: Floats) -> NDArray[np.float32]:
    """Corners of boxes from above, (N, 4, 2), counter-clockwise."""
    local = _CORNERS * boxes[:, None, 3:5]
    cosine, sine = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    turned = np.stack(
        [cosine * local[..., 0] - sine * local[..., 1], sine * local[..., 0] + cosine * local[..., 1]],
        axis=-1,
    )
    return np.asarray(turned + boxes[:, None, :2], np.float32)
