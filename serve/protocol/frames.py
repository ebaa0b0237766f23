"""Frame decoding: bytes to arrays, with all checks, and JSON encoding of answers.

A *frame* is the input of one inference: a point cloud as float32 (N, load_dim), an image as uint8 (H, W, 3) BGR, or
several such parts by name. Every mistake of a caller in these bytes raises a `ClientError`; limits are checked before
memory is allocated. `FrameSpec` describes the frames of a model.

Formats:

* ``.bin``: float32, little-endian, `load_dim` numbers per point, no header (KITTI, nuScenes).
* ``.npy``, ``.npz``, PCD, PLY, LAS, LAZ: columns by name or in the model's order (`serve.protocol.points`).
* Images of every format that OpenCV reads (`serve.protocol.images`).
* JSON calibrations, see `serve.protocol.calibration`; sweeps, see `serve.protocol.sweeps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from serve.errors import BadRequest, FrameTooLarge, UndecodableFrame, UnknownOption, quote
from serve.protocol.batch import MAX_PARTS, Body, Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.frame_warnings import FrameWarning, PointExpectations, check_points
from serve.protocol.images import Decoder, decode_image
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, decode_text, read_json
from serve.protocol.points import PointLayout, decode_points, parse_columns
from serve.protocol.selection import parse_classes, parse_fields, parse_thresholds
from serve.protocol.sweeps import (
    Sweep,
    SweepSpec,
    check_sweeps_option,
    decode_sweeps,
    describe_lags,
    is_sweep_part,
    list_sweeps,
    parse_sweeps,
)
from serve.settings import Limits

__all__ = [
    "DEFAULT_OPTIONS",
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

# Of the part `text`, which is a sentence.
_MAX_TEXT_BYTES = 1 << 20
Modality = Literal["lidar", "depth", "image", "mono3d", "multiview", "fusion"]
# Modality → description and parts of a frame.
MODALITIES: Mapping[Modality, str] = {
    "lidar": "a point cloud in the LiDAR frame (points)",
    "depth": "a point cloud of a depth camera or an indoor scan, x right, y forward, z up (points)",
    "image": "an image (image)",
    "mono3d": "an image and its calibration (image, calibration)",
    "multiview": "images of several cameras and their calibration (image.<CAMERA> for each, calibration)",
    "fusion": "a point cloud, an image and their calibration (points, image, calibration)",
}


@dataclass(frozen=True)
class FrameSpec:
    """Frames that a model accepts.

    Attributes:
        modality: one of `MODALITIES`.
        load_dim: float32 numbers per point in a ``.bin`` (point clouds only).
        color_type: mmcv's name for the channels of a decoded image.
        decoder: ``cv2``, or ``pillow`` (``color`` only), whose pixels of a JPEG differ by one level in places.
        cameras: names of the cameras in the model's order (multi-view only).
        calibration: names of the matrices that the model needs for each camera.
        used_columns: indices of the columns of a point that the model uses; None for all.
        sweeps: earlier point clouds that a frame may have; None if the model takes one cloud.
        expected: what the model expects of a point cloud, for warnings.
    """

    modality: Modality
    load_dim: int = 4
    color_type: str = "color"
    decoder: Decoder = "cv2"
    cameras: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    used_columns: tuple[int, ...] | None = None
    sweeps: SweepSpec | None = None
    expected: PointExpectations = field(default_factory=PointExpectations)

    @property
    def layout(self) -> PointLayout:
        """Columns of the points."""
        is_depth = self.modality == "depth" or "depth2img" in self.calibration
        return PointLayout.default(self.load_dim, is_depth=is_depth, used=self.used_columns)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the required parts of a frame; `accepts` knows the optional ones too."""
        points = ("points",) if self.has_points else ()
        images = tuple(f"image.{camera}" for camera in self.cameras)
        if self.modality in ("image", "mono3d", "fusion"):
            images = ("image",)
        return (*points, *images, *(("calibration",) if self.calibration else ()))

    @property
    def has_points(self) -> bool:
        """Whether a point cloud is among the parts."""
        return self.modality in ("lidar", "depth", "fusion")

    def accepts(self, part: str) -> bool:
        """Return whether a frame may have a part of that name."""
        return part in self.parts or (self.sweeps is not None and is_sweep_part(part))

    @property
    def warnings(self) -> tuple[FrameWarning, ...]:
        """Warnings that concern every frame of required parts only."""
        return () if self.sweeps is None else (FrameWarning("one_sweep", self.sweeps.warning),)


