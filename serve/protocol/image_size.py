"""Format, width and height of an encoded image from its header, before anything is decoded.

Read here and not by an image library, in time that does not depend on what a sender puts before or between the fields:
the gateway asks for the size of every image on its event loop.

Sources: ISO/IEC 10918-1 B.1 and B.2, PNG third edition (W3C) 5.3, WebP container (RFC 9649), GIF89a 18, TIFF 6.0
section 2, ISO/IEC 15444-1 A.5.1 and I.4, ISO/IEC 23008-12 6.5.3, the pages on
Netpbm, and BITMAPINFOHEADER of the Windows API.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from serve.errors import UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.pam import read_pam_header

__all__ = [
    "PNG_SIGNATURE",
    "UNREADABLE",
    "find_codestream",
    "format_of",
    "image_size",
    "jpeg_segments",
    "tiff_tags",
]

# Raised by Pillow for bytes that are not an image, or an incomplete one.
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Headers of text: a size and comments. Programs write one line.
_MAX_HEADER_BYTES = 4096
_MAX_BOXES = 1000
_MAX_META_BYTES = 1 << 20
MAX_JPEG_SEGMENTS = 2000
MAX_JPEG_FILL_BYTES = 65536
_MAX_TIFF_TAGS = 4096
_USUAL_TILE = 1024

_SIGNATURES = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(re.escape(PNG_SIGNATURE))),
    ("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("BMP", re.compile(rb"BM")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("PNM", re.compile(rb"P[1-6]\s")),
    ("PAM", re.compile(rb"P7\n")),
    ("SUN", re.compile(rb"\x59\xa6\x6a\x95")),
    ("AVIF", re.compile(rb".{4}ftyp", re.DOTALL)),
    ("HDR", re.compile(rb"#\?R(?:ADIANCE|GBE)")),
    ("PFM", re.compile(rb"P[Ff]")),
)
# Files that are sent in place of a picture that OpenCV reads.
_OTHERS = (
    ("HEIC", re.compile(rb".{4}ftyp(?:hei[a-z]|hevc|mif1|msf1)", re.DOTALL)),
    (
        "a video",
        re.compile(rb".{4}ftyp(?:isom|iso[2-9]|mp4|M4V|avc1|qt  )|\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL),
    ),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("OpenEXR", re.compile(rb"v/1\x01")),
    ("an icon (ICO)", re.compile(rb"\0\0[\x01\x02]\0")),
    ("Photoshop (PSD)", re.compile(rb"8BPS")),
    ("DDS", re.compile(rb"DDS ")),
    ("PDF", re.compile(rb"%PDF")),
    ("PostScript", re.compile(rb"%!PS")),
    ("SVG or XML", re.compile(rb"\s*<(?:\?xml|svg)")),
    ("HTML", re.compile(rb"\s*<(?:!doctype|html)", re.IGNORECASE)),
    ("base64 text", re.compile(rb"/9j/|iVBORw0KG|R0lGOD|UklGR|data:image|SUkqA|TU0AK")),
    ("gzip", re.compile(rb"\x1f\x8b")),
    ("a zip", re.compile(rb"PK\x03\x04")),
    ("a numpy array", re.compile(rb"\x93NUMPY")),
    ("a point cloud", re.compile(rb"# \.PCD|VERSION|ply\r?\n|LASF")),
    ("JSON", re.compile(rb"\s*[{\[]")),
)
_PNM_SIZE = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+(\d{1,10})(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})\s")
_HDR_SIZE = re.compile(rb"\n-Y +(\d{1,10}) +\+X +(\d{1,10})\n")
_PFM_SIZE = re.compile(rb"P[Ff]\s+(\d{1,10})\s+(\d{1,10})\s")
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # all but restart markers, which have no parameters
_ISPE = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)
_WIDTH_TAG, _HEIGHT_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 256, 257, 322, 323
# A tag's type → format of its value: BYTE, SHORT, LONG, LONG8.
_TAG_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}


def format_of(body: Bytes) -> str | None:
    """Return the format by its signature; None for none that is read."""
    head = bytes(body[:16])
    return next((name for name, signature in _SIGNATURES if signature.match(head)), None)


def image_size(body: Bytes) -> tuple[int, int]:
    """Return width and height in pixels, before any rotation by EXIF.

    Raises:
        UndecodableFrame: no image of a known format.
    """
    read = _SIZES.get(format_of(body) or "")
    try:
        if read is None:
            raise ValueError("unknown signature")
        width, height = read(memoryview(body))
        if width < 1 or height < 1:
            raise ValueError(f"a size of {width} x {height}")
        return width, height
    except UNREADABLE as error:
        head = bytes(body[:16])
        other = next((name for name, signature in _OTHERS if signature.match(head)), None)
        found = (
            f"the body is {other}, not an image that is read"
            if other
            else f"not an image of a known format ({error})"
        )
        raise UndecodableFrame(
            f"{found}; send a JPEG, PNG, WebP, BMP, TIFF, JPEG 2000 or GIF file unchanged"
        ) from None


def jpeg_segments(body: memoryview) -> list[tuple[int, int, int]]:
    """List the segments of a JPEG: marker code, its offset, and the end of its parameters.

    Ends at the EOI marker, which is the last of the list, or at the end of `body`. Linear in the length of `body`.

    Raises:
        ValueError: too many segments, or too many bytes between them, for an image that a program wrote.
    """
    found: list[tuple[int, int, int]] = []
    at, in_scan, fill = 2, False, 0
    while match := _MARKER.search(body, at):
        marker, start = body[match.start() + 1], match.start()
        if not in_scan:
            fill += start - at
        at = start + 2
        # Markers below SOF0 have no parameters; within a scan a decoder passes over them.
        if marker >= 0xC0 and marker not in (0xD8, 0xD9):
            at += struct.unpack_from(">H", body, at)[0]
        found.append((marker, start, at))
        if marker == 0xD9:
            break
        in_scan = marker == 0xDA or (in_scan and marker < 0xC0)
        if len(found) > MAX_JPEG_SEGMENTS or fill > MAX_JPEG_FILL_BYTES:
            raise ValueError(f"a JPEG of over {MAX_JPEG_SEGMENTS} segments, or with a gap between two")
    return found


def _jpeg_size(body: memoryview) -> tuple[int, int]:
    """Read the first frame header; others than the first are refused by every decoder."""
    at, fill = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        match = _MARKER.search(body, at, at + MAX_JPEG_FILL_BYTES)
        if match is None:
            break
        marker, fill = body[match.start() + 1], fill + match.start() - at
        at = match.end()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", body, at + 3)
            return width, height
        if marker in (0xD9, 0xDA) or fill > MAX_JPEG_FILL_BYTES:
            break
        if marker >= 0xC0 and marker != 0xD8:
            at += struct.unpack_from(">H", body, at)[0]
    raise ValueError("a JPEG without a frame header")


def _png_size(body: memoryview) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", body, 16)
    return width, height


def _webp_size(body: memoryview) -> tuple[int, int]:
    match bytes(body[12:16]):
        case b"VP8X":
            return int.from_bytes(body[24:27], "little") + 1, int.from_bytes(body[27:30], "little") + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", body, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ValueError("a WebP without an image")


def _bmp_size(body: memoryview) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", body, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", body, 18)
    return width, abs(height)


def _gif_size(body: memoryview) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", body, 6)
    return width, height


def _sun_size(body: memoryview) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", body, 4)
    return width, height


def _pnm_size(body: memoryview) -> tuple[int, int]:
    return _found_size(_PNM_SIZE.match(body[:_MAX_HEADER_BYTES]))


def _pam_size(body: memoryview) -> tuple[int, int]:
    header = read_pam_header(body)
    return header.width, header.height


def _pfm_size(body: memoryview) -> tuple[int, int]:
    return _found_size(_PFM_SIZE.match(body[:64]))


def _hdr_size(body: memoryview) -> tuple[int, int]:
    height, width = _found_size(_HDR_SIZE.search(body[:65536]))
    return width, height


def _found_size(found: re.Match[bytes] | None) -> tuple[int, int]:
    if found is None:
        raise ValueError("no size in the header")
    return int(found[1]), int(found[2])


def _avif_size(body: memoryview) -> tuple[int, int]:
    """Read the largest size of an item; what the decoder takes is bounded by its process."""
    sizes = [struct.unpack(">II", each) for each in _ISPE.findall(body[:_MAX_META_BYTES])]
    if not sizes:
        raise ValueError("an AVIF without the size of an image")
    width, height = max(sizes, key=lambda size: int(size[0]) * int(size[1]))
    return width, height


def tiff_tags(body: memoryview, wanted: tuple[int, ...]) -> dict[int, int]:
    """Read tags of the first directory of a TIFF or BigTIFF, 0 where one is missing; the largest of repeated ones.

    Raises:
        ValueError: no TIFF, or a directory that cannot be.
        struct.error: it ends early.
    """
    order = "<" if bytes(body[:1]) == b"I" else ">"
    is_big = bytes(body[2:4]).strip(b"\0") == b"+"
    offset, count_format, entry_bytes, value_at = (
        (struct.unpack_from(order + "Q", body, 8)[0], "Q", 20, 12)
        if is_big
        else (struct.unpack_from(order + "I", body, 4)[0], "H", 12, 8)
    )
    (count,) = struct.unpack_from(order + count_format, body, offset)
    if count > _MAX_TIFF_TAGS:
        raise ValueError(f"a TIFF directory of {count} tags")
    values = dict.fromkeys(wanted, 0)
    first = offset + struct.calcsize(count_format)
    for k in range(count):
        at = first + k * entry_bytes
        tag, kind = struct.unpack_from(order + "HH", body, at)
        if tag in values and kind in _TAG_TYPES:
            (value,) = struct.unpack_from(order + _TAG_TYPES[kind], body, at + value_at)
            values[tag] = max(values[tag], value)
    return values


def _tiff_size(body: memoryview) -> tuple[int, int]:
    """Read the size of a TIFF.

    A tile is decoded whole, so that its size counts too, less `_USUAL_TILE`: an image smaller than its tile is usual.
    """
    tags = tiff_tags(body, (_WIDTH_TAG, _HEIGHT_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG))
    width, height, tile_width, tile_height = tags.values()
    if not width or not height:
        raise ValueError("the TIFF's first directory has no width and height")
    return max(width, tile_width - _USUAL_TILE), max(height, tile_height - _USUAL_TILE)


def find_codestream(body: memoryview) -> int:
    """Return the offset of the code stream in a JPEG 2000 file.

    Raises:
        ValueError: it has none.
        struct.error: it ends early.
    """
    if bytes(body[:2]) == b"\xff\x4f":
        return 0
    at = 0
    for _ in range(_MAX_BOXES):
        length, kind = struct.unpack_from(">I4s", body, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", body, start)
            start += 8
        if kind == b"jp2c":
            return start
        if length < start - at:
            break
        at += length
    raise ValueError("a JPEG 2000 file without a code stream")


def _jpeg2000_size(body: memoryview) -> tuple[int, int]:
    """Read the size of the code stream, and not that of the file's header, which may differ from it."""
    start = find_codestream(body)
    if bytes(body[start : start + 4]) != b"\xff\x4f\xff\x51":
        raise ValueError("the code stream has no size")
    right, low, left, top = struct.unpack_from(">IIII", body, start + 8)
    return right - left, low - top


_SIZES: dict[str, Callable[[memoryview], tuple[int, int]]] = {
    "JPEG": _jpeg_size,
    "PNG": _png_size,
    "WEBP": _webp_size,
    "BMP": _bmp_size,
    "TIFF": _tiff_size,
    "JPEG2000": _jpeg2000_size,
    "GIF": _gif_size,
    "PNM": _pnm_size,
    "PAM": _pam_size,
    "SUN": _sun_size,
    "AVIF": _avif_size,
    "HDR": _hdr_size,
    "PFM": _pfm_size,
}
