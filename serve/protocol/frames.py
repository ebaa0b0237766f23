"""Bytes to frames, detections to bytes.

A *frame* is what one inference takes: a point cloud as float32 (N, load_dim), an image as uint8
(H, W, 3) BGR, or several such parts by name. Everything a caller can get wrong about the bytes is found
here and raised as a `ClientError`; limits are checked before memory is taken. Knows nothing about HTTP,
TorchServe, torch or any model: what a model wants is said by `FrameSpec`.

Formats:

* ``.bin``: float32, little-endian, `load_dim` numbers per point, no header (KITTI, nuScenes).
* ``.npy``, ``.npz``, PCD, PLY, LAS, LAZ: columns by name or in the model's order (`serve.protocol.points`).
* JPEG, PNG, WebP, BMP images.
* JSON calibrations, see `serve.protocol.calibration`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from serve.errors import BadRequest, FrameTooLarge, UndecodableFrame, UnknownOption
from serve.protocol.batch import Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.images import Decoder, decode_image
from serve.protocol.points import PointLayout, decode_points, parse_columns
from serve.settings import Limits

__all__ = [
    "MODALITIES",
    "Frame",
    "FrameOptions",
    "FrameSpec",
    "Limits",
    "decode_frame",
    "decode_json_request",
    "encode_json",
    "is_part",
    "parse_options",
    "read_json_frame",
]

Modality = Literal["lidar", "depth", "image", "mono3d", "multiview", "fusion"]
# What the words mean, with the parts of a frame.
MODALITIES: Mapping[Modality, str] = {
    "lidar": "a cloud in the LiDAR frame (points)",
    "depth": "a cloud of a depth camera or an indoor scan, x right, y forward, z up (points)",
    "image": "a picture (image)",
    "mono3d": "a picture and its camera (image, calibration)",
    "multiview": "pictures of several cameras (image.<CAMERA> of each, calibration)",
    "fusion": "a cloud, a picture and how they belong together (points, image, calibration)",
}


@dataclass(frozen=True)
class FrameSpec:
    """What a model takes.

    Attributes:
        modality: one of `MODALITIES`.
        load_dim: float32 numbers per point in a ``.bin`` (clouds only).
        color_type: mmcv's name of the way an image is decoded.
        decoder: ``cv2``, or ``pillow`` (``color`` only), whose pixels of a JPEG differ by a level here and there.
        cameras: names of the cameras in the model's order (multi-view only).
        calibration: names of the matrices the model needs, of every camera.
        used_columns: indices of the columns of a point that the model looks at; None: all.
    """

    modality: Modality
    load_dim: int = 4
    color_type: str = "color"
    decoder: Decoder = "cv2"
    cameras: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    used_columns: tuple[int, ...] | None = None

    @property
    def layout(self) -> PointLayout:
        """Columns of the points."""
        is_depth = self.modality == "depth" or "depth2img" in self.calibration
        return PointLayout.default(self.load_dim, is_depth=is_depth, used=self.used_columns)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of a frame; all of them are required."""
        points = ("points",) if self.has_points else ()
        images = tuple(f"image.{camera}" for camera in self.cameras)
        if self.modality in ("image", "mono3d", "fusion"):
            images = ("image",)
        return (*points, *images, *(("calibration",) if self.calibration else ()))

    @property
    def has_points(self) -> bool:
        """Whether a cloud is among the parts."""
        return self.modality in ("lidar", "depth", "fusion")


@dataclass(frozen=True)
class FrameOptions:
    """What a caller may say about one frame.

    Attributes:
        score_thr: leave out detections with a lower score, 0 to 1.
        max_detections: keep at most so many, best first; None keeps all.
        load_dim: the caller's own float count per point; checked against the model's.
        num_points: the caller's own point count; checked against the bytes.
        columns: the caller's own columns, as in ``x,y,z,intensity=0`` (`serve.protocol.points.parse_columns`).
    """

    score_thr: float = 0.0
    max_detections: int | None = None
    load_dim: int | None = None
    num_points: int | None = None
    columns: str | None = None


@dataclass(frozen=True)
class Frame:
    """One decoded frame with its options.

    Attributes:
        data: (N, load_dim) float32 or (H, W[, 3]) uint8 BGR for a frame of one part; for several, a
            dictionary by part name of such arrays, with the calibration as `serve.protocol.calibration` gives it.
        options: what the caller asked for.
    """

    data: npt.NDArray[Any] | dict[str, Any]
    options: FrameOptions

    @property
    def points(self) -> npt.NDArray[np.float32] | None:
        """The cloud among the parts; None where there is none."""
        if isinstance(self.data, dict):
            return self.data.get("points")
        return self.data if self.data.ndim == 2 and self.data.dtype == np.float32 else None