@dataclass(frozen=True)
class FrameOptions:
    """Options of one frame.

    Attributes:
        score_thr: minimum score of a detection, 0 to 1.
        max_detections: maximum number of detections, best first; None keeps all.
        load_dim: numbers per point as declared by the caller; checked against the model.
        num_points: number of points as declared by the caller; checked against the bytes.
        columns: columns of a point as declared by the caller, such as ``x,y,z,intensity=0``
            (`serve.protocol.points.parse_columns`).
        sweeps: ``accumulated`` if the points are several sweeps with their times already.
        classes: names of the classes whose detections are kept; None keeps all.
        class_thr: minimum score by class, in place of `score_thr`.
        fields: names of the fields that the answer has; None for all.
    """

    score_thr: float = 0.0
    max_detections: int | None = None
    load_dim: int | None = None
    num_points: int | None = None
    columns: str | None = None
    sweeps: str | None = None
    classes: tuple[str, ...] | None = None
    class_thr: tuple[tuple[str, float], ...] = ()
    fields: tuple[str, ...] | None = None


#: Of every frame that has none of its own.
DEFAULT_OPTIONS = FrameOptions()


@dataclass(frozen=True)
class Frame:
    """One decoded frame with its options.

    Attributes:
        data: (N, load_dim) float32 or (H, W[, 3]) uint8 BGR for a frame of one part; for several parts, a
            dictionary of such arrays by part name, with the calibration as `parse_calibration` returns it and the
            sweeps as `decode_sweeps` does.
        options: options of the frame.
        warnings: likely mistakes of the client.
        is_image: whether `data` is an image; a grey one may be float32 as points are.
    """

    data: npt.NDArray[Any] | dict[str, Any]
    options: FrameOptions
    warnings: tuple[FrameWarning, ...] = ()
    is_image: bool = False

    @property
    def points(self) -> npt.NDArray[np.float32] | None:
        """The point cloud among the parts, or None."""
        if isinstance(self.data, dict):
            return self.data.get("points")
        is_cloud = self.data.ndim == 2 and self.data.dtype == np.float32 and not self.is_image
        return self.data if is_cloud else None

    @property
    def has_no_points(self) -> bool:
        """Whether the frame has a point cloud, but neither it nor a sweep has points."""
        sweeps: tuple[Sweep, ...] = self.data.get("sweeps", ()) if isinstance(self.data, dict) else ()
        points = self.points
        return points is not None and not len(points) and not any(len(sweep.points) for sweep in sweeps)


