"""Cameras of frames on disk, for KITTI's labels (`serve.formats.kitti`).

Boxes in LiDAR coordinates need a calibration (KITTI's ``calib/NAME.txt``, or JSON) and the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, ServeError
from serve.formats.kitti import Camera, read_calibration, square
from serve.predict.frames import Frame
from serve.protocol.batch import Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.image_size import image_size
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["CameraFinder"]

Matrix = npt.NDArray[np.float64]


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
            return read_calibration(bytes(body).decode("utf-8", "replace"))
        matrices: Any = parse_calibration(body, needed)
    except ServeError as error:
        raise BadRequest(f"{what} does not do for KITTI's labels: {error}") from error
    return square(matrices["cam2img"]), matrices.get("lidar2cam")
