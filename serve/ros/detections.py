"""Answers of a server as fields of ``vision_msgs`` (ROS 2): Detection3DArray and Detection2DArray.

Fields are dictionaries and lists by the names of the definitions (https://github.com/ros-perception/vision_msgs,
version 4), so that they can be made and tested without ROS; `assign` writes them into messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from serve.errors import BadRequest

__all__ = ["assign", "detections_2d", "detections_3d"]

Fields = dict[str, Any]


def detections_3d(answer: Mapping[str, Any]) -> list[Fields]:
    """Return the fields of each Detection3D of an answer in LiDAR or depth coordinates.

    A pose is that of the box's centre, as the definition says; an answer has the bottom. ``id`` is the id of the track,
    empty without one.

    Raises:
        BadRequest: boxes in camera coordinates, whose y is down, or no boxes in space.
    """
    if "bboxes_3d" not in answer or answer.get("box_type_3d") == "Camera":
        raise BadRequest(
            "Detection3DArray takes boxes in LiDAR or depth coordinates, and this model gives none"
        )
    found = []
    for k, box in enumerate(answer["bboxes_3d"]):
        x, y, z, length, width, height, yaw = [*map(float, box), 0.0][:7]  # without an angle it is 0
        pose = {
            "position": {"x": x, "y": y, "z": z + height / 2},
            "orientation": {"x": 0.0, "y": 0.0, "z": math.sin(yaw / 2), "w": math.cos(yaw / 2)},
        }
        size = {"x": length, "y": width, "z": height}
        found.append(
            {
                "results": [_result(answer, "_3d", k)],
                "bbox": {"center": pose, "size": size},
                "id": _track(answer, k),
            }
        )
    return found


def detections_2d(answer: Mapping[str, Any]) -> list[Fields]:
    """Return the fields of each Detection2D of an answer, in pixels.

    Raises:
        BadRequest: no boxes in an image.
    """
    if "bboxes" not in answer:
        raise BadRequest("Detection2DArray takes boxes in an image, and this model gives none")
    found = []
    for k, box in enumerate(answer["bboxes"]):
        x1, y1, x2, y2 = map(float, np.asarray(box, np.float64)[:4])
        centre = {"position": {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2}, "theta": 0.0}
        found.append(
            {
                "results": [_result(answer, "", k)],
                "bbox": {"center": centre, "size_x": x2 - x1, "size_y": y2 - y1},
                "id": _track(answer, k),
            }
        )
    return found


def _result(answer: Mapping[str, Any], suffix: str, k: int) -> Fields:
    return {"hypothesis": {"class_id": str(answer["names"][k]), "score": float(answer[f"scores{suffix}"][k])}}


def _track(answer: Mapping[str, Any], k: int) -> str:
    ids = answer.get("track_ids")
    return str(ids[k]) if ids and ids[k] > 0 else ""


def assign(message: Any, fields: Mapping[str, Any], make: Mapping[str, Callable[[], Any]]) -> Any:
    """Write fields into a message, in depth.

    Args:
        message: an empty message.
        fields: its fields; those that are left out stay as they are.
        make: for a field with a list of messages, what makes an empty one.

    Returns:
        The message.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            assign(getattr(message, name), value, make)
        elif isinstance(value, list):
            setattr(message, name, [assign(make[name](), each, make) for each in value])
        else:
            setattr(message, name, value)
    return message