def parse_options(values: Mapping[str, Any], base: FrameOptions | None = None) -> FrameOptions:
    """Parse options from query values or JSON; numbers may be strings.

    Args:
        values: values by name.
        base: values of the options that are not in `values`.

    Raises:
        UnknownOption: an unknown name, for which the message lists the known ones, or an invalid value.
    """
    if not values:  # the common case
        return base or DEFAULT_OPTIONS
    known = {each.name for each in fields(FrameOptions)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownOption(f"unknown option {quote(name)}; known: {', '.join(sorted(known))}")
        match name:
            case "score_thr":
                changes[name] = _parse_score(name, value)
            case "columns":
                changes[name] = _check_columns(name, value)
            case "sweeps":
                changes[name] = check_sweeps_option(value)
            case "classes":
                changes[name] = parse_classes(name, value)
            case "class_thr":
                changes[name] = parse_thresholds(name, value)
            case "fields":
                changes[name] = parse_fields(name, value)
            case _:
                changes[name] = _parse_count(name, value)
    return replace(base or DEFAULT_OPTIONS, **changes)


def _parse_score(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise UnknownOption(f"{name} must be a number from 0 to 1, got {quote(value)}")
    return number


def _check_columns(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise UnknownOption(f"{name} must be text, as in x,y,z,intensity=0, got {quote(value)}")
    parse_columns(value)
    return value


def _parse_count(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 2**31:
        raise UnknownOption(f"{name} must be an integer >= 0, got {quote(value)}")
    return number


def is_part(name: str, value: Any = None) -> bool:
    """Return whether a form field or JSON member is a part of a frame rather than an option.

    Args:
        name: its name.
        value: its value, if known: ``sweeps`` is a part or an option, depending on it.
    """
    if name in ("points", "image", "calibration", "text") or name.startswith("image."):
        return True
    return is_sweep_part(name, value)


def decode_frame(body: Body, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Frame:
    """Decode one frame.

    Args:
        body: bytes of a frame of one part, or of each part by name.
        spec: frames that the model accepts.
        options: options of the frame.
        limits: limits; on bytes of all parts together, on points and pixels of each part.

    Raises:
        BadRequest: a part is missing or unexpected.
        FrameTooLarge: more bytes, points or pixels than `limits` allow.
        UndecodableFrame: the bytes are not a frame of this model.
        NonFinitePoints: the points contain NaN or inf.
    """
    size = sum(map(len, body.values())) if isinstance(body, Mapping) else len(body)
    if size > limits.max_frame_bytes:
        raise FrameTooLarge(f"the frame has {size} bytes, the limit is {limits.max_frame_bytes}")
    if isinstance(body, Mapping):
        _check_parts(body, spec)
    elif len(spec.parts) > 1:
        raise BadRequest(f"this model takes {_format_parts(spec)}; send each as a form field of that name")
    else:
        body = {spec.parts[0]: body}
    if options.sweeps and (spec.sweeps is None or any(map(is_sweep_part, body))):
        raise BadRequest(
            "sweeps=accumulated is for points of several sweeps in one cloud; "
            + ("this model takes no sweeps" if spec.sweeps is None else "send these, or sweep.0, sweep.1, …")
        )
    decoded = {name: _decode_part(name, body[name], spec, options, limits) for name in spec.parts}
    warnings = check_points(decoded["points"], spec.expected) if spec.has_points else ()
    if spec.sweeps is not None:
        if any(map(is_sweep_part, body)):
            decoded["sweeps"] = decode_sweeps(
                body,
                spec.sweeps,
                limits,
                num_key_points=len(decoded["points"]),
                columns=options.columns,
                load_dim=None if options.load_dim is None else spec.sweeps.load_dim,
            )
            warnings += _warn_of_sweeps(body, spec)
        elif options.sweeps:
            warnings += _warn("sweep_times", describe_lags(decoded["points"][:, spec.sweeps.time_column]))
        else:
            warnings += spec.warnings
    if len(decoded) == 1:
        return Frame(decoded[spec.parts[0]], options, warnings, is_image=not spec.has_points)
    return Frame(decoded, options, warnings)


def _warn_of_sweeps(body: Mapping[str, Bytes], spec: FrameSpec) -> tuple[FrameWarning, ...]:
    assert spec.sweeps is not None
    poses = parse_sweeps(body["sweeps"])
    if not poses:
        return spec.warnings
    used = spec.sweeps.number
    ignored = (
        f"the model uses {used} sweeps; the latest of the {len(poses)} are used"
        if len(poses) > used
        else None
    )
    return (
        *_warn("sweeps_ignored", ignored),
        *_warn("sweep_times", describe_lags(np.array([pose.time_lag_s for pose in poses]))),
    )


def _warn(code: str, message: str | None) -> tuple[FrameWarning, ...]:
    return () if message is None else (FrameWarning(code, message),)


def _check_parts(body: Mapping[str, Bytes], spec: FrameSpec) -> None:
    missing = [name for name in spec.parts if name not in body]
    unexpected = [name[:80] for name in body if not spec.accepts(name)]
    if missing or unexpected:
        faults = [f"missing: {', '.join(missing)}"] if missing else []
        faults += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        raise BadRequest(f"this model takes {_format_parts(spec)}; {'; '.join(faults)}")


def _format_parts(spec: FrameSpec) -> str:
    optional = ", and optionally sweep.0, sweep.1, … with sweeps" if spec.sweeps else ""
    return f"{'the parts ' if len(spec.parts) > 1 else 'one part, '}{', '.join(spec.parts)}{optional}"


def _decode_part(name: str, body: Bytes, spec: FrameSpec, options: FrameOptions, limits: Limits) -> Any:
    if name == "points":
        layout = spec.layout
        if options.sweeps and spec.sweeps:
            layout = spec.sweeps.accumulated(layout)
        return decode_points(
            body,
            layout,
            limits,
            columns=options.columns,
            load_dim=options.load_dim,
            num_points=options.num_points,
        )
    if name == "calibration":
        return parse_calibration(body, spec.calibration, spec.cameras)
    try:
        image = decode_image(body, spec.color_type, spec.decoder, limits.max_pixels)
        if spec.cameras and image.ndim != 3:
            raise UndecodableFrame("the image is grey; images of several cameras must have three channels")
        if spec.cameras and image.shape[2] != 3:
            raise UndecodableFrame(f"the image has {image.shape[2]} channels; three are expected")
    except UndecodableFrame as error:
        raise (UndecodableFrame(f"{name}: {error}") if spec.cameras else error) from None
    return image


def decode_json_request(body: Bytes) -> tuple[Body, dict[str, Any]]:
    """Read a frame and its options from JSON of one of the shapes of `read_json_frame`.

    Raises:
        BadRequest: the body is not JSON, has none of these shapes, or is not base64.
        FrameTooLarge: it is beyond the `JsonBounds`.
    """
    return read_json_frame(read_json(body, JsonBounds()))


def read_json_frame(document: Any) -> tuple[Body, dict[str, Any]]:
    """Read a frame and its options from parsed JSON.

    ``{"b64": "…", <options>}`` or a bare base64 string for a frame of one part;
    ``{"points": {"b64": "…"}, "image": {"b64": "…"}, "calibration": {…}, <options>}`` for several parts;
    ``{"points": {"b64": "…"}, "sweeps": [{"points": {"b64": "…"}, "time_lag_s": …, "transform": […]}, …]}`` for sweeps.

    Returns:
        The bytes (or those of each part by name) and the options.

    Raises:
        BadRequest: the document has none of these shapes, or is not base64.
    """
    if isinstance(document, str | LongText):
        document = {"b64": document}
    if (
        isinstance(document, dict)
        and "b64" not in document
        and any(is_part(*each) for each in document.items())
    ):
        document = list_sweeps(document)
        if len(document) > MAX_PARTS:
            raise FrameTooLarge(f"the frame has {len(document)} members, the limit is {MAX_PARTS}")
        parts = {name: _json_part(name, value) for name, value in document.items() if is_part(name, value)}
        return parts, {name: value for name, value in document.items() if name not in parts}
    if not isinstance(document, dict) or not isinstance(document.get("b64"), str | LongText):
        raise BadRequest(
            'JSON must be {"b64": "<base64 of the frame>", …options}, or {"image": {"b64": "…"}, …} by part'
        )
    options = {name: value for name, value in document.items() if name != "b64"}
    return _base64("b64", document["b64"]), options


def _json_part(name: str, value: Any) -> Bytes:
    """Return the bytes of a part: decoded base64, or the document itself for calibration and text."""
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str | LongText):
        return _base64(name, value["b64"])
    if (name == "calibration" and isinstance(value, dict)) or (
        name == "sweeps" and isinstance(value, list | dict)
    ):
        try:
            return encode_json(value)
        except (
            TypeError
        ) as error:  # a text of 64 KiB in it; what another parser let pass, as TorchServe's does
            raise BadRequest(f"{name} holds what it cannot: {str(error)[:200]}") from None
    if name == "text" and isinstance(value, str | LongText):
        return decode_text(value, _MAX_TEXT_BYTES)
    expected = {"calibration": "a JSON object of matrices", "sweeps": "a list"}.get(
        name, '{"b64": "<base64>"}'
    )
    raise BadRequest(f"{name[:80]} must be {expected}")


def _base64(name: str, encoded: str | LongText) -> Bytes:
    try:
        return decode_base64(encoded)
    except ValueError as error:
        raise BadRequest(f"{name[:80]} is not base64: {error}") from None


def encode_json(document: Any) -> bytes:
    """Encode as JSON; numpy arrays become lists, float32 its shortest exact decimal."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
