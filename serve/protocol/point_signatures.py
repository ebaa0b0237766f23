"""Format of a point cloud's file by its first bytes, never by its length.

A ``.bin`` has no signature. Formats that cannot be read here are known too, so that their bytes do not pass for
coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from serve.errors import UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.point_formats import NPY_MAGIC

__all__ = ["sniff"]

# Signature → format. Formats without a reader are listed too, so that their bytes do not pass for coordinates.
MAGIC: Sequence[tuple[bytes, str]] = (
    (NPY_MAGIC, "npy"),
    (b"# .PCD", "PCD"),
    (b"VERSION", "PCD"),
    (b"FIELDS", "PCD"),
    (b"ply\n", "PLY"),
    (b"ply\r", "PLY"),
    (b"LASF", "LAS"),
    (b"PK\x03\x04", "npz"),
    (b"PK\x05\x06", "npz"),  # without entries
)
# A header that begins with another comment, a blank line or a byte order mark.
_PCD_HEADER = re.compile(rb"[\s\xef\xbb\xbf#].{0,4096}?^FIELDS .{0,4096}?^DATA ", re.DOTALL | re.MULTILINE)
UNREADABLE: Sequence[tuple[bytes, str]] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"ASTM-E57", "E57"),
    (b"DRACO", "Draco"),
    (b"#ROSBAG", "ROS bag"),
    (b"SQLite format 3", "SQLite (a ROS 2 bag?)"),
    (b"\x89MCAP", "MCAP"),
    (b"\x89PNG", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"BM", "BMP image"),
    (b"RIFF", "RIFF (WebP?)"),
    (b"%PDF", "PDF"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"<!DO", "HTML"),
    (b"<htm", "HTML"),
)
_PCD_HEAD_BYTES = 8192


def sniff(body: Bytes) -> str | None:
    """Recognise the format of a file by its first bytes; None if it has no signature, such as a ``.bin``.

    Raises:
        UndecodableFrame: a known format without point clouds, or without a reader here.
    """
    head = bytes(body[:16])
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if _PCD_HEADER.match(bytes(body[:_PCD_HEAD_BYTES])):
        return "PCD"
    for magic, name in UNREADABLE:
        if head.startswith(magic) and _is_not_points(magic, body):
            raise UndecodableFrame(
                f"the body is {name}, not a point cloud; send .bin, .npy, .npz, PCD, PLY, LAS or LAZ, uncompressed"
            )
    return None


def _is_not_points(magic: bytes, body: Bytes) -> bool:
    """Return whether a signature is more than a coincidence with the first coordinate.

    A first coordinate of a ``.bin`` may be any float32: one whose bytes equal a signature of two or three bytes is
    possible, so the length has to disagree with every stride of 3 to 8 floats as well.
    """
    return len(magic) >= 4 or len(body) % 4 != 0 or not _plausible(body)


def _plausible(body: Bytes) -> bool:
    """Return whether the first numbers, read as float32, may be coordinates: finite, and below 10 km."""
    head = np.frombuffer(bytes(body[: min(len(body), 4096) // 4 * 4]), dtype="<f4")
    with np.errstate(invalid="ignore"):
        return bool(len(head) and (np.isfinite(head) & (np.abs(head) < 1e4)).mean() > 0.99)
