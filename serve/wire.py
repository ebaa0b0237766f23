"""Bytes to frames, detections to bytes.

A *frame* is what one inference takes: a point cloud as float32 (N, load_dim) or an image as uint8
(H, W, 3) BGR. Everything a caller can get wrong about the bytes is found here and raised as a
`ClientError`; limits are checked before memory is taken. Knows nothing about HTTP, TorchServe, torch
or any model: what a model wants is said by `FrameSpec`.

Formats:

* ``.bin``: float32, little-endian, `load_dim` numbers per point, no header (KITTI, nuScenes).
* ``.npy``: NumPy's format (NEP 1), a real array of shape (N, load_dim); never a pickle.
* JPEG, PNG, WebP, BMP images.
* a *framed batch*, several frames in one body (`pack_frames`).
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from serve.errors import BadRequest, FrameTooLarge, NonFinitePoints, UndecodableFrame, UnknownOption

__all__ = [
    "FRAMES_CONTENT_TYPE",
    "Frame",
    "FrameSpec",
    "Limits",
    "Options",
    "decode_frame",
    "decode_json_request",
    "encode_json",
    "pack_frames",
    "parse_options",
    "unpack_frames",
]

Bytes = bytes | bytearray | memoryview
Modality = Literal["lidar", "image"]

FRAMES_CONTENT_TYPE = "application/vnd.mmdet3d-serve.frames"
FRAMES_MAGIC = b"MM3DFRM1"
NPY_MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER_BYTES = 10_000  # numpy's own bound for headers it parses
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# cv2 flags for the `color_type` of mmcv's image loaders (mmcv.image.io.imread_flags).
COLOR_TYPES = {
    "color": cv2.IMREAD_COLOR,
    "grayscale": cv2.IMREAD_GRAYSCALE,
    "unchanged": cv2.IMREAD_UNCHANGED,
    "color_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR,
    "grayscale_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_GRAYSCALE,
}
# A LiDAR sees some hundred metres; what is beyond is not a coordinate but misread bytes.
MAX_COORDINATE_M = 1e6


@dataclass(frozen=True)
class Limits:
    """Upper bounds on one frame, checked before memory is taken."""

    max_frame_bytes: int = 64 << 20
    max_points: int = 2_000_000
    max_pixels: int = 50_000_000


@dataclass(frozen=True)
class FrameSpec:
    """What a model takes.

    Attributes:
        modality: ``"lidar"`` or ``"image"``.
        load_dim: float32 numbers per point in a ``.bin`` (LiDAR only).
        color_type: mmcv's name of the way an image is decoded.
    """

    modality: Modality
    load_dim: int = 4
    color_type: str = "color"


@dataclass(frozen=True)
class Options:
    """What a caller may say about one frame.

    Attributes:
        score_thr: leave out detections with a lower score, 0 to 1.
        max_detections: keep at most so many, best first; None keeps all.
        load_dim: the caller's own float count per point; checked against the model's.
        num_points: the caller's own point count; checked against the bytes.
    """

    score_thr: float = 0.0
    max_detections: int | None = None
    load_dim: int | None = None
    num_points: int | None = None


@dataclass(frozen=True)
class Frame:
    """One decoded frame with its options; `data` is (N, load_dim) float32 or (H, W[, 3]) uint8 BGR."""

    data: npt.NDArray[Any]
    options: Options


def parse_options(values: Mapping[str, Any], base: Options | None = None) -> Options:
    """Options from query values or JSON; strings and numbers alike.

    Raises:
        UnknownOption: an unknown name or an impossible value; the message lists what is known.
    """
    known = {field.name for field in fields(Options)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownOption(f"unknown option '{name}'; known are: {', '.join(sorted(known))}")
        changes[name] = _score(name, value) if name == "score_thr" else _count(name, value)
    return replace(base or Options(), **changes)


def _score(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise UnknownOption(f"{name} must be a number from 0 to 1, got {value!r}")
    return number


def _count(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 2**31:
        raise UnknownOption(f"{name} must be a whole number of 0 or more, got {value!r}")
    return number


def decode_frame(body: Bytes, spec: FrameSpec, options: Options, limits: Limits) -> Frame:
    """Decode one frame.

    Raises:
        FrameTooLarge: more bytes, points or pixels than `limits` allow.
        UndecodableFrame: not a frame of this kind.
        NonFinitePoints: NaN or inf among the points.
    """
    if len(body) > limits.max_frame_bytes:
        raise FrameTooLarge(f"the frame has {len(body)} bytes, the limit is {limits.max_frame_bytes}")
    if spec.modality == "lidar":
        return Frame(_decode_points(body, spec.load_dim, options, limits), options)
    return Frame(_decode_image(body, spec.color_type, limits), options)


def _decode_points(body: Bytes, load_dim: int, options: Options, limits: Limits) -> npt.NDArray[np.float32]:
    if options.load_dim is not None and options.load_dim != load_dim:
        raise UndecodableFrame(
            f"the request declares {options.load_dim} floats per point, this model takes {load_dim}"
        )
    if bytes(body[: len(NPY_MAGIC)]) == NPY_MAGIC:
        points = _read_npy(body, load_dim, limits)
    else:
        points = _read_bin(body, load_dim, options, limits)
    if options.num_points is not None and options.num_points != len(points):
        raise UndecodableFrame(
            f"the request declares {options.num_points} points, the frame holds {len(points)} of {load_dim} floats"
        )
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise NonFinitePoints(f"{bad} of {len(points)} points hold NaN or inf; remove them before sending")
    if len(points) and float(np.abs(points[:, :3]).max()) > MAX_COORDINATE_M:
        raise UndecodableFrame(
            f"coordinates reach {float(np.abs(points[:, :3]).max()):.3g} m: these bytes are not float32 "
            f"little-endian points of {load_dim} numbers starting with x, y, z in metres"
        )
    return points


def _read_bin(body: Bytes, load_dim: int, options: Options, limits: Limits) -> npt.NDArray[np.float32]:
    if len(body) == 0 and options.num_points != 0:
        raise UndecodableFrame(
            "the body is empty; an empty cloud is sent with num_points=0, or as .npy (0, load_dim)"
        )
    # Float32 coordinates always have bytes outside the printable range; text never has.
    head = bytes(body[:512])
    if head and all(byte in _PRINTABLE for byte in head):
        raise UndecodableFrame(
            'the body is text, not a point cloud; send the bytes of a .bin or .npy, or base64 as JSON {"b64": …}'
        )
    stride = 4 * load_dim
    if len(body) % stride:
        raise UndecodableFrame(
            f"{len(body)} bytes are not a whole number of points: this model takes {load_dim} float32 per point "
            f"({stride} bytes)"
        )
    if len(body) // stride > limits.max_points:
        raise FrameTooLarge(f"the cloud has {len(body) // stride} points, the limit is {limits.max_points}")
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False).reshape(-1, load_dim)


_PRINTABLE = frozenset(b"\t\n\r" + bytes(range(32, 127)))


def _read_npy(body: Bytes, load_dim: int, limits: Limits) -> npt.NDArray[np.float32]:
    """Read a .npy without numpy.load, which allocates what the header claims before looking at the bytes."""
    try:
        stream = io.BytesIO(bytes(body[:65536]))
        version = np.lib.format.read_magic(stream)
        length = struct.unpack(
            "<H" if version == (1, 0) else "<I", stream.read(2 if version == (1, 0) else 4)
        )[0]
        if length > MAX_NPY_HEADER_BYTES:
            raise ValueError(f"the header claims {length} bytes")
        start = stream.tell() + length
        header = ast.literal_eval(stream.read(length).decode("latin1"))
        shape, fortran, dtype = header["shape"], header["fortran_order"], np.dtype(header["descr"])
        rows, columns = shape
    except (ValueError, TypeError, KeyError, SyntaxError, struct.error, MemoryError, RecursionError) as error:
        raise UndecodableFrame(f"not a readable .npy header of a two-dimensional array: {error}") from None
    if dtype.kind not in "fiu" or not isinstance(rows, int) or rows < 0:
        raise UndecodableFrame(f"a cloud must be an array of numbers, got dtype {dtype}")
    if columns != load_dim:
        raise UndecodableFrame(f"the array is {tuple(shape)}, this model takes (N, {load_dim})")
    if rows > limits.max_points:
        raise FrameTooLarge(f"the cloud has {rows} points, the limit is {limits.max_points}")
    if len(body) - start != rows * columns * dtype.itemsize:
        raise UndecodableFrame(
            f"the .npy header declares {tuple(shape)} {dtype}, but {len(body) - start} bytes follow"
        )
    array = np.frombuffer(memoryview(body)[start:], dtype=dtype).reshape(
        rows, columns, order="F" if fortran else "C"
    )
    with np.errstate(over="ignore"):  # too large a double becomes inf and is refused with the others
        return np.ascontiguousarray(array, dtype=np.float32)


def _decode_image(body: Bytes, color_type: str, limits: Limits) -> npt.NDArray[np.uint8]:
    if len(body) == 0:
        raise UndecodableFrame("the body is empty; send the bytes of a JPEG, PNG, WebP or BMP image")
    _check_image(body, limits)
    pixels = cv2.imdecode(np.frombuffer(body, dtype=np.uint8), COLOR_TYPES[color_type])
    if pixels is None:
        raise UndecodableFrame("the image cannot be decoded")
    if pixels.dtype != np.uint8:
        raise UndecodableFrame(f"the image has {pixels.dtype} samples; 8 bits per channel are expected")
    decoded: npt.NDArray[np.uint8] = pixels
    return decoded


def _check_image(body: Bytes, limits: Limits) -> None:
    """Size before memory, completeness before decoding: OpenCV fills what is missing with grey and says nothing."""
    try:
        with warnings.catch_warnings():
            # Pillow's own limits warn or raise on sizes that ours refuse more plainly below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > limits.max_pixels:
                    raise FrameTooLarge(
                        f"the image is {width} x {height} pixels, the limit is {limits.max_pixels} in all"
                    )
                if image.format == "PNG":
                    image.verify()  # checksums of all chunks; does not inflate
                else:
                    # An eighth of the size in grey (JPEG only) still reads every coded byte.
                    image.draft("L", (max(1, width // 8), max(1, height // 8)))
                    image.load()
    except Image.DecompressionBombError as error:
        raise FrameTooLarge(f"the image is too large: {error}") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError) as error:
        raise UndecodableFrame(
            f"not a complete {', '.join(IMAGE_FORMATS)} image ({error}); send the unchanged bytes of the file"
        ) from None


def decode_json_request(body: Bytes) -> tuple[bytes, dict[str, Any]]:
    """A frame in JSON: ``{"b64": "…", <options>}``, or a bare base64 string. Returns the bytes and the options.

    Raises:
        BadRequest: not JSON, or not one of these shapes, or not base64.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is declared as JSON but does not parse: {error}") from None
    if isinstance(document, str):
        document = {"b64": document}
    if not isinstance(document, dict) or not isinstance(document.get("b64"), str):
        raise BadRequest('JSON must be {"b64": "<base64 of the frame>", …options}')
    encoded = document.pop("b64")
    try:
        return base64.b64decode(encoded, validate=True), document
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"b64 is not base64: {error}") from None


