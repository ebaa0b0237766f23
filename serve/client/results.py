"""Typed results: an answer as arrays, names and masks, and in the formats of KITTI and COCO."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, MissingPackage, UndecodableFrame
from serve.formats.coco import CocoIds, results_of
from serve.formats.kitti import Camera, camera_of, format_labels, read_calibration
from serve.formats.labels import decode_labels, decode_mask

__all__ = ["MissingField", "Result"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)
_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")


class MissingField(BadRequest, AttributeError):
    """An answer has not what was asked of it: its model gives something else, or `fields` left it out."""


class Result(Mapping[str, Any]):
    """Result of one frame; it cannot be changed.

    Detections are sorted by score, best first, N of them. A property that the answer does not have raises
    `MissingField`. The result is also a mapping of the answer's fields as the server names them (docs/answers.md).

    Attributes:
        encoded: the answer as the server sent it, JSON.
    """

    def __init__(self, answer: Mapping[str, Any], encoded: bytes, headers: Mapping[str, str]) -> None:
        """Take an answer, its bytes and the headers with which it came, by lower-case names."""
        self._answer = MappingProxyType(dict(answer))
        self._headers = dict(headers)
        self.encoded = encoded

    def __getitem__(self, name: str) -> Any:
        return self._answer[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answer)

    def __len__(self) -> int:
        return len(self._answer)

    def __reduce__(self) -> tuple[type[Result], tuple[dict[str, Any], bytes, dict[str, str]]]:
        # For other processes: a view of a dictionary cannot be pickled.
        return type(self), (dict(self._answer), self.encoded, self._headers)

    def __hash__(self) -> int:
        return hash(self.encoded)

    def __repr__(self) -> str:
        shown = f"{len(self['names'])} detections" if "names" in self else ", ".join(self)
        return f"<Result of {self.model.get('name', 'a model')}: {shown}>"

    # Detections

    @property
    def is_3d(self) -> bool:
        """Whether the detections are boxes in 3D."""
        return "bboxes_3d" in self or "scores_3d" in self

    @cached_property
    def boxes(self) -> Floats:
        """Boxes.

        In 3D (N, 7) x, y, z of the bottom centre, dx, dy, dz in metres and yaw in radians, or (N, 9) with vx, vy in
        metres per second, in the coordinates of `box_type`; in 2D (N, 4) x1, y1, x2, y2 in pixels.
        """
        values = np.array(self._of("bboxes"), np.float32)
        return _frozen(values.reshape(len(values), -1) if values.size else values.reshape(0, self._width))

    @property
    def _width(self) -> int:
        return 7 if self.is_3d else 4

    @cached_property
    def scores(self) -> Floats:
        """Scores (N,)."""
        return _frozen(np.array(self._of("scores"), np.float32))

    @cached_property
    def labels(self) -> Ints:
        """Labels (N,), indices into `classes`."""
        return _frozen(np.array(self._of("labels"), np.int64))

    @property
    def names(self) -> tuple[str, ...]:
        """Class of each detection."""
        return tuple(self._field("names"))

    @property
    def box_type(self) -> str | None:
        """Coordinates of boxes in 3D: ``LiDAR``, ``Camera`` or ``Depth``; None in 2D."""
        return self._answer.get("box_type_3d")

    @cached_property
    def masks(self) -> npt.NDArray[np.bool_]:
        """Masks of the detections, (N, H, W)."""
        decoded = [decode_mask(each) for each in self._field("masks")]
        return _frozen(np.array(decoded, bool) if decoded else np.zeros((0, 0, 0), bool))

    # Labels

    @cached_property
    def point_labels(self) -> Ints:
        """Label of each point in the order sent, of a segmentor of point clouds."""
        return _frozen(decode_labels(self._field("pts_semantic_mask")))

    @property
    def segments(self) -> tuple[Mapping[str, Any], ...]:
        """Segments of a panoptic model, each with ``id``, ``category_id``, ``name``, ``area`` and ``bbox``."""
        return tuple(MappingProxyType(each) for each in self._field("segments_info"))

    @property
    def panoptic_png(self) -> bytes:
        """Map of a panoptic model in COCO's format, a PNG."""
        return base64.b64decode(self._field("panoptic_seg")["png_b64"])

    @cached_property
    def segment_ids(self) -> Ints:
        """Id of the segment of each pixel (H, W), 0 for none; needs Pillow.

        Raises:
            MissingPackage: Pillow is not installed.
        """
        png = self.panoptic_png
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingPackage("reading a panoptic map needs Pillow; pip install pillow") from error
        with Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image.convert("RGB"), np.int64)
        return _frozen(pixels @ np.array([1, 256, 65536]))

    # About the answer

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the model's classes, by label."""
        return tuple(self._field("classes"))

    @property
    def model(self) -> Mapping[str, str]:
        """Name and version of the model; empty if `fields` left it out."""
        return MappingProxyType(dict(self._answer.get("model") or {}))

    @property
    def warnings(self) -> tuple[Mapping[str, str], ...]:
        """Likely mistakes in the frame, each with ``code`` and ``message``."""
        return tuple(MappingProxyType(each) for each in self._answer.get("warnings", ()))

    @property
    def request_id(self) -> str | None:
        """Id of the request, which the server's log has."""
        return self._headers.get("x-request-id")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Duration of each stage in the gateway, seconds; empty of TorchServe."""
        found = _TIMING.findall(self._headers.get("server-timing", ""))
        return MappingProxyType({stage: float(spent_ms) / 1e3 for stage, spent_ms in found})

    # Formats

    def to_kitti(
        self,
        calibration: Camera | Mapping[str, Any] | str | Path | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> str:
        """Return the detections as KITTI's label file, as ``mmdet3d-serve predict --format kitti`` writes it.

        Args:
            calibration: for boxes in 3D: path of KITTI's ``calib/NAME.txt``, or matrices by name, ``cam2img`` and, for
                boxes in LiDAR coordinates, ``lidar2cam``.
            image_size: for boxes in 3D: width and height of the image, pixels; boxes out of it have no line.

        Raises:
            BadRequest: the calibration or the size is missing, or these are no boxes that KITTI's labels can hold.
            UndecodableFrame: the calibration cannot be read.
        """
        camera: Camera | None = None
        if isinstance(calibration, Camera):
            camera = calibration
        elif calibration is not None and image_size is not None:
            camera = _read_camera(calibration, image_size)
        if "bboxes_3d" in self:
            self._field("box_type_3d")
            if camera is None:
                raise BadRequest("KITTI's labels of boxes in 3D need calibration and image_size")
        with self._complete():
            return format_labels(self._answer, camera)

    def to_coco(
        self, image_id: int = 0, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the detections as COCO's results, as ``mmdet3d-serve predict --format coco`` writes them.

        Args:
            image_id: id of the image.
            category_ids: ids by name of class; without them COCO's own for its 80 classes, else the labels.

        Raises:
            BadRequest: these are no boxes in an image, or a class has no id.
        """
        line = {"frame": "", "answer": self._answer}
        with self._complete():
            return list(results_of([line], _GivenIds(image_id, category_ids)))

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Map a missing field to its error, of what is made from several."""
        try:
            yield
        except KeyError as error:
            self._field(str(error.args[0]))
            raise

    def _of(self, name: str) -> Any:
        """Return a field that has another name in 3D."""
        return self._field(f"{name}_3d" if f"{name}_3d" in self._answer else name)

    def _field(self, name: str) -> Any:
        try:
            return self._answer[name]
        except KeyError:
            raise MissingField(f"this answer has no {name}; it has {', '.join(self._answer)}") from None


class _GivenIds(CocoIds):
    """The id of one image, and those of classes if there are any."""

    def __init__(self, image_id: int, category_ids: Mapping[str, int] | None) -> None:
        super().__init__()
        self._image_id, self._given = image_id, category_ids

    def image(self, name: str) -> int:
        return self._image_id

    def category(self, label: int, name: str, classes: list[str]) -> Any:
        if self._given is None:
            return super().category(label, name, classes)
        if name not in self._given:
            raise BadRequest(f"class {name!r} has no id in category_ids")
        return self._given[name]


def _read_camera(calibration: Mapping[str, Any] | str | Path, size: tuple[int, int]) -> Camera:
    if isinstance(calibration, Mapping):
        return camera_of(calibration, size)
    try:
        text = Path(calibration).read_text("utf-8", "replace")
    except OSError as error:
        raise UndecodableFrame(f"{calibration} cannot be read: {error.strerror}") from error
    return Camera(*read_calibration(text), size)


def _frozen(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    array.flags.writeable = False
    return array
