"""Width and height of an encoded image from its header, before anything is decoded.

Pillow reads most headers. PNG, TIFF, Radiance HDR and PFM are read here, because Pillow refuses some that OpenCV
decodes (long text chunks, 16 bits per channel, floats), and the code stream of JPEG 2000, because its size may differ
from that of the file's header. Sources: PNG third edition (W3C) 5.3, TIFF 6.0 section 2, ISO/IEC 15444-1 A.5.1.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

from PIL import Image

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Bytes

__all__ = ["IMAGE_FORMATS", "UNREADABLE", "check_png", "format_of", "image_size"]

# Formats whose header Pillow reads; OpenCV decodes all of them.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "GIF", "PPM", "SUN", "AVIF")
# Raised by Pillow for bytes that are not an image, or an incomplete one.
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError)
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = {b"II*\x00": "<", b"MM\x00*": ">", b"II+\x00": "<", b"MM\x00+": ">"}
_SIZ = b"\xff\x4f\xff\x51"
_HDR_SIZE = re.compile(rb"\n-Y +(\d{1,10}) +\+X +(\d{1,10})\n")
_PFM_SIZE = re.compile(rb"P[Ff]\s+(\d{1,10})\s+(\d{1,10})\s")
_WIDTH_TAG, _HEIGHT_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 256, 257, 322, 323
# A tag's type → format of its value: BYTE, SHORT, LONG, LONG8.
_TAG_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MAX_TAGS = 4096
_USUAL_TILE = 1024


def format_of(body: Bytes) -> str | None:
    """Return ``PNG``, ``TIFF``, ``HDR`` or ``PFM`` by the signature, which Pillow does not always read; else None."""
    head = bytes(body[:10])
    if head.startswith(_PNG):
        return "PNG"
    if head[:4] in _TIFF:
        return "TIFF"
    if head.startswith((b"#?RADIANCE", b"#?RGBE")):
        return "HDR"
    return "PFM" if head[:2] in (b"PF", b"Pf") else None


def image_size(body: Bytes) -> tuple[int, int]:
    """Return width and height in pixels, before any rotation by EXIF.

    Raises:
        UndecodableFrame: no image of a known format.
        FrameTooLarge: the header is that of an image far beyond any limit.
    """
    try:
        match format_of(body):
            case "PNG":
                width, height = struct.unpack_from(">II", bytes(body[16:24]))
                return int(width), int(height)
            case "TIFF":
                return _tiff_size(memoryview(body))
            case "HDR":
                found = _HDR_SIZE.search(bytes(body[:65536]))
                if found is None:
                    raise ValueError("no size in the header")
                return int(found[2]), int(found[1])
            case "PFM":
                found = _PFM_SIZE.match(bytes(body[:64]))
                if found is None:
                    raise ValueError("no size in the header")
                return int(found[1]), int(found[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if image.format == "JPEG2000":
                    width, height = _codestream_size(bytes(body), width, height)
                return width, height
    except Image.DecompressionBombError as error:
        raise FrameTooLarge(f"the image is too large: {error} (MMDET3D_SERVE_MAX_PIXELS)") from None
    except UNREADABLE as error:
        raise UndecodableFrame(
            f"not an image of a known format ({error}); send a JPEG, PNG, WebP, BMP, TIFF, JPEG 2000 or GIF "
            "file unchanged"
        ) from None


def _tiff_size(body: memoryview) -> tuple[int, int]:
    """Read the first directory of a TIFF or BigTIFF; of repeated tags the largest value counts.

    A tile is decoded whole, so that its size counts too, less `_USUAL_TILE`: an image smaller than its tile is usual.
    """
    order = _TIFF[bytes(body[:4])]
    is_big = bytes(body[2:4]).strip(b"\0") == b"+"
    offset, count_format, entry_bytes, value_at = (
        (struct.unpack_from(order + "Q", body, 8)[0], "Q", 20, 12)
        if is_big
        else (struct.unpack_from(order + "I", body, 4)[0], "H", 12, 8)
    )
    (count,) = struct.unpack_from(order + count_format, body, offset)
    if count > _MAX_TAGS:
        raise ValueError(f"a TIFF directory of {count} tags")
    size = dict.fromkeys((_WIDTH_TAG, _HEIGHT_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG), 0)
    first = offset + struct.calcsize(count_format)
    for k in range(count):
        at = first + k * entry_bytes
        tag, kind = struct.unpack_from(order + "HH", body, at)
        if tag in size and kind in _TAG_TYPES:
            (value,) = struct.unpack_from(order + _TAG_TYPES[kind], body, at + value_at)
            size[tag] = max(size[tag], value)
    width, height, tile_width, tile_height = size.values()
    if not width or not height:
        raise ValueError("the TIFF's first directory has no width and height")
    return max(width, tile_width - _USUAL_TILE), max(height, tile_height - _USUAL_TILE)


def _codestream_size(body: bytes, width: int, height: int) -> tuple[int, int]:
    """Return the largest size among the file's header and its code streams."""
    at = body.find(_SIZ)
    while at >= 0:
        right, low, left, top = struct.unpack_from(">IIII", body, at + 8)
        width, height = max(width, right - left), max(height, low - top)
        at = body.find(_SIZ, at + 4)
    return width, height


def check_png(body: Bytes) -> None:
    """Check that a PNG is complete and that its pixels are unchanged.

    Checksums of ancillary chunks (text, colour profiles, EXIF) are not checked: decoders skip such a chunk.

    Raises:
        UndecodableFrame: it ends early, or the checksum of a critical chunk is wrong.
    """
    view, at = memoryview(body), len(_PNG)
    while at + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, at)
        end = at + 12 + length
        if end > len(view):
            break
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", view, end - 4)[0]:
            raise UndecodableFrame(
                f"the PNG is corrupt (wrong checksum of {kind.decode('latin-1')!r}); send the file unchanged"
            )
        if kind == b"IEND":
            return
        at = end
    raise UndecodableFrame("the PNG is not complete (it ends before IEND); send the file unchanged")
