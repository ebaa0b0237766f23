"""Orientation of an image by its EXIF data, by which OpenCV and browsers turn it and other viewers do not."""

from __future__ import annotations

import io

from PIL import Image

from serve.protocol.image_size import UNREADABLE

__all__ = ["UPRIGHT", "read_orientation"]

#: Orientation of an image that is shown as it is stored.
UPRIGHT = 1
_TAG = 0x0112
_TURNED = ("JPEG", "PNG", "WEBP", "TIFF")  # formats that OpenCV turns by EXIF


def read_orientation(image: bytes) -> int:
    """Return the orientation of EXIF 2.3, from 1 to 8: 1 without one, from 5 on width and height change places."""
    try:
        with Image.open(io.BytesIO(image), formats=_TURNED) as opened:  # reads the header
            has_exif = "exif" in opened.info or opened.format == "TIFF"  # else a PNG would be decoded for it
            found = opened.getexif().get(_TAG, UPRIGHT) if has_exif else UPRIGHT
    except (*UNREADABLE, Image.DecompressionBombError):
        return UPRIGHT
    return int(found) if found in range(1, 9) else UPRIGHT
