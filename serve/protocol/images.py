"""Image decoding: bytes to pixels as mmcv's image loaders produce them, bounded in memory and work."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
import zlib
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol import image_process
from serve.protocol.batch import Bytes
from serve.protocol.image_process import decode_with_opencv, decode_with_pillow
from serve.protocol.image_size import UNREADABLE, format_of, image_size
from serve.protocol.image_work import Jpeg, check_png, check_tiff, process_seconds, read_jpeg
from serve.protocol.pam import check_pam

__all__ = ["COLOR_TYPES", "Decoder", "decode_image"]

Decoder = Literal["cv2", "pillow"]
# cv2 flags for the `color_type` of mmcv's image loaders (mmcv.image.io.imread_flags).
COLOR_TYPES = {
    "color": cv2.IMREAD_COLOR,
    "grayscale": cv2.IMREAD_GRAYSCALE,
    "unchanged": cv2.IMREAD_UNCHANGED,
    "color_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR,
    "grayscale_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_GRAYSCALE,
}
# Formats whose work no header bounds.
_IN_PROCESS = ("JPEG2000", "AVIF")
# Of that process: its libraries' address space, and what decoding takes for each pixel.
PROCESS_BYTES, PROCESS_BYTES_PER_PIXEL = 2 << 30, 40


def decode_image(body: Bytes, color_type: str, decoder: Decoder, max_pixels: int) -> npt.NDArray[Any]:
    """Decode an image of a format that OpenCV reads: JPEG, PNG, WebP, BMP, TIFF, JPEG 2000, GIF and others.

    Of several pages or animation frames the first is decoded, as mmcv does. JPEG 2000 and AVIF are decoded in a process
    of their own, which takes a fifth of a second to start.

    Args:
        body: the bytes of the file.
        color_type: a key of `COLOR_TYPES`.
        decoder: ``cv2``; or ``pillow`` (``color`` only), whose pixels of a JPEG differ by one level in places.
        max_pixels: maximum of width times height.

    Returns:
        uint8, (H, W, 3) BGR or (H, W) grey; with ``unchanged`` samples and channels of the file, which may be uint16,
        int16 or float32.

    Raises:
        FrameTooLarge: more than `max_pixels`, or more work than an image of that many pixels takes.
        UndecodableFrame: not a complete image, or it contains NaN or inf.
    """
    if len(body) == 0:
        raise UndecodableFrame("the body is empty; send the bytes of an image file")
    width, height = image_size(body)
    if width * height > max_pixels:
        raise FrameTooLarge(
            f"the image has {width} x {height} pixels, the limit is {max_pixels}; send a smaller one, or raise "
            "MMDET3D_SERVE_MAX_PIXELS"
        )
    kind = format_of(body)
    jpeg = read_jpeg(body, width * height, max_pixels) if kind == "JPEG" else None
    if kind in _IN_PROCESS:
        pixels = _decode_in_process(body, color_type, decoder, width * height)
    else:
        _check_complete(body, kind, decoder, jpeg, width, height, max_pixels)
        pixels = _decode(body, color_type, decoder, max_pixels)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UndecodableFrame("the image contains NaN or inf")
    return pixels


def _decode(body: Bytes, color_type: str, decoder: Decoder, max_pixels: int) -> npt.NDArray[Any]:
    try:
        if decoder == "pillow":
            return decode_with_pillow(body, max_pixels)
        return decode_with_opencv(body, COLOR_TYPES[color_type])
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UndecodableFrame(f"cannot decode the image ({error})") from None


def _check_complete(
    body: Bytes,
    kind: str | None,
    decoder: Decoder,
    jpeg: Jpeg | None,
    width: int,
    height: int,
    max_pixels: int,
) -> None:
    """Refuse what the decoder would fill with grey or black, and work that its format does not bound by its pixels."""
    match kind:
        case "JPEG" if jpeg is not None:
            # Not with OpenCV, which prints a line about the other bytes behind a scan.
            found = _load(jpeg.probe, at_full_size=jpeg.reference is not None)
            if jpeg.reference is not None and found != _load(jpeg.reference, at_full_size=True):
                raise UndecodableFrame("not a complete image (a scan ends early); send the file unchanged")
        case "WEBP" | "BMP":
            _load(body)
        case "PAM":
            check_pam(memoryview(body))
        case "PNG":
            check_png(body)
            if decoder == "pillow":  # which passes over missing rows
                _decode(body, "color", "cv2", max_pixels)
        case "TIFF":
            if check_tiff(body, width, height, max_pixels) and decoder == "cv2":
                _load(body, is_known=False)


def _load(body: Bytes, *, at_full_size: bool = False, is_known: bool = True) -> int:
    """Let Pillow read every coded byte; returns a checksum of the pixels if `at_full_size`, else 0.

    Args:
        body: the file.
        at_full_size: decode all pixels; else of a JPEG an eighth of the size, which reads the same bytes.
        is_known: refuse an image that Pillow does not know; else it passes.

    Raises:
        UndecodableFrame: it ends early, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                opened = Image.open(io.BytesIO(body), formats=image_process.PILLOW_FORMATS)
            except UNREADABLE:
                if is_known:
                    raise
                return 0
            with opened as image:
                if not at_full_size:
                    image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                return zlib.crc32(image.tobytes()) if at_full_size else 0
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UndecodableFrame(f"not a complete image ({error}); send the file unchanged") from None


def _decode_in_process(body: Bytes, color_type: str, decoder: Decoder, pixels: int) -> npt.NDArray[Any]:
    """Decode in a process of its own, bounded in memory and CPU time."""
    seconds = process_seconds(len(body), pixels)
    flags = image_process.PILLOW if decoder == "pillow" else COLOR_TYPES[color_type]
    bounds = (PROCESS_BYTES + PROCESS_BYTES_PER_PIXEL * pixels, seconds, pixels, flags)
    command = [sys.executable, "-P", image_process.__file__, *map(str, bounds)]
    too_large = FrameTooLarge(
        f"the image of {pixels} pixels takes over {seconds} s of CPU time, or {bounds[0] >> 20} MiB, to decode; "
        "save it with fewer layers, tiles and frames, or as PNG"
    )
    try:
        ran = subprocess.run(
            command, input=bytes(body), capture_output=True, timeout=4 * seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise too_large from None
    if ran.returncode < 0 or ran.returncode == image_process.OUT_OF_MEMORY:  # by a signal, such as SIGXCPU
        raise too_large
    if ran.returncode:
        reason = ran.stderr.decode(errors="replace").strip().splitlines()
        raise UndecodableFrame(f"cannot decode the image ({reason[-1][:200] if reason else ran.returncode})")
    header, _, samples = ran.stdout.partition(b"\n")
    described = json.loads(header)
    return np.frombuffer(bytearray(samples), dtype=described["dtype"]).reshape(described["shape"])