def parse_options(values: Mapping[str, Any], base: FrameOptions | None = None) -> FrameOptions:
    """FrameOptions from query values or JSON; strings and numbers alike.

    Raises:
        UnknownOption: an unknown name or an impossible value; the message lists what is known.
    """
    if not values:  # as nearly always
        return base or FrameOptions()
    known = {field.name for field in fields(FrameOptions)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownOption(f"unknown option '{name}'; known are: {', '.join(sorted(known))}")
        match name:
            case "score_thr":
                changes[name] = _score(name, value)
            case "columns":
                changes[name] = _columns(name, value)
            case _:
                changes[name] = _count(name, value)
    return replace(base or FrameOptions(), **changes)


def _score(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise UnknownOption(f"{name} must be a number from 0 to 1, got {value!r}")
    return number


def _columns(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise UnknownOption(f"{name} must be text, as in x,y,z,intensity=0, got {str(value)[:80]!r}")
    parse_columns(value)
    return value


def _count(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 2**31:
        raise UnknownOption(f"{name} must be a whole number of 0 or more, got {value!r}")
    return number


def is_part(name: str) -> bool:
    """Whether a form field or JSON member of that name is a part of a frame, not an option."""
    return name in ("points", "image", "calibration", "text") or name.startswith("image.")


def decode_frame(body: Body, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Frame:
    """Decode one frame.

    Args:
        body: the bytes of a frame of one part, or those of each part by name.
        spec: what the model takes.
        options: what the caller says about the frame.
        limits: bounds; bytes are counted over all parts, points and pixels of each.

    Raises:
        BadRequest: a part is missing or superfluous.
        FrameTooLarge: more bytes, points or pixels than `limits` allow.
        UndecodableFrame: not a frame of this kind.
        NonFinitePoints: NaN or inf among the points.
    """
    size = sum(map(len, body.values())) if isinstance(body, Mapping) else len(body)
    if size > limits.max_frame_bytes:
        raise FrameTooLarge(f"the frame has {size} bytes, the limit is {limits.max_frame_bytes}")
    if isinstance(body, Mapping):
        _check_parts(body, spec)
    elif len(spec.parts) > 1:
        raise BadRequest(f"this model takes {_spelled(spec)}; send each as a form field of that name")
    else:
        body = {spec.parts[0]: body}
    decoded = {name: _decode_part(name, body[name], spec, options, limits) for name in spec.parts}
    if len(decoded) == 1:
        return Frame(decoded[spec.parts[0]], options)
    return Frame(decoded, options)


def _check_parts(body: Mapping[str, Bytes], spec: FrameSpec) -> None:
    missing = [name for name in spec.parts if name not in body]
    superfluous = [name[:80] for name in body if name not in spec.parts]
    if missing or superfluous:
        faults = [f"missing: {', '.join(missing)}"] if missing else []
        faults += [f"superfluous: {', '.join(superfluous)}"] if superfluous else []
        raise BadRequest(f"this model takes {_spelled(spec)}; {'; '.join(faults)}")


def _spelled(spec: FrameSpec) -> str:
    return f"{'the parts ' if len(spec.parts) > 1 else 'one part, '}{', '.join(spec.parts)}"


def _decode_part(name: str, body: Bytes, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Any:
    if name == "points":
        return decode_points(
            body,
            spec.layout,
            limits,
            columns=options.columns,
            load_dim=options.load_dim,
            num_points=options.num_points,
        )
    if name == "calibration":
        return parse_calibration(body, spec.calibration, spec.cameras)
    try:
        picture = decode_image(body, spec.color_type, spec.decoder, limits.max_pixels)
        if spec.cameras and picture.ndim != 3:
            raise UndecodableFrame("the image is grey; pictures of several cameras must have three channels")
        if spec.cameras and picture.shape[2] != 3:
            raise UndecodableFrame(f"the image has {picture.shape[2]} channels; three are expected")
    except UndecodableFrame as error:
        raise (UndecodableFrame(f"{name}: {error}") if spec.cameras else error) from None
    return picture


def decode_json_request(body: Bytes) -> tuple[Body, dict[str, Any]]:
    """A frame in JSON, and its options; `read_json_frame` says in which shapes.

    Raises:
        BadRequest: not JSON, or not one of these shapes, or not base64.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is declared as JSON but does not parse: {error}") from None
    return read_json_frame(document)


def read_json_frame(document: Any) -> tuple[Body, dict[str, Any]]:
    """A frame of parsed JSON, and its options.

    ``{"b64": "…", <options>}`` or a bare base64 string for a frame of one part;
    ``{"points": {"b64": "…"}, "image": {"b64": "…"}, "calibration": {…}, <options>}`` for one of several.

    Returns:
        The bytes (or those of each part by name) and the options.

    Raises:
        BadRequest: not one of these shapes, or not base64.
    """
    if isinstance(document, str):
        document = {"b64": document}
    if isinstance(document, dict) and "b64" not in document and any(map(is_part, document)):
        parts = {name: _json_part(name, value) for name, value in document.items() if is_part(name)}
        return parts, {name: value for name, value in document.items() if not is_part(name)}
    if not isinstance(document, dict) or not isinstance(document.get("b64"), str):
        raise BadRequest(
            'JSON must be {"b64": "<base64 of the frame>", …options}, or {"image": {"b64": "…"}, …} by part'
        )
    options = {name: value for name, value in document.items() if name != "b64"}
    return _base64("b64", document["b64"]), options


def _json_part(name: str, value: Any) -> bytes:
    """The bytes of a part: base64, or the document itself where the part is one."""
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        return _base64(name, value["b64"])
    if name == "calibration" and isinstance(value, dict):
        return encode_json(value)
    if name == "text" and isinstance(value, str):
        return value.encode()
    expected = "a JSON object of matrices" if name == "calibration" else '{"b64": "<base64>"}'
    raise BadRequest(f"{name[:80]} must be {expected}")


def _base64(name: str, encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{name[:80]} is not base64: {error}") from None


def encode_json(document: Any) -> bytes:
    """JSON; numpy arrays become lists, float32 in its shortest exact spelling."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
