"""KITTI label files from predictions: ``type truncated occluded alpha bbox dimensions location rotation_y score``.

The fields are those of the readme of KITTI's object development kit: `bbox` left, top, right, bottom in pixels of the
image, `dimensions` height, width, length in metres, `location` the bottom centre in camera coordinates (x right, y
down, z forward), `rotation_y` about the camera's y axis from -pi to pi, 0 along x, `alpha` the same less the angle
under which the camera sees the object. A label file holds what is in the image: an object beside or behind it has no
line.

Boxes in LiDAR coordinates need a calibration (KITTI's ``calib/NAME.txt``, or JSON) and the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, UndecodableFrame

__all__ = ["Camera", "camera_of", "check_boxes", "format_labels", "read_calibration"]

Matrix = npt.NDArray[np.float64]
_NEAR_M = 0.1  # of a box, what is nearer to the camera's plane or behind it is cut off
# Corners of a box in units of its size about its bottom centre, and its edges.
_CORNERS = np.array([(x, y, z) for x in (0.5, -0.5) for y in (-0.5, 0.5) for z in (0, 1)], np.float64)
_EDGES = [(i, j) for i in range(8) for j in range(i) if int(np.abs(_CORNERS[i] - _CORNERS[j]).sum()) == 1]
_UNKNOWN_3D = "-1 -1 -1 -1000 -1000 -1000 -10"


@dataclass(frozen=True)
class Camera:
    """The camera of a frame.

    Attributes:
        cam2img: 4 x 4, camera coordinates (metres) to pixels.
        lidar2cam: 4 x 4, LiDAR to camera coordinates; None for a frame without a point cloud.
        size: width and height of the image, pixels.
    """

    cam2img: Matrix
    lidar2cam: Matrix | None
    size: tuple[int, int]


def check_boxes(answer: Mapping[str, Any]) -> None:
    """Check that an answer has boxes that label files can hold.

    Raises:
        BadRequest: it has others, or none.
    """
    kind = answer.get("box_type_3d")
    if "bboxes" not in answer and ("bboxes_3d" not in answer or kind not in ("LiDAR", "Camera")):
        found = f"boxes of type {kind}" if "bboxes_3d" in answer else "labels of points or pixels, no boxes"
        raise BadRequest(
            f"KITTI's labels hold boxes in LiDAR or camera coordinates; this model gives {found}"
        )


def format_labels(answer: Mapping[str, Any], camera: Camera | None) -> str:
    """Write the label file of one frame.

    Args:
        answer: detections in 2D, or in 3D with boxes in LiDAR or camera coordinates.
        camera: the camera; may be None for detections in 2D.

    Raises:
        BadRequest: the answer has no boxes that KITTI's labels can hold.
    """
    check_boxes(answer)
    if "bboxes" in answer:
        rows = zip(answer["names"], answer["bboxes"], answer["scores"], strict=True)
        return "".join(
            f"{_type(name)} -1 -1 -10 {_floats(box[:4])} {_UNKNOWN_3D} {score:.6f}\n"
            for name, box, score in rows
        )
    kind = answer["box_type_3d"]
    assert camera is not None
    lines = []
    for name, box, score in zip(answer["names"], answer["bboxes_3d"], answer["scores_3d"], strict=True):
        values = np.asarray(box, np.float64)
        location, (length, width, height), rotation = _in_camera(values, kind, camera)
        seen = _project(location, length, width, height, rotation, camera)
        if seen is None:
            continue
        alpha = _wrap(rotation - np.arctan2(location[0], location[2]))
        lines.append(
            f"{_type(name)} -1 -1 {alpha:.4f} {_floats(seen)} {_floats((height, width, length))} "
            f"{_floats(location)} {rotation:.4f} {score:.6f}\n"
        )
    return "".join(lines)


def _in_camera(box: Matrix, kind: str, camera: Camera) -> tuple[Matrix, tuple[float, float, float], float]:
    """Location, (length, width, height) and rotation_y of a box."""
    if kind == "Camera":  # x, y, z of the bottom centre; sizes along x, y (height), z; turned about y
        return box[:3], (box[3], box[5], box[4]), _wrap(box[6])
    if camera.lidar2cam is None:
        raise BadRequest("boxes in LiDAR coordinates need a calibration with lidar2cam")
    turn, shift = camera.lidar2cam[:3, :3], camera.lidar2cam[:3, 3]
    ahead = turn @ (np.cos(box[6]), np.sin(box[6]), 0.0)  # where the front of the object looks
    return turn @ box[:3] + shift, (box[3], box[4], box[5]), float(np.arctan2(-ahead[2], ahead[0]))


def _project(
    location: Matrix, length: float, width: float, height: float, rotation: float, camera: Camera
) -> tuple[float, float, float, float] | None:
    """Rectangle of the image around the visible part of a box; None if no part is in the image."""
    local = _CORNERS * (length, width, height)
    cosine, sine = np.cos(rotation), np.sin(rotation)
    corners = location + np.stack(
        [
            cosine * local[:, 0] + sine * local[:, 1],
            -local[:, 2],
            -sine * local[:, 0] + cosine * local[:, 1],
        ],
        axis=1,
    )
    ends = [corners[corners[:, 2] >= _NEAR_M]]
    for i, j in _EDGES:  # where edges pass through the near plane
        one, other = corners[i], corners[j]
        if (one[2] < _NEAR_M) != (other[2] < _NEAR_M):
            ends.append((one + (other - one) * (_NEAR_M - one[2]) / (other[2] - one[2]))[None])
    visible = np.concatenate(ends)
    if not len(visible):
        return None
    seen = np.hstack([visible, np.ones((len(visible), 1))]) @ camera.cam2img.T
    pixels = seen[:, :2] / seen[:, 2:3]
    (left, top), (right, bottom) = pixels.min(0), pixels.max(0)
    wide, high = camera.size
    if right <= 0 or bottom <= 0 or left >= wide - 1 or top >= high - 1:
        return None
    return max(left, 0.0), max(top, 0.0), min(right, wide - 1.0), min(bottom, high - 1.0)


def read_calibration(text: str, camera: str = "P2") -> tuple[Matrix, Matrix]:
    """Read KITTI's calibration of a frame.

    Args:
        text: lines of a name, a colon and numbers, row by row.
        camera: name of the projection; ``P2`` is that of the left colour camera.

    Returns:
        ``cam2img`` and ``lidar2cam``, 4 x 4: the projection, and R0_rect times Tr_velo_to_cam.

    Raises:
        UndecodableFrame: a matrix is missing or has another size.
    """
    found: dict[str, Matrix] = {}
    for line in text.splitlines():
        name, _, numbers = line.partition(":" if ":" in line else " ")
        try:
            found[name.strip()] = np.array(numbers.split(), np.float64)
        except ValueError:
            continue
    matrices = []
    for names, shape in (
        ((camera,), (3, 4)),
        (("R0_rect", "R_rect"), (3, 3)),
        (("Tr_velo_to_cam", "Tr_velo_cam"), (3, 4)),
    ):
        values = next((found[name] for name in names if name in found), None)
        if values is None or values.size != shape[0] * shape[1]:
            raise UndecodableFrame(
                f"the calibration lacks {names[0]} ({shape[0] * shape[1]} numbers), as KITTI's have"
            )
        matrices.append(square(values.reshape(shape)))
    projection, rectification, velodyne = matrices
    return projection, rectification @ velodyne


def camera_of(matrices: Mapping[str, Any], size: tuple[int, int]) -> Camera:
    """Make a camera of matrices by name.

    Args:
        matrices: ``cam2img``, of up to 4 x 4, and ``lidar2cam`` for boxes in LiDAR coordinates; others are ignored.
        size: width and height of the image, pixels.

    Raises:
        UndecodableFrame: a matrix is missing, or is none.
    """
    found: dict[str, Matrix] = {}
    for name in ("cam2img", "lidar2cam"):
        if matrices.get(name) is None:
            continue
        try:
            matrix = np.array(matrices[name], np.float64)
        except (TypeError, ValueError):
            matrix = np.zeros(())
        if matrix.ndim != 2 or not all(3 <= n <= 4 for n in matrix.shape) or not np.isfinite(matrix).all():
            raise UndecodableFrame(f"{name} must be a matrix of 3 x 3 to 4 x 4 finite numbers")
        found[name] = square(matrix)
    if "cam2img" not in found:
        raise UndecodableFrame("the calibration lacks cam2img")
    return Camera(found["cam2img"], found.get("lidar2cam"), size)


def square(matrix: Matrix) -> Matrix:
    """Fill a matrix up to 4 x 4 from the identity."""
    filled = np.eye(4)
    filled[: matrix.shape[0], : matrix.shape[1]] = matrix
    return filled


def _wrap(angle: float) -> float:
    """Return an angle from -pi to pi."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


def _type(name: str) -> str:
    return "_".join(str(name).split()) or "unnamed"


def _floats(values: Any) -> str:
    return " ".join(f"{float(value):.4f}" for value in values)
