"""Counting of answered frames in a worker, where the numbers still are arrays and nothing is filtered yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.formats.labels import decode_labels
from serve.watch.statistics import CLASS, LOWEST_SCORE, SCORE_THR, SEGMENT, Counts, Layout

__all__ = ["ObservedFrame", "count_frames"]

Floats = npt.NDArray[np.floating[Any]]

# Columns of a 3D box, by the frame of the boxes: those in the ground plane, the one along the vertical with the sign of
# up, and length, width, height (mmdet3d 1.x: structures/bbox_3d).
_COLUMNS: Mapping[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int, int]]] = {
    "LiDAR": ((0, 1), (2, 1), (3, 4, 5)),
    "Depth": ((0, 1), (2, 1), (3, 4, 5)),
    "Camera": ((0, 2), (1, -1), (3, 5, 4)),
}


@dataclass(frozen=True)
class ObservedFrame:
    """What is counted of a frame.

    Attributes:
        answer: all detections, before the options of the frame select from them.
        points: number of points of its cloud; None without one.
        points_in_range: share of them in the model's range; None if the model has none.
        warnings: codes of its warnings.
    """

    answer: Mapping[str, Any]
    points: int | None = None
    points_in_range: float | None = None
    warnings: tuple[str, ...] = ()


def count_frames(frames: Sequence[ObservedFrame], layout: Layout, score_thr: float = SCORE_THR) -> Counts:
    """Count frames, together: a pass over the detections of a batch costs hardly more than one over those of a frame.

    Args:
        frames: frames that one model answered.
        layout: bins.
        score_thr: score from which a detection counts; scores themselves count from `LOWEST_SCORE` on.
    """
    counts = layout.empty()
    counts.frames = len(frames)
    for frame in frames:
        if frame.warnings:
            counts.add_warnings(dict.fromkeys(frame.warnings, 1))
    for name in ("points", "points_in_range"):
        values = [value for frame in frames if (value := getattr(frame, name)) is not None]
        if values:
            counts.add_values(name, np.array(values, np.float64))
    found = [frame.answer for frame in frames]
    for answer in found:
        if "pts_semantic_mask" in answer or "panoptic_seg" in answer:
            _count_segments(counts, answer)
    suffix = "_3d" if any("scores_3d" in answer for answer in found) else ""
    found = [answer for answer in found if f"scores{suffix}" in answer]
    if found:
        _count_detections(counts, found, suffix, score_thr)
    return counts


def _count_segments(counts: Counts, answer: Mapping[str, Any]) -> None:
    """Count the points or pixels of each class; what is in no segment, or beyond the classes, is of another class."""
    classes = answer["classes"]
    if "pts_semantic_mask" in answer:
        _add_by_label(
            counts, SEGMENT, np.bincount(decode_labels(answer["pts_semantic_mask"]).reshape(-1)), classes
        )
        return
    numbers = np.zeros(len(classes) + 1, np.int64)
    for segment in answer["segments_info"]:
        numbers[segment["category_id"]] += segment["area"]
    height, width = answer["panoptic_seg"]["size"]
    numbers[-1] = height * width - numbers[:-1].sum()
    _add_by_label(counts, SEGMENT, numbers, classes)


def _add_by_label(
    counts: Counts, statistic: str, numbers: npt.NDArray[np.int64], classes: Sequence[str]
) -> None:
    """Add numbers by label to a statistic by class."""
    of_class, layout = counts.of(statistic), counts.layout
    for label in np.flatnonzero(numbers).tolist():
        of_class[layout.bin_of(classes[label] if label < len(classes) else "")] += numbers[label]


def _count_detections(
    counts: Counts, answers: Sequence[Mapping[str, Any]], suffix: str, score_thr: float
) -> None:
    of_frame = [np.asarray(answer[f"scores{suffix}"]) for answer in answers]
    counts.add_values(
        "detections", np.array([np.count_nonzero(scores >= score_thr) for scores in of_frame], np.float64)
    )
    scores = np.concatenate(of_frame)
    counts.add_values("score", scores[scores >= LOWEST_SCORE])
    kept = scores >= score_thr
    if not kept.any():
        return
    labels = np.concatenate([np.asarray(answer[f"labels{suffix}"]) for answer in answers])[kept]
    numbers = np.bincount(labels[labels >= 0]) if len(labels) else np.zeros(0, np.int64)
    _add_by_label(counts, CLASS, numbers, answers[0]["classes"])
    boxes = np.concatenate([np.asarray(answer[f"bboxes{suffix}"]) for answer in answers])[kept]
    if not suffix:
        if boxes.shape[1] == 4:
            counts.add_values("area", (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        return
    columns = _COLUMNS.get(str(answers[0].get("box_type_3d")))
    if columns is not None:
        (first, second), (vertical, sign), sizes = columns
        counts.add_values("distance", np.hypot(boxes[:, first], boxes[:, second]))
        counts.add_values("elevation", sign * boxes[:, vertical])
        for name, column in zip(("length", "width", "height"), sizes, strict=True):
            counts.add_values(name, boxes[:, column])
