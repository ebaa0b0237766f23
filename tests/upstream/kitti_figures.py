"""Print KITTI's figures of made predictions as JSON: ``python -m tests.upstream.kitti_figures [--upstream]``.

With ``--upstream`` by mmdet3d's own rotated IoU, which runs in numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1).
"""

from __future__ import annotations

import json
import sys

import numpy as np

from serve.upstream import patches

CLASSES = ["Pedestrian", "Cyclist", "Car"]
SIZES = {"Pedestrian": (0.8, 1.7, 0.6), "Cyclist": (1.8, 1.7, 0.6), "Car": (3.9, 1.6, 1.6)}


def made_annotations(frames: int, seed: int = 5) -> tuple[list[dict], list[dict]]:
    """Make ground truth and predictions of `frames` frames in KITTI's form: some hits, near misses and false alarms."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(frames):
        names = rng.choice(CLASSES, rng.integers(3, 8))
        centres = rng.uniform((-20, 1.4, 5), (20, 1.8, 45), (len(names), 3))
        sizes = np.array([SIZES[name] for name in names])
        yaws = rng.uniform(-np.pi, np.pi, len(names))
        truth.append(annotations(names, centres, sizes, yaws, rng))
        kept = rng.uniform(size=len(names)) < 0.85
        shifts = rng.normal(0, 0.12, (kept.sum(), 3))
        more = rng.integers(0, 3)
        extra = rng.choice(CLASSES, more)
        found.append(
            annotations(
                np.concatenate([names[kept], extra]),
                np.concatenate(
                    [centres[kept] + shifts, rng.uniform((-20, 1.4, 5), (20, 1.8, 45), (more, 3))]
                ),
                np.concatenate(
                    [
                        sizes[kept] * rng.normal(1, 0.05, (kept.sum(), 3)),
                        np.array([SIZES[e] for e in extra]).reshape(-1, 3),
                    ]
                ),
                np.concatenate([yaws[kept] + rng.normal(0, 0.1, kept.sum()), rng.uniform(-3, 3, more)]),
                rng,
                scores=rng.uniform(0.1, 1, kept.sum() + more),
            )
        )
    return truth, found


def annotations(names, centres, sizes, yaws, rng, scores=None) -> dict:
    """Annotations of one frame; the picture's boxes follow from the places by a camera of 700 pixels."""
    count = len(names)
    u = 600 + 700 * centres[:, 0] / centres[:, 2]
    v = 180 + 700 * (centres[:, 1] - 1.2) / centres[:, 2]
    half = 350 * sizes[:, 0] / centres[:, 2]
    height = 700 * sizes[:, 1] / centres[:, 2]
    return {
        "name": np.asarray(names),
        "truncated": np.zeros(count),
        "occluded": np.zeros(count, int) if scores is not None else rng.integers(0, 2, count),
        "alpha": yaws - np.arctan2(centres[:, 0], centres[:, 2]),
        "bbox": np.stack([u - half, v - height, u + half, v], 1),
        "dimensions": sizes,
        "location": centres,
        "rotation_y": yaws,
        "score": np.zeros(count) if scores is None else scores,
    }


def main() -> None:
    if "--upstream" in sys.argv:
        patches.REPLACED.clear()
    patches.apply()
    from mmdet3d.evaluation.functional.kitti_utils.eval import kitti_eval

    truth, found = made_annotations(12)
    _, figures = kitti_eval(truth, found, CLASSES, eval_types=["bbox", "bev", "3d"])
    print(json.dumps({name: float(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
