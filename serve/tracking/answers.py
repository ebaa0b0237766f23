"""Ids of tracks in a server's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from serve.errors import BadRequest
from serve.tracking.detections import Detections
from serve.tracking.tracker import Tracker

__all__ = ["TrackedAnswer", "read_detections", "track_answer"]


@dataclass(frozen=True)
class TrackedAnswer:
    """An answer with the ids of its detections.

    Attributes:
        answer: the answer with ``track_ids``, one id per detection.
        encoded: the same as JSON: the bytes of the answer, and what was added before its last brace.
    """

    answer: dict[str, Any]
    encoded: bytes


def track_answer(
    tracker: Tracker,
    answer: Mapping[str, Any],
    encoded: bytes,
    time_s: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> TrackedAnswer:
    """Give the detections of an answer their ids.

    Args:
        tracker: the tracks of the sequence; takes the frame.
        answer: the answer of the next frame.
        encoded: the answer as JSON.
        time_s: time of the frame, seconds; None for one period after the last.
        more: further fields of the answer.

    Raises:
        BadRequest: the answer has no boxes, or the time is not after that of the last frame.
        MissingPackage: the boxes are of an image, and the package `trackers` is not installed.
    """
    ids = tracker.update(read_detections(answer), time_s).tolist()
    added = {"track_ids": ids, **(more or {})}
    return TrackedAnswer({**answer, **added}, encoded.rstrip()[:-1] + b"," + orjson.dumps(added)[1:])


def read_detections(answer: Mapping[str, Any]) -> Detections:
    """Read the detections of an answer into the tracker's coordinates, z up and boxes by their centres.

    Raises:
        BadRequest: the answer has no boxes.
    """
    if "bboxes_3d" in answer:
        rows = np.array(answer["bboxes_3d"], np.float64)
        rows = rows.reshape(len(answer["bboxes_3d"]), -1) if rows.size else np.empty((0, 7))
        velocities = rows[:, 7:9] if rows.shape[1] >= 9 else None
        boxes = rows[:, :7]
        if answer.get("box_type_3d") == "Camera":
            # x right, y down, z forward, sizes along x, y and z, turned about y: seen from above, z is to the back.
            boxes = boxes[:, [0, 2, 1, 3, 5, 4, 6]] * (1, -1, -1, 1, 1, 1, 1)
            velocities = None if velocities is None else velocities * (1, -1)
        if boxes.shape[1] == 6:
            boxes = np.column_stack([boxes, np.zeros(len(boxes))])
        return Detections(boxes, _floats(answer["scores_3d"]), _ints(answer["labels_3d"]), velocities)
    if "bboxes" in answer:
        rows = np.array(answer["bboxes"], np.float64)
        corners = rows.reshape(len(answer["bboxes"]), -1)[:, :4] if rows.size else np.empty((0, 4))
        boxes = np.column_stack([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]])
        return Detections(boxes, _floats(answer["scores"]), _ints(answer["labels"]))
    raise BadRequest("tracks are of boxes, and this model gives labels of points or pixels")


def _floats(values: Any) -> Any:
    return np.asarray(values, np.float64).reshape(-1)


def _ints(values: Any) -> Any:
    return np.asarray(values, np.int64).reshape(-1)
