"""Synthetic LiDAR scenes in KITTI's axes and file format, with ground-truth boxes, from a seed.

`generate_scene` draws a street (`serve.synthetic.layout`), fires a 64-beam LiDAR into it (`serve.synthetic.raycast`)
and counts the returns in every box. The demo SECOND was trained on these scenes and is measured on
others of them; the two sets of seeds are disjoint by construction (`training_seed`, `held_out_seed`).

Results on these scenes do not transfer to real streets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.layout import CLASSES, Layout, draw_layout
from serve.synthetic.raycast import cast

__all__ = [
    "CLASSES",
    "SAMPLE_SEED",
    "Scene",
    "generate_scene",
    "held_out_seed",
    "observe_layout",
    "points_in_boxes",
    "sample_frame",
    "sample_scene",
    "training_seed",
]

_HELD_OUT_BASE = 1_000_000
SAMPLE_SEED = 2_000_056


@dataclass(frozen=True, slots=True)
class Scene:
    """One frame and its ground truth.

    Attributes:
        points: (N, 4) float32 x forward, y left, z up in metres from the sensor, intensity in [0, 1].
        boxes: (M, 7) float32 x, y, z of the bottom centre, dx, dy, dz in metres, yaw in radians
            counter-clockwise from x (mmdet3d's ``LiDARInstance3DBoxes``). Only objects with a return.
        labels: (M,) int64 index into `CLASSES`.
        points_in_box: (M,) int64 points that lie inside each box.
        source: (N,) int64 row of ``boxes`` whose object a point is from, -1 ground, -2 anything unlabelled.
    """

    points: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    points_in_box: NDArray[np.int64]
    source: NDArray[np.int64]

    def to_bytes(self) -> bytes:
        """Encode the point cloud as a KITTI ``.bin``: little-endian float32, 4 per point."""
        return self.points.astype("<f4").tobytes()

    def summary(self) -> str:
        """One line: how many points, and how many objects of each class."""
        counts = ", ".join(f"{int((self.labels == i).sum())} {name}" for i, name in enumerate(CLASSES))
        return f"{len(self.points)} points; {counts}"

    def ground_truth_json(self) -> str:
        """JSON of ``bboxes_3d``, ``labels_3d``, ``names``, ``points_in_box`` and ``box_type_3d``."""
        return json.dumps(
            {
                "bboxes_3d": [[round(float(v), 4) for v in box] for box in self.boxes],
                "labels_3d": self.labels.tolist(),
                "names": [CLASSES[int(i)] for i in self.labels],
                "points_in_box": self.points_in_box.tolist(),
                "box_type_3d": "LiDAR",
            }
        )


def points_in_boxes(points: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points (N, >=3) lie in which boxes (M, 7; bottom centre, m, rad): (N, M) bool, borders count."""
    p, b = points[:, None, :3].astype(np.float64), boxes[None].astype(np.float64)
    x, y, z = (p[..., i] - b[..., i] for i in range(3))
    cos, sin = np.cos(b[..., 6]), np.sin(b[..., 6])
    along, across = cos * x + sin * y, cos * y - sin * x
    inside: NDArray[np.bool_] = (
        (np.abs(along) <= b[..., 3] / 2) & (np.abs(across) <= b[..., 4] / 2) & (z >= 0) & (z <= b[..., 5])
    )
    return inside


def training_seed(index: int) -> int:
    """Seed of the ``index``-th training scene (0 <= index < 1,000,000)."""
    if not 0 <= index < _HELD_OUT_BASE:
        raise ValueError(f"training scenes are numbered 0 to {_HELD_OUT_BASE - 1}, not {index}")
    return index


def held_out_seed(index: int) -> int:
    """Seed of the ``index``-th held-out scene (0 <= index < 1,000,000); never a training seed."""
    if not 0 <= index < _HELD_OUT_BASE:
        raise ValueError(f"held-out scenes are numbered 0 to {_HELD_OUT_BASE - 1}, not {index}")
    return _HELD_OUT_BASE + index


def generate_scene(seed: int) -> Scene:
    """Generate the scene of a seed (any integer >= 0), the same on every call."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return observe_layout(draw_layout(rng), rng)[0]


def observe_layout(layout: Layout, rng: np.random.Generator) -> tuple[Scene, NDArray[np.int64]]:
    """Fire the LiDAR into a layout.

    Returns:
        The scene, and (M,) the position in `Layout.objects` of the object of each of its boxes.
    """
    returns = cast(layout.ground, [item.solids for item in layout.objects] + layout.clutter, rng)
    count = len(layout.objects)
    points = returns.points.astype(np.float32)
    hits = np.bincount(returns.source[(returns.source >= 0) & (returns.source < count)], minlength=count)
    seen = np.flatnonzero(hits > 0)
    boxes = np.array([layout.objects[i].box for i in seen], dtype=np.float32).reshape(-1, 7)
    labels = np.array([layout.objects[i].label for i in seen], dtype=np.int64)
    inside = points_in_boxes(points, boxes).sum(axis=0).astype(np.int64)
    row = np.full(count + 1, -2, dtype=np.int64)
    row[seen] = np.arange(len(seen))
    source = np.where(returns.source < 0, -1, row[np.minimum(np.maximum(returns.source, 0), count)])
    keep = inside > 0
    if not keep.all():
        remap = np.where(keep, np.cumsum(keep) - 1, -2)
        source = np.where(source >= 0, remap[np.maximum(source, 0)], source)
    return Scene(points, boxes[keep], labels[keep], inside[keep], source), seen[keep]


def sample_scene() -> Scene:
    """Generate the fixed scene that the demo serves, neither a training nor a held-out scene.

    Its seed is the first from 2,000,000 on with at least 15,000 points, and five cars (one within 15 m), two
    pedestrians and a cyclist of at least 60 returns each within 48 m ahead and 30 m to the sides.
    """
    return generate_scene(SAMPLE_SEED)


def sample_frame() -> bytes:
    """`sample_scene` as the bytes of a KITTI ``.bin`` (float32, 4 per point)."""
    return sample_scene().to_bytes()
