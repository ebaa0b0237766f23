"""Bounds on the work of decoding an image, and whether it is complete: both before it is decoded.

Pixels alone bound nothing: each scan of a progressive JPEG visits all of them again, and each packed text of a PNG
unpacks to megabytes. JPEG 2000 and AVIF cannot be judged by their headers; they are decoded in a process with a bound
on CPU time and memory (`serve.protocol.image_process`).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.image_size import PNG_SIGNATURE, UNREADABLE, jpeg_segments, tiff_tags

__all__ = ["MAX_PASSES", "MAX_SCANS", "Jpeg", "check_png", "check_tiff", "process_seconds", "read_jpeg"]

# Scans of a JPEG; encoders write 10, libjpeg-turbo's own fuzzers stop at 500.
MAX_SCANS = 500
# Scans, counted for each of their components, times pixels, in images of max_pixels: a scan without a byte of data
# takes 40 ns per block of 64 pixels. libjpeg writes 14 of colours, 24 of CMYK.
MAX_PASSES = 32
# Chunks of a PNG that unpack to megabytes: 34 ms each at libpng's own bound of 8 MB.
MAX_PACKED_TEXTS = 32
MAX_PNG_CHUNKS = 100_000
# CPU time of a process that decodes one image: to start, for each pixel and for each byte, about three times what
# the slowest honest image takes (JPEG 2000 without loss, and AVIF, of noise).
START_SECONDS, SECONDS_PER_PIXEL, SECONDS_PER_BYTE = 2.0, 2e-7, 4e-7

# Lossless JPEG, and arithmetic coding, which may leave out the zeros at the end of a scan.
_SOF_OTHERS = (0xC3, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_COMPRESSION, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT = 259, 278, 322, 323  # tags of a TIFF
_JPEG_COMPRESSION = 7
# Any codes: what a decoder makes of them shows if it needed more than there was.
_ANY_CODES = bytes((37 * k + 11) % 251 for k in range(256))
# Fills the decoder's look-ahead of 64 bits behind the last byte of a scan, with codes that in the usual tables end no
# block: a cut within the last block or two passes.
_LOOK_AHEAD = b"\x49\x24\x92\x49\x24\x92\x49\x24"


@dataclass(frozen=True)
class Jpeg:
    """What shows whether a JPEG is complete; both images are without comments and metadata.

    Attributes:
        probe: the image with other bytes behind its scans. Of one sequential scan: no marker after it, so that a
            decoder that waits for input stops unless the scan is complete.
        reference: an image that a decoder gives the same pixels as `probe` if all scans are complete; None of one scan.
    """

    probe: bytes
    reference: bytes | None = None


def read_jpeg(body: Bytes, pixels: int, max_pixels: int) -> Jpeg:
    """Check the number of scans and the end of a JPEG.

    Args:
        body: the file.
        pixels: width times height.
        max_pixels: maximum of width times height.

    Raises:
        FrameTooLarge: more scans than `MAX_SCANS`, or than `MAX_PASSES` images of `max_pixels` have.
        UndecodableFrame: no EOI marker, or segments that cannot be.
    """
    view = memoryview(body)
    try:
        segments = jpeg_segments(view)
    except UNREADABLE as error:
        raise UndecodableFrame(f"not a complete JPEG ({error}); send the file unchanged") from None
    scans = [k for k, (marker, _, _) in enumerate(segments) if marker == 0xDA]
    components = sum(view[segments[k][1] + 4] for k in scans if segments[k][1] + 4 < len(view))
    _check_scans("JPEG", len(scans), components * pixels, max_pixels)
    if not scans or segments[-1][0] != 0xD9:
        raise UndecodableFrame(
            "the JPEG is not complete (it ends before its EOI marker); send the file unchanged"
        )
    head = b"".join(
        [b"\xff\xd8", *(view[start:end] for marker, start, end in segments[: scans[0]] if _is_needed(marker))]
    )
    ends = [_end_of_scan(segments, k) for k in scans]
    starts = [segments[scans[0]][1], *ends]
    if any(marker in _SOF_OTHERS for marker, _, _ in segments):
        return Jpeg(head + view[starts[0] :])
    if _is_single_scan(view, segments, scans):
        return Jpeg(b"".join([head, view[starts[0] : ends[0]], _LOOK_AHEAD]))
    pieces = [
        piece for start, end in zip(starts, ends, strict=False) for piece in (view[start:end], _ANY_CODES)
    ]
    return Jpeg(b"".join([head, *pieces, b"\xff\xd9"]), head + view[starts[0] :])


def _is_single_scan(view: memoryview, segments: list[tuple[int, int, int]], scans: list[int]) -> bool:
    """Whether the image is one scan of all components, sequential: others are decoded only up to their EOI marker."""
    frame = next((start for marker, start, _ in segments if marker in (0xC0, 0xC1)), None)
    return len(scans) == 1 and frame is not None and view[segments[scans[0]][1] + 4] == view[frame + 9]


def _end_of_scan(segments: list[tuple[int, int, int]], k: int) -> int:
    """Return the offset of the first marker that ends the data of scan `k`."""
    return next(start for marker, start, _ in segments[k + 1 :] if marker >= 0xC0)


def _is_needed(marker: int) -> bool:
    """Whether a decoder needs the segment: all but comments and metadata; of those, Adobe's names the colours."""
    return marker == 0xEE or not (marker == 0xFE or 0xE0 <= marker <= 0xEF)