def pack_frames(frames: Sequence[tuple[Bytes, Mapping[str, Any]]]) -> bytes:
    """Several frames, each with its options, as one body of type `FRAMES_CONTENT_TYPE`.

    Layout: 8 bytes ``MM3DFRM1``, uint32 little-endian length of a JSON header
    ``{"frames": [{"length": bytes, "options": {…}}, …]}``, the header, the frames back to back.
    """
    entries = [{"length": len(body), "options": dict(options)} for body, options in frames]
    header = orjson.dumps({"frames": entries})
    return b"".join([FRAMES_MAGIC, struct.pack("<I", len(header)), header, *(body for body, _ in frames)])


def unpack_frames(body: Bytes) -> list[tuple[memoryview, dict[str, Any]]]:
    """Inverse of `pack_frames`; the frames are views, not copies.

    Raises:
        BadRequest: the lengths do not add up, or the header is malformed.
    """
    view = memoryview(body)
    start = len(FRAMES_MAGIC) + 4
    if len(view) < start or bytes(view[: len(FRAMES_MAGIC)]) != FRAMES_MAGIC:
        raise BadRequest(f"a body of type {FRAMES_CONTENT_TYPE} starts with {FRAMES_MAGIC.decode()}")
    (length,) = struct.unpack("<I", view[len(FRAMES_MAGIC) : start])
    try:
        entries = json.loads(bytes(view[start : start + length]))["frames"]
        sizes = [entry["length"] for entry in entries]
        options = [dict(entry.get("options", {})) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"malformed header of a framed batch: {error}") from None
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or start + length + sum(sizes) != len(
        view
    ):
        raise BadRequest("the frame lengths of the header do not add up to the body")
    frames = []
    at = start + length
    for size, option in zip(sizes, options, strict=True):
        frames.append((view[at : at + size], option))
        at += size
    return frames


def encode_json(document: Any) -> bytes:
    """JSON; numpy arrays become lists, float32 in its shortest exact spelling."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
