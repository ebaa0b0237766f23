"""Frames of a caller as bytes: files, folders of parts, arrays, parts by name."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
#: One part of a frame: a file, its bytes, an array, or what becomes JSON (calibration, sweeps).
PartInput = str | os.PathLike[str] | Bytes | npt.NDArray[Any] | Mapping[str, Any] | Sequence[Any]
#: A frame: a file or its bytes, a folder with one file per part, an array, or parts by name.
FrameInput = str | os.PathLike[str] | Bytes | npt.NDArray[Any] | Mapping[str, PartInput]
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
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2  # PNG's colour types
_UP = 2  # PNG's filter that subtracts the row above


def encode_frame(frame: FrameInput) -> tuple[EncodedBody, str]:
    """Return the bytes of a frame, and their media type.

    Args:
        frame: a path, encoded bytes, an array (see `encode_image` and `encode_points`), a folder of parts, or parts by
            name (``points``, ``image``, ``image.CAM_FRONT``, ``calibration``, ``sweep.0``, ``sweeps``, …).

    Raises:
        UndecodableFrame: a file cannot be read, or something is no frame.
    """
    if isinstance(frame, Mapping):
        return {name: _encode_part(name, part) for name, part in frame.items()}, DEFAULT_CONTENT_TYPE
    if isinstance(frame, str | os.PathLike):
        path = Path(frame)
        if parts := frame_parts(path):
            return {name: _read(file) for name, file in parts.items()}, DEFAULT_CONTENT_TYPE
        return _read(path), CONTENT_TYPES.get(path.suffix.lower(), DEFAULT_CONTENT_TYPE)
    return _encode_part("frame", frame), DEFAULT_CONTENT_TYPE


def frame_parts(path: Path) -> dict[str, Path]:
    """Return the files of a frame of several parts, a folder, by part; nothing for a frame that is one file."""
    if not path.is_dir():
        return {}
    files = (file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.stem: file for file in files}


def _encode_part(name: str, part: Any) -> Bytes:
    if isinstance(part, bytes | bytearray | memoryview):
        return part
    if isinstance(part, str | os.PathLike):
        return _read(Path(part))
    if isinstance(part, np.ndarray):
        return encode_image(part) if part.dtype == np.uint8 else encode_points(part)
    if isinstance(part, Mapping | Sequence):
        try:
            return json.dumps(part, default=_as_list).encode()
        except (TypeError, ValueError) as error:
            raise UndecodableFrame(f"{name} cannot be written as JSON: {error}") from error
    raise UndecodableFrame(
        f"{name} is a {type(part).__name__}; give a path, bytes, an array, or a dictionary of parts"
    )


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UndecodableFrame(f"{path} cannot be read: {error.strerror}") from error


def encode_points(points: npt.NDArray[Any]) -> bytes:
    """Encode a point cloud as ``.npy``, float32.

    Args:
        points: (N, columns) floats, columns as the model reads them (x, y, z in metres, intensity, …).

    Raises:
        UndecodableFrame: it has another shape or dtype.
    """
    if points.ndim != 2 or points.dtype.kind != "f":
        raise UndecodableFrame(
            f"an array of {points.dtype} and shape {points.shape} is no frame; give an image as (height, width, 3) "
            "uint8, or a point cloud as (points, columns) of floats"
        )
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(points, "<f4"))
    return file.getvalue()


def encode_image(image: npt.NDArray[Any], order: Literal["bgr", "rgb"] = "bgr") -> bytes:
    """Encode an image as PNG, without loss (ISO/IEC 15948; filter "up", fast deflate).

    Args:
        image: (H, W, 3) uint8, or (H, W) for a grey image.
        order: of its channels: ``bgr`` is OpenCV's and mmcv's, ``rgb`` that of PIL and imageio.

    Raises:
        UndecodableFrame: it has another shape or dtype.
    """
    is_grey = image.ndim == 2
    if (
        image.dtype != np.uint8
        or not (is_grey or (image.ndim == 3 and image.shape[2] == 3))
        or not image.size
    ):
        raise UndecodableFrame(
            f"an array of {image.dtype} and shape {image.shape} is no image; give (height, width, 3) uint8"
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
