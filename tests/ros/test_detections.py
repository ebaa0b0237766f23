"""Answers as fields of vision_msgs, and in messages of its definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from serve.errors import BadRequest
from serve.ros.detections import assign, detections_2d, detections_3d

IN_SPACE = {
    "bboxes_3d": [[10, 1, -1.7, 4, 1.6, 1.5, math.pi / 2], [20, 2, 0, 1, 1, 1, 0]],
    "scores_3d": [0.9, 0.5],
    "labels_3d": [2, 0],
    "names": ["Car", "Pedestrian"],
    "box_type_3d": "LiDAR",
    "track_ids": [7, -1],
}
IN_IMAGE = {"bboxes": [[5, 6, 20, 30]], "scores": [0.8], "labels": [0], "names": ["person"]}
# Facts of ros-perception/vision_msgs, version 4.
DEFINITIONS = {
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score",
    "vision_msgs/msg/ObjectHypothesisWithPose": (
        "vision_msgs/ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose"
    ),
    "vision_msgs/msg/BoundingBox3D": "geometry_msgs/Pose center\ngeometry_msgs/Vector3 size",
    "vision_msgs/msg/Point2D": "float64 x\nfloat64 y",
    "vision_msgs/msg/Pose2D": "vision_msgs/Point2D position\nfloat64 theta",
    "vision_msgs/msg/BoundingBox2D": "vision_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y",
    "vision_msgs/msg/Detection3D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
        "vision_msgs/BoundingBox3D bbox\nstring id"
    ),
    "vision_msgs/msg/Detection2D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
        "vision_msgs/BoundingBox2D bbox\nstring id"
    ),
    "vision_msgs/msg/Detection3DArray": "std_msgs/Header header\nvision_msgs/Detection3D[] detections",
    "vision_msgs/msg/Detection2DArray": "std_msgs/Header header\nvision_msgs/Detection2D[] detections",
}


def test_boxes_in_space_have_their_centre_turn_and_track() -> None:
    car, pedestrian = detections_3d(IN_SPACE)
    pose = car["bbox"]["center"]
    assert pose["position"] == {"x": 10.0, "y": 1.0, "z": pytest.approx(-0.95)}
    assert pose["orientation"]["z"] == pytest.approx(math.sqrt(0.5))
    assert car["bbox"]["size"] == {"x": 4.0, "y": 1.6, "z": 1.5}
    assert car["results"] == [{"hypothesis": {"class_id": "Car", "score": 0.9}}]
    assert (car["id"], pedestrian["id"]) == ("7", "")


def test_boxes_in_images_have_their_centre_and_size() -> None:
    (found,) = detections_2d(IN_IMAGE)
    assert found["bbox"] == {
        "center": {"position": {"x": 12.5, "y": 18.0}, "theta": 0.0},
        "size_x": 15.0,
        "size_y": 24.0,
    }


def test_answers_of_another_kind_are_refused() -> None:
    for make, answer in (
        (detections_3d, IN_IMAGE),
        (detections_2d, IN_SPACE),
        (detections_3d, {**IN_SPACE, "box_type_3d": "Camera"}),
    ):
        with pytest.raises(BadRequest):
            make(answer)


def empty(store: Any, name: str) -> Any:
    """A message whose fields are empty, as rclpy makes it; fields of other messages are filled."""
    found = SimpleNamespace()
    for field, (node, detail) in store.fielddefs[name][1]:
        kind = getattr(node, "name", str(node))
        if kind == "NAME":
            setattr(found, field, empty(store, detail))
        elif kind == "BASE":
            setattr(found, field, "" if detail[0] == "string" else 0.0 if "float" in detail[0] else 0)
        else:
            setattr(found, field, [0.0] * 36 if field == "covariance" else [])
    return found


@pytest.mark.parametrize(("kind", "answer"), [("3D", IN_SPACE), ("2D", IN_IMAGE)])
def test_fields_fit_the_definitions_of_vision_msgs(kind: str, answer: dict[str, Any]) -> None:
    pytest.importorskip("rosbags", reason="an extra: pip install 'mmdet3d-serve[recordings]'")
    import numpy as np
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    for name, text in DEFINITIONS.items():
        store.register(get_types_from_msg(text, name))
    made = (detections_3d if kind == "3D" else detections_2d)(answer)
    make = {
        "detections": lambda: empty(store, f"vision_msgs/msg/Detection{kind}"),
        "results": lambda: empty(store, "vision_msgs/msg/ObjectHypothesisWithPose"),
    }
    name = f"vision_msgs/msg/Detection{kind}Array"
    array = assign(empty(store, name), {"detections": made}, make)
    for detection in array.detections:
        for result in detection.results:
            result.pose.covariance = np.zeros(36)
    raw = store.serialize_cdr(array, name)
    back = store.deserialize_cdr(raw, name)
    assert [each.id for each in back.detections] == [each["id"] for each in made]
    box = back.detections[0].bbox
    assert (box.size.x if kind == "3D" else box.size_x) == (4.0 if kind == "3D" else 15.0)
    assert back.detections[0].results[0].hypothesis.class_id == answer["names"][0]


def test_a_field_that_the_definition_lacks_is_an_error() -> None:
    with pytest.raises(AttributeError):
        assign(SimpleNamespace(), {"center": {"x": 1}}, {})