def _check_scans(kind: str, scans: int, passes: int, max_pixels: int) -> None:
    if scans > MAX_SCANS or passes > MAX_PASSES * max_pixels:
        raise FrameTooLarge(
            f"the {kind} has {scans} scans, which together visit {passes} pixels; at most {MAX_SCANS} scans and "
            f"{MAX_PASSES * max_pixels} pixels ({MAX_PASSES} x MMDET3D_SERVE_MAX_PIXELS) are decoded; save it "
            "as baseline"
        )


def check_tiff(body: Bytes, width: int, height: int, max_pixels: int) -> bool:
    """Check the number of scans of JPEG strips and tiles in a TIFF; returns whether its pixels are compressed.

    Raises:
        FrameTooLarge: too many scans, as for a JPEG.
    """
    tags = tiff_tags(memoryview(body), (_COMPRESSION, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT))
    if tags[_COMPRESSION] == _JPEG_COMPRESSION:
        rows = min(tags[_ROWS_PER_STRIP] or height, height)
        piece = tags[_TILE_WIDTH] * tags[_TILE_HEIGHT] or rows * width
        scans = bytes(body).count(b"\xff\xda")
        _check_scans("TIFF", min(scans, MAX_SCANS), scans * piece, max_pixels)
    return tags[_COMPRESSION] not in (0, 1)


def process_seconds(nbytes: int, pixels: int) -> int:
    """Return the CPU time that a process may take to decode an image, seconds."""
    return int(START_SECONDS + SECONDS_PER_PIXEL * pixels + SECONDS_PER_BYTE * nbytes) + 1


def check_png(body: Bytes) -> None:
    """Check that a PNG is complete, that its pixels are unchanged, and what its other chunks unpack to.

    Checksums of ancillary chunks (text, colour profiles, EXIF) are not checked: decoders skip such a chunk.

    Raises:
        UndecodableFrame: it ends early, or the checksum of a critical chunk is wrong.
        FrameTooLarge: more than `MAX_PNG_CHUNKS` chunks, or `MAX_PACKED_TEXTS` of packed text.
    """
    view, at, chunks, packed = memoryview(body), len(PNG_SIGNATURE), 0, 0
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
        chunks, packed, at = chunks + 1, packed + (kind in (b"zTXt", b"iTXt", b"iCCP")), end
        if chunks > MAX_PNG_CHUNKS or packed > MAX_PACKED_TEXTS:
            raise FrameTooLarge(
                f"the PNG has over {MAX_PNG_CHUNKS} chunks, or over {MAX_PACKED_TEXTS} of packed text; save it without"
            )
    raise UndecodableFrame("the PNG is not complete (it ends before IEND); send the file unchanged")
