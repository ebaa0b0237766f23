"""Answers of every kind in the tracker's coordinates, and ids spliced into their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from serve.errors import BadRequest
from serve.tracking import Tracker, track_answer
from serve.tracking.answers import read_detections


def in_space(boxes: list[list[float]], kind: str = "LiDAR") -> dict[str, Any]:
    return {
        "bboxes_3d": boxes,
        "scores_3d": [0.9] * len(boxes),
        "labels_3d": [0] * len(boxes),
        "names": ["Car"] * len(boxes),
        "box_type_3d": kind,
    }


def test_ids_are_added_behind_the_bytes_of_the_answer() -> None:
    answer = in_space([[10, 0, -1.7, 4, 1.6, 1.5, 0.1]])
    encoded = orjson.dumps(answer)
    tracked = track_answer(Tracker(), answer, encoded, more={"track_frame": 0})
    assert tracked.encoded.startswith(encoded[:-1] + b",")
    assert orjson.loads(tracked.encoded) == tracked.answer == {**answer, "track_ids": [1], "track_frame": 0}


@pytest.mark.parametrize("answer", [in_space([]), {"bboxes": [], "scores": [], "labels": [], "names": []}])
def test_an_answer_without_detections_is_followed(answer: dict[str, Any]) -> None:
    tracker = Tracker()
    tracked = track_answer(tracker, answer, orjson.dumps(answer))
    assert tracked.answer["track_ids"] == [] and tracker.frames == 1


def test_boxes_of_a_camera_are_seen_from_above() -> None:
    # A car 20 m ahead, 2 m to the right, 1.6 m below the camera, that looks to the right.
    found = read_detections(in_space([[2, 1.6, 20, 4, 1.5, 1.7, 0.0, 3.0, 1.0]], "Camera"))
    np.testing.assert_allclose(found.boxes, [[2, -20, -1.6, 4, 1.7, 1.5, 0.0]])
    np.testing.assert_allclose(found.velocities, [[3.0, -1.0]])


def test_boxes_without_an_angle_have_angle_0() -> None:
    found = read_detections(in_space([[1, 2, 0, 1, 1, 1]], "Depth"))
    assert found.boxes.tolist() == [[1, 2, 0, 1, 1, 1, 0]]


def test_boxes_of_images_are_read_by_their_centres() -> None:
    found = read_detections({"bboxes": [[10, 20, 30, 60]], "scores": [0.5], "labels": [3]})
    assert found.boxes.tolist() == [[20, 40, 20, 40]] and found.labels.tolist() == [3]


def test_null_in_an_answer_gives_no_id() -> None:
    answer = in_space([[None, 0, -1.7, 4, 1.6, 1.5, 0.1]])
    assert track_answer(Tracker(), answer, orjson.dumps(answer)).answer["track_ids"] == [-1]


def test_labels_of_points_cannot_be_followed() -> None:
    with pytest.raises(BadRequest):
        read_detections({"pts_semantic_mask": [0, 1]})
