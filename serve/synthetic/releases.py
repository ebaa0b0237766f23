"""Data sets in the layout of nuScenes: what differs between them, and the values of their tables.

Tables relate by tokens; poses are a translation in metres and a quaternion (w, x, y, z).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.camera import CENTRE_U, CENTRE_V, FOCAL, ORIGIN
from serve.synthetic.raycast import SENSOR_HEIGHT

__all__ = [
    "ATTRIBUTES",
    "CAMERAS",
    "INTRINSIC",
    "LIDAR2EGO",
    "LYFT",
    "NUSCENES",
    "TABLES",
    "Array",
    "Release",
    "box_pose",
    "camera_pose",
    "cloud_of",
    "ego_pose_row",
    "links",
    "quaternion",
    "token_of",
    "vehicle_pose",
]

Array = NDArray[np.float64]

TABLES = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log"),
    *("scene", "sample", "sample_data", "sample_annotation", "map"),
)
#: Camera → its direction in degrees, counter-clockwise from the vehicle's.
CAMERAS = {
    "CAM_FRONT": 0,
    "CAM_FRONT_RIGHT": -55,
    "CAM_FRONT_LEFT": 55,
    "CAM_BACK": 180,
    "CAM_BACK_LEFT": 110,
    "CAM_BACK_RIGHT": -110,
}
ATTRIBUTES = (
    *("cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing"),
    *("pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped"),
)
INTRINSIC = np.array([[FOCAL, 0, CENTRE_U], [0, FOCAL, CENTRE_V], [0, 0, 1.0]])
LIDAR2EGO = np.eye(4)
LIDAR2EGO[2, 3] = SENSOR_HEIGHT
_AXES = np.array(
    [[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]
)  # x forward, y left, z up → x right, y down, z forward
_RINGS, _LOWEST_RAD, _HIGHEST_RAD = 32, math.radians(-24.4), math.radians(2.1)


@dataclass(frozen=True)
class Release:
    """What differs between the data sets of this layout.

    Attributes:
        name: prefix of the annotation files.
        version: name of the tables' folder.
        tables: that folder, below the root.
        lidar: folder of the key frames' clouds, below `files`.
        sweeps: folder of the other clouds, below `files`.
        files: folder that paths in the tables are relative to, below the root.
        columns: float32 numbers per point.
        classes: mmdet3d's class names by label.
        categories: category in the tables, and class of mmdet3d, by label of `serve.synthetic.layout.CLASSES`.
        scenes: names of the scenes of training and of validation.
    """

    name: str
    version: str
    tables: str
    lidar: str
    sweeps: str
    files: str
    columns: int
    classes: tuple[str, ...]
    categories: tuple[tuple[str, str], ...]
    scenes: tuple[tuple[str, ...], tuple[str, ...]]


NUSCENES = Release(
    name="nuscenes",
    version="v1.0-mini",
    tables="v1.0-mini",
    lidar="samples/LIDAR_TOP",
    sweeps="sweeps/LIDAR_TOP",
    files=".",
    columns=5,
    classes=(
        *("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian"),
        *("traffic_cone", "barrier"),
    ),
    categories=(
        ("human.pedestrian.adult", "pedestrian"),
        ("vehicle.bicycle", "bicycle"),
        ("vehicle.car", "car"),
    ),
    scenes=(
        tuple(f"scene-{n:04d}" for n in (61, 553, 655, 757, 796, 1077, 1094, 1100)),
        ("scene-0103", "scene-0916"),
    ),
)
LYFT = Release(
    name="lyft",
    version="v1.01-train",
    tables="v1.01-train/v1.01-train",
    lidar="lidar",
    sweeps="lidar",
    files="v1.01-train",
    columns=5,
    classes=(
        *("car", "truck", "bus", "emergency_vehicle", "other_vehicle", "motorcycle", "bicycle", "pedestrian"),
        "animal",
    ),
    categories=(("pedestrian", "pedestrian"), ("bicycle", "bicycle"), ("car", "car")),
    scenes=(
        tuple(f"host-a000-lidar0-{k:04d}" for k in range(8)),
        ("host-a000-lidar0-0100", "host-a000-lidar0-0101"),
    ),
)


def token_of(*parts: object) -> str:
    """Return 32 hexadecimal digits for a row of a table, the same for the same arguments."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


def links(tokens: Sequence[str], index: int) -> dict[str, str]:
    """Return the members ``prev`` and ``next`` of a row in a chain; empty at its ends."""
    return {
        "prev": tokens[index - 1] if index else "",
        "next": tokens[index + 1] if index + 1 < len(tokens) else "",
    }


def vehicle_pose(index: int) -> Array:
    """Return where the vehicle stands in a scene, (4, 4) from its frame to the world's, metres."""
    return _pose(0.7 * index + 0.3, (400.0 + 250.0 * index, 1100.0 - 90.0 * index, 0.0))


def camera_pose(channel: str) -> Array:
    """Return (4, 4) from a camera's frame (x right, y down, z forward) to the vehicle's, metres."""
    turned = _pose(math.radians(CAMERAS[channel]), (0.0, 0.0, 0.0))
    turned[:3, 3] = turned[:3, :3] @ ORIGIN + LIDAR2EGO[:3, 3]
    turned[:3, :3] = turned[:3, :3] @ _AXES.T
    return turned


def box_pose(box: Array) -> Array:
    """Return (4, 4) from the frame of a box (bottom centre, sizes, yaw), in the middle of it, to the box's own."""
    return _pose(float(box[6]), (float(box[0]), float(box[1]), float(box[2] + box[5] / 2)))


def _pose(yaw: float, shift: tuple[float, float, float]) -> Array:
    cos, sin = math.cos(yaw), math.sin(yaw)
    pose = np.eye(4)
    pose[:2, :2] = [[cos, -sin], [sin, cos]]
    pose[:3, 3] = shift
    return pose


def quaternion(pose: Array) -> list[float]:
    """Return the rotation of a pose (4, 4) as w, x, y, z of unit length with w ≥ 0."""
    r = pose[:3, :3]
    # The largest of the four squares is divided by, so that no rotation loses digits.
    squares = np.array([1 + r[0, 0] + r[1, 1] + r[2, 2], *(1 + 2 * r[k, k] - np.trace(r) for k in range(3))])
    k = int(squares.argmax())
    skew = (r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1])
    found = np.empty(4)
    if k == 0:
        found[:] = (squares[0], *skew)
    else:
        i = k - 1
        found[0], found[k] = skew[i], squares[k]
        for j in {0, 1, 2} - {i}:
            found[j + 1] = r[i, j] + r[j, i]
    found /= np.linalg.norm(found)
    return [float(number) for number in (found if found[0] >= 0 else -found)]


def ego_pose_row(token: str, time_us: int, pose: Array) -> dict[str, Any]:
    """Return a row of the table of the vehicle's poses."""
    return {
        "token": token,
        "timestamp": time_us,
        "translation": pose[:3, 3].tolist(),
        "rotation": quaternion(pose),
    }


def cloud_of(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return points (N, 4) in the form of the data set: intensities of 0 to 255, and the ring of each, (N, 5)."""
    elevation = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    ring = np.round((elevation - _LOWEST_RAD) / (_HIGHEST_RAD - _LOWEST_RAD) * (_RINGS - 1)).clip(
        0, _RINGS - 1
    )
    intensity = np.round(points[:, 3] * 255)
    return np.column_stack([points[:, :3], intensity, ring]).astype("<f4")
