"""Frames of a caller as bytes: files, folders of parts, arrays, parts by name."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from serve.errors import UndecodableFrame

__all__ = [
    "CONTENT_TYPES",
    "EncodedBody",
    "FrameInput",
    "PartInput",
    "encode_frame",
    "encode_image",
    "encode_points",
    "frame_parts",
]

Bytes = bytes | bytearray | memoryview


class SupportsRead(Protocol):
    """A file, open in binary mode."""

    def read(self) -> bytes:
        """Return what is left of it."""
        ...


class SupportsArray(Protocol):
    """An array of another library, such as a tensor of torch."""

    def __array__(self) -> Any:
        """Return it as an array of numpy."""
        ...


class SupportsPixels(Protocol):
    """A picture of PIL."""

    @property
    def __array_interface__(self) -> Any:
        """Its pixels."""
        ...


Array = npt.NDArray[Any] | SupportsArray | SupportsPixels
#: One part of a frame: a file, its bytes, an array, or what becomes JSON (calibration, sweeps).
PartInput = str | os.PathLike[str] | Bytes | SupportsRead | Array | Mapping[str, Any] | Sequence[Any]
#: A frame: a file or its bytes, a folder with one file per part, an array, or parts by name.
FrameInput = str | os.PathLike[str] | Bytes | SupportsRead | Array | Mapping[str, PartInput]
# What is sent: the bytes of a frame, or those of each part by name.
EncodedBody = Bytes | dict[str, Bytes]

#: Media types of image files, by suffix.
CONTENT_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".bmp": "image/bmp",
    ".webp": "image/webp",
}
DEFAULT_CONTENT_TYPE = "application/octet-stream"
# Parts that are JSON, and names of all parts.
_DOCUMENTS = ("calibration", "sweeps")
_PART = re.compile(r"points|image(\..+)?|calibration|text|sweeps|sweep\..+")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2  # PNG's colour types
_UP = 2  # PNG's filter that subtracts the row above


def encode_frame(frame: FrameInput) -> tuple[EncodedBody, str]:
    """Return the bytes of a frame, and their media type.

    Args:
        frame: a path, encoded bytes or a binary file, an array (see `encode_image` and `encode_points`), a picture of
            PIL, a folder of parts, or parts by name (``points``, ``image``, ``image.CAM_FRONT``, ``calibration``,
            ``sweep.0``, ``sweeps``, …).

    Raises:
        UndecodableFrame: a file cannot be read, or something is no frame.
    """
    if isinstance(frame, Mapping):
        return _encode_parts(frame), DEFAULT_CONTENT_TYPE
    if isinstance(frame, str | os.PathLike):
        path = _path(frame)
        if path.is_dir():
            return {name: _read(file) for name, file in _check_parts(path).items()}, DEFAULT_CONTENT_TYPE
        return _read(path), CONTENT_TYPES.get(path.suffix.lower(), DEFAULT_CONTENT_TYPE)
    return _encode_part("frame", frame), DEFAULT_CONTENT_TYPE


def frame_parts(path: Path) -> dict[str, Path]:
    """Return the files of a frame of several parts, a folder, by part; nothing for a frame that is one file.

    Raises:
        UndecodableFrame: two files are the same part, such as ``image.png`` and ``image.jpg``.
    """
    if not path.is_dir():
        return {}
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        if (other := found.setdefault(file.stem, file)) is not file:
            raise UndecodableFrame(
                f"{path} has {other.name} and {file.name}, which are the same part; remove one"
            )
    return found


def _check_parts(folder: Path) -> dict[str, Path]:
    """Return the files of a folder of parts; a folder of anything else is not sent."""
    parts = frame_parts(folder)
    other = next((file.name for name, file in parts.items() if not _PART.fullmatch(name)), None)
    if other is not None or not parts:
        why = "is empty" if other is None else f"has {other}, which is no part of a frame"
        raise UndecodableFrame(
            f"the folder {folder} {why}; a frame has files such as points.bin, image.png, calibration.json, "
            "sweep.0.bin; give each of several frames by itself"
        )
    return parts


def _encode_parts(parts: Mapping[Any, Any]) -> dict[str, Bytes]:
    if not parts or not all(isinstance(name, str) and name for name in parts):
        raise UndecodableFrame(
            "a dictionary of parts has names such as points, image and calibration as keys"
        )
    return {name: _encode_part(name, part) for name, part in parts.items()}


def _encode_part(name: str, part: Any) -> Bytes:
    is_document = name in _DOCUMENTS
    if isinstance(part, bytes | bytearray | memoryview):
        return part
    if isinstance(part, str) and (name == "text" or (is_document and part.lstrip()[:1] in ("{", "["))):
        return part.encode()
    if isinstance(part, str | os.PathLike):
        return _read(_path(part))
    if callable(read := getattr(part, "read", None)):
        content = read()
        if not isinstance(content, bytes):
            raise UndecodableFrame(f"{name} is a file of text; open it in binary mode, open(path, 'rb')")
        return content
    if is_document and isinstance(part, Mapping | Sequence):
        try:
            return json.dumps(part, default=_as_list, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UndecodableFrame(f"{name} cannot be written as JSON: {error}") from error
    if any(base.__module__.startswith("PIL.") for base in type(part).__mro__):
        return encode_image(_pixels_of(name, part), "rgb")
    if not isinstance(part, Mapping | Sequence) and (array := _as_array(name, part)) is not None:
        return encode_image(array) if array.dtype == np.uint8 else encode_points(array)
    advice = "; make it an array, np.asarray(…, np.float32)" if isinstance(part, Sequence) else ""
    raise UndecodableFrame(
        f"{name} is a {type(part).__name__}; give a path, bytes, an array, or a dictionary of parts{advice}"
    )


def _as_array(name: str, part: Any) -> npt.NDArray[Any] | None:
    """Return what is an array, or a tensor of another library, as one of numpy; None for anything else."""
    if isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part):
        raise UndecodableFrame(f"{name} is an array with masked values; fill them, or leave them out")
    if isinstance(part, np.ndarray):
        return part
    if isinstance(part, np.generic) or not hasattr(part, "__array__"):
        return None
    try:
        return np.asarray(part.detach().cpu() if hasattr(part, "detach") else part)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UndecodableFrame(f"{name} cannot be read as an array: {error}") from error


def _pixels_of(name: str, image: Any) -> npt.NDArray[Any]:
    """Return the pixels of a picture of PIL as they are in memory, RGB or grey, without what is transparent."""
    if image.mode in ("I", "F") or ";16" in image.mode:
        raise UndecodableFrame(f"{name} has the mode {image.mode}; give its file, or 8 bits per channel")
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _as_list(value: Any) -> Any:
    array = _as_array("a matrix", value)
    if array is not None:
        return array.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _path(given: str | os.PathLike[str]) -> Path:
    text = os.fspath(given)
    if not text or "\0" in text:
        raise UndecodableFrame(f"{text!r} is no path of a frame")
    return Path(text)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UndecodableFrame(f"{path} cannot be read: {error.strerror}") from error


def encode_points(points: npt.NDArray[Any]) -> bytes:
    """Encode a point cloud as ``.npy``, float32.

    Args:
        points: (N, columns) floats, columns as the model reads them (x, y, z in metres, intensity, …); or (N,) with
            named fields (a structured array), which the server takes by name.

    Raises:
        UndecodableFrame: it has another shape or dtype, or numbers beyond float32.
    """
    file = io.BytesIO()
    if points.dtype.names is not None and points.ndim == 1:
        try:
            np.save(file, np.ascontiguousarray(points), allow_pickle=False)
        except ValueError as error:
            raise UndecodableFrame(
                f"a structured array of {points.dtype} is no point cloud: {error}"
            ) from error
        return file.getvalue()
    if points.ndim != 2 or points.dtype.kind != "f":
        raise UndecodableFrame(
            f"an array of {points.dtype} and shape {points.shape} is no frame; give an image as (height, width, 3) "
            "uint8, or a point cloud as (points, columns) of floats"
        )
    try:
        with np.errstate(over="raise"):
            np.save(file, np.ascontiguousarray(points, "<f4"))
    except FloatingPointError as error:
        raise UndecodableFrame("the points have numbers that float32 cannot hold") from error
    return file.getvalue()


def encode_image(image: npt.NDArray[Any], order: Literal["bgr", "rgb"] = "bgr") -> bytes:
    """Encode an image as PNG, without loss (ISO/IEC 15948; filter "up", fast deflate).

    Args:
        image: (H, W, 3) uint8, or (H, W) or (H, W, 1) for a grey image.
        order: of its channels: ``bgr`` is OpenCV's and mmcv's, ``rgb`` that of PIL and imageio.

    Raises:
        UndecodableFrame: it has another shape or dtype.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    is_grey = image.ndim == 2
    if (
        image.dtype != np.uint8
        or not (is_grey or (image.ndim == 3 and image.shape[2] == 3))
        or not image.size
    ):
        advice = ""
        if image.ndim == 3 and image.shape[0] in (1, 3):
            advice = ", image.transpose(1, 2, 0)"
        elif image.ndim == 3 and image.shape[2] == 4:
            advice = " without the alpha channel, image[..., :3]"
        raise UndecodableFrame(
            f"an array of {image.dtype} and shape {image.shape} is no image; give (height, width, 3) uint8{advice}"
        )
    height, width = image.shape[:2]
    rgb = image if is_grey or order == "rgb" else image[:, :, ::-1]
    rows = np.ascontiguousarray(rgb).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the format says
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if is_grey else _COLOUR, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.data, 1)), (b"IEND", b""))
    return _PNG_SIGNATURE + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
