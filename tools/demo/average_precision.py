"""Average precision per class over bird's-eye-view rotated IoU.

AP is interpolated at 40 recall positions 1/40, 2/40, …, 1 (A. Simonelli et al., *Disentangling Monocular 3D Object
Detection*, ICCV 2019, which KITTI adopted as "R40"): the mean over them of the best precision at that recall or a
higher one. Detections are taken by falling score; each is matched with the free ground truth that it overlaps most.
Boxes marked "ignored" (too few returns, out of range) count neither when found nor when missed.

Not covered: KITTI's difficulty classes, height (IoU is of the ground rectangles), neighbouring classes such as vans,
and KITTI's sampling of score thresholds: precision is taken exactly, at every score. IoU is computed by the kernels of
`serve.ops`; the tests check it against an independent implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClassResult", "FrameDetections", "FrameTruth", "average_precision", "bev_iou", "evaluate_class"]

_RECALL_POSITIONS = 40


@dataclass(frozen=True, slots=True)
class FrameDetections:
    """Detections of one frame: boxes (D, 7) x, y, z, dx, dy, dz (m), yaw (rad); scores (D,); labels (D,)."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FrameTruth:
    """Ground truth of one frame: boxes (G, 7) as in `FrameDetections`; labels (G,); ignored (G,) bool."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ClassResult:
    """AP of one class at one IoU: ``ap`` in [0, 1], nan if nothing was to find; ``recall`` in the end."""

    label: int
    iou: float
    ap: float
    recall: float
    ground_truths: int
    detections: int


def bev_iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bird's-eye-view rotated IoU of boxes (A, 7) with boxes (B, 7): (A, B) in [0, 1]. Metres and radians."""
    from serve import ops

    ops.install()
    import torch
    from mmcv.ops import box_iou_rotated

    # mmcv's boxes are x, y, dx, dy, yaw; its "clockwise" is seen with y down, so counter-clockwise with y up.
    ground = [
        torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 7)[:, [0, 1, 3, 4, 6]])
        for boxes in (first, second)
    ]
    return np.asarray(box_iou_rotated(*ground, clockwise=True).numpy().astype(np.float64))


def average_precision(
    scores: NDArray[np.float64], correct: NDArray[np.bool_], ground_truths: int
) -> tuple[float, float]:
    """AP at 40 recall positions, and final recall, of detections judged right or wrong.

    Args:
        scores: (D,) of all frames' detections, in any order. Equal scores are taken together.
        correct: (D,) whether each found a ground truth of its own.
        ground_truths: how many there were to find.

    Returns:
        (ap, recall), both in [0, 1]; (nan, nan) when there was nothing to find.
    """
    if ground_truths == 0:
        return math.nan, math.nan
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(correct[order])
    precision = right / np.arange(1, len(right) + 1)
    recall = right / ground_truths
    # A threshold cannot part equal scores: only the last of each run is a working point.
    last = np.append(np.diff(scores[order]) != 0, True)[: len(right)]
    precision, recall = precision[last], recall[last]
    total = 0.0
    for position in range(1, _RECALL_POSITIONS + 1):
        reached = precision[recall >= position / _RECALL_POSITIONS - 1e-9]
        total += float(reached.max()) if reached.size else 0.0
    return total / _RECALL_POSITIONS, float(recall[-1]) if recall.size else 0.0


def evaluate_class(
    detections: Sequence[FrameDetections], truths: Sequence[FrameTruth], label: int, iou: float
) -> ClassResult:
    """Match one class frame by frame at one IoU threshold (bird's-eye view) and take AP over all frames.

    Raises:
        ValueError: the two sequences differ in length.
    """
    all_scores: list[float] = []
    all_correct: list[bool] = []
    count = 0
    for found, truth in zip(detections, truths, strict=True):
        mine, wanted = found.labels == label, truth.labels == label
        boxes, scores, ignored = found.boxes[mine], found.scores[mine], truth.ignored[wanted]
        count += int((~ignored).sum())
        overlap = bev_iou(boxes, truth.boxes[wanted])
        free = ~ignored
        for i in np.argsort(-scores, kind="stable"):
            candidates = np.flatnonzero(free & (overlap[i] >= iou))
            if candidates.size:
                free[candidates[overlap[i][candidates].argmax()]] = False
                all_scores.append(float(scores[i]))
                all_correct.append(True)
            elif not (ignored & (overlap[i] >= iou)).any():
                all_scores.append(float(scores[i]))
                all_correct.append(False)
    ap, recall = average_precision(np.array(all_scores), np.array(all_correct, dtype=bool), count)
    return ClassResult(label, iou, ap, recall, count, len(all_scores))
