"""Cameras of frames on disk or in a bucket, for KITTI's labels (`serve.formats.kitti`).

Boxes in LiDAR coordinates need a calibration (KITTI's ``calib/NAME.txt``, or JSON) and the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from serve import storage
from serve.errors import AccessDenied, BadRequest, ObjectNotFound, ServeError
from serve.formats.kitti import Camera, read_calibration, square
from serve.predict.frames import Frame
from serve.predict.stems import bare
from serve.protocol.batch import Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.image_size import image_size
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["CameraFinder"]

Matrix = npt.NDArray[np.float64]
_FILES = (".txt", ".json")
_IMAGES = (".png", *(suffix for suffix in FRAME_SUFFIXES["image"] if suffix != ".png"))  # KITTI's own first


class CameraFinder:
    """Finds the camera of a frame: in a given file, among the frame's parts, or beside it as in KITTI's folders.

    Args:
        calibration: file for all frames, or folder with ``NAME.txt`` or ``NAME.json`` for each; a path or a URI.
        size: width and height of the images, pixels.
    """

    def __init__(self, calibration: str | Path | None = None, size: tuple[int, int] | None = None) -> None:
        """See the class."""
        if calibration is not None and not storage.exists(calibration):
            raise BadRequest(f"calibration {calibration} does not exist")
        self._given, self._size = None if calibration is None else storage.parse(calibration), size
        self._is_file = self._given is not None and (
            Path(self._given.path).is_file()
            if self._given.scheme == "file"
            else self._given.name.lower().endswith(_FILES)
        )

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
        if self._given is None and isinstance(body, Mapping) and "calibration" in body:
            return _parse(body["calibration"], ".json", needed, f"the calibration of {frame.name}")
        if self._given is None:
            places = (_beside(frame, "calib", f"{name}.txt") for name in _names(frame))
            tried = [where for where in places if where is not None]
        elif self._is_file:
            tried = [self._given]
        else:
            tried = [_below(self._given, f"{name}{suffix}") for name in _names(frame) for suffix in _FILES]
        for where in tried:
            if (text := _read(where, is_given=self._given is not None)) is not None:
                return _parse(text, PurePosixPath(where.name).suffix, needed, f"calibration {where}")
        listed = f" (not at {', '.join(map(str, tried))})" if tried else ""
        raise BadRequest(
            f"KITTI's labels are in camera coordinates, and {frame.name} has no calibration{listed}; pass --calib "
            f"with a folder of KITTI's calib/*.txt, or with a JSON file of {' and '.join(needed)}"
        )

    def _image_size(self, frame: Frame, body: Body) -> tuple[int, int]:
        image: Bytes | None = body.get("image") if isinstance(body, Mapping) else None
        if image is None:
            places = (_beside(frame, "image_2", f"{name}{end}") for name in _names(frame) for end in _IMAGES)
            found = (_read(where) for where in places if where is not None)
            image = next((data for data in found if data is not None), None)
        if image is None:
            raise BadRequest(
                f"KITTI's labels hold what is in the image, and the size of the image of {frame.name} is not known; "
                "pass --image-size, such as 1242x375, or keep KITTI's folder image_2 beside the clouds"
            )
        return image_size(image)


def _names(frame: Frame) -> list[str]:
    """Names without suffix of files that belong to a frame: those of its results, or of the frame itself."""
    return list(dict.fromkeys((Path(frame.stem).name, Path(bare(frame.name)).name)))


def _beside(frame: Frame, folder: str, name: str) -> storage.Location | None:
    """Place of a file in the folder next to the frame's; None if the frame is in no such folder."""
    if frame.path is not None:
        return storage.Location("file", str(frame.path.parent.parent / folder / name))
    where = storage.parse(frame.origin) if isinstance(frame.origin, str) else None
    if where is None or where.scheme not in ("s3", "ffrecord"):
        return None
    inside = where.member if where.scheme == "ffrecord" else where.path
    if inside.count("/") < 1:
        return None
    path = str(PurePosixPath(inside).parent.parent / folder / name)
    return replace(where, member=path) if where.scheme == "ffrecord" else replace(where, path=path)


def _below(folder: storage.Location, name: str) -> storage.Location:
    if folder.scheme == "ffrecord":
        return replace(folder, member=f"{folder.member.rstrip('/')}/{name}".lstrip("/"))
    return folder.join(name)


def _read(where: storage.Location, *, is_given: bool = False) -> bytes | None:
    """Read a file; None if there is none, or none may be looked for beside the frame."""
    try:
        return storage.read_bytes(str(where))
    except ObjectNotFound:
        return None
    except AccessDenied:  # also of what is missing, for an account that may not list the bucket
        if is_given:
            raise
        return None


def _parse(body: Bytes, suffix: str, needed: tuple[str, ...], what: str) -> tuple[Matrix, Matrix | None]:
    try:
        if suffix == ".txt":
            return read_calibration(bytes(body).decode("utf-8", "replace"))
        matrices: Any = parse_calibration(body, needed)
    except ServeError as error:
        raise BadRequest(f"{what} does not do for KITTI's labels: {error}") from error
    return square(matrices["cam2img"]), matrices.get("lidar2cam")
