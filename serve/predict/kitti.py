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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, ServeError, UndecodableFrame
from serve.predict.frames import Frame
from serve.protocol.batch import Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.image_size import image_size
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["Camera", "CameraFinder", "format_labels", "read_kitti_calibration"]

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


def format_labels(answer: Mapping[str, Any], camera: Camera | None) -> str:
    """Write the label file of one frame.

    Args:
        answer: detections in 2D, or in 3D with boxes in LiDAR or camera coordinates.
        camera: the camera; may be None for detections in 2D.

    Raises:
        BadRequest: the answer has no boxes that KITTI's labels can hold.
    """
    if "bboxes" in answer:
        rows = zip(answer["names"], answer["bboxes"], answer["scores"], strict=True)
        return "".join(
            f"{_type(name)} -1 -1 -10 {_floats(box[:4])} {_UNKNOWN_3D} {score:.6f}\n"
            for name, box, score in rows
        )
    kind = answer.get("box_type_3d")
    if "bboxes_3d" not in answer or kind not in ("LiDAR", "Camera"):
        found = f"boxes of type {kind}" if "bboxes_3d" in answer else "labels of points or pixels, no boxes"
        raise BadRequest(
            f"KITTI's labels hold boxes in LiDAR or camera coordinates; this model gives {found}"
        )
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


def read_kitti_calibration(text: str, camera: str = "P2") -> tuple[Matrix, Matrix]:
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
        matrices.append(_square(values.reshape(shape)))
    projection, rectification, velodyne = matrices
    return projection, rectification @ velodyne


class CameraFinder:
    """Finds the camera of a frame: in a given file, among the frame's parts, or beside it as in KITTI's folders.

    Args:
        calibration: file for all frames, or folder with ``NAME.txt`` or ``NAME.json`` for each.
        size: width and height of the images, pixels.
    """

    def __init__(self, calibration: Path | None = None, size: tuple[int, int] | None = None) -> None:
        """See the class."""
        if calibration is not None and not calibration.exists():
            raise BadRequest(f"calibration {calibration} does not exist")
        self._given, self._size = calibration, size

    def find(self, frame: Frame, body: Body, answer: Mapping[str, Any]) -> Camera | None:
        """Return the camera of a frame; None if its labels need none.

        Raises:
            BadRequest: calibration or size are not known; the message names what is missing.
        """
        if "bboxes_3d" not in answer:
            return None
        needs_lidar = answer.get("box_type_3d") == "LiDAR"
        projection, lidar2cam = self._calibration(frame, body, needs_lidar)
        return Camera(projection, lidar2cam, self._size or self._image_size(frame, body))

    def _calibration(self, frame: Frame, body: Body, needs_lidar: bool) -> tuple[Matrix, Matrix | None]:
        needed = ("cam2img", "lidar2cam") if needs_lidar else ("cam2img",)
        name = Path(frame.stem).name
        tried = [self._given] if self._given is not None and self._given.is_file() else []
        if self._given is not None and self._given.is_dir():
            tried += [self._given / f"{name}.txt", self._given / f"{name}.json"]
        if self._given is None and isinstance(body, Mapping) and "calibration" in body:
            return _parse(body["calibration"], ".json", needed, f"the calibration of {frame.name}")
        if self._given is None and frame.path is not None:
            tried += [frame.path.parent.parent / "calib" / f"{name}.txt"]
        for path in tried:
            if path.is_file():
                return _parse(path.read_bytes(), path.suffix, needed, f"calibration {path}")
        where = f" (not at {', '.join(map(str, tried))})" if tried else ""
        raise BadRequest(
            f"KITTI's labels are in camera coordinates, and {frame.name} has no calibration{where}; pass --calib "
            f"with a folder of KITTI's calib/*.txt, or with a JSON file of {' and '.join(needed)}"
        )

    def _image_size(self, frame: Frame, body: Body) -> tuple[int, int]:
        image: Bytes | None = body.get("image") if isinstance(body, Mapping) else None
        if image is None and frame.path is not None:
            name = Path(frame.stem).name
            folder = frame.path.parent.parent / "image_2"
            found = [folder / f"{name}{suffix}" for suffix in FRAME_SUFFIXES["image"]]
            image = next((path.read_bytes() for path in found if path.is_file()), None)
        if image is None:
            raise BadRequest(
                f"KITTI's labels hold what is in the image, and the size of the image of {frame.name} is not known; "
                "pass --image-size, such as 1242x375, or keep KITTI's folder image_2 beside the clouds"
            )
        return image_size(image)


def _parse(body: Bytes, suffix: str, needed: tuple[str, ...], what: str) -> tuple[Matrix, Matrix | None]:
    try:
        if suffix == ".txt":
            return read_kitti_calibration(bytes(body).decode("utf-8", "replace"))
        matrices: Any = parse_calibration(body, needed)
    except ServeError as error:
        raise BadRequest(f"{what} does not do for KITTI's labels: {error}") from error
    return _square(matrices["cam2img"]), matrices.get("lidar2cam")


def _square(matrix: Matrix) -> Matrix:
    """Fill a matrix up to 4 x 4 from the identity."""
    square = np.eye(4)
    square[: matrix.shape[0], : matrix.shape[1]] = matrix
    return square


def _wrap(angle: float) -> float:
    """Return an angle from -pi to pi."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


def _type(name: str) -> str:
    return "_".join(str(name).split()) or "unnamed"


def _floats(values: Any) -> str:
    return " ".join(f"{float(value):.4f}" for value in values)
