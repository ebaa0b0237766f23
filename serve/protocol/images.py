"""Image decoding: bytes to pixels as mmcv's image loaders produce them, checked before memory is allocated."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.image_size import IMAGE_FORMATS, UNREADABLE, check_png, format_of, image_size

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
# Formats that OpenCV decodes in part if they are cut, with grey in place of the missing pixels.
_CHECKED_BY_PILLOW = ("JPEG", "WEBP", "BMP")


def decode_image(body: Bytes, color_type: str, decoder: Decoder, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode an image of a format that OpenCV reads: JPEG, PNG, WebP, BMP, TIFF, JPEG 2000, GIF and others.

    Of several pages or animation frames the first is decoded, as mmcv does.


    Args:
        body: the bytes of the file.
        color_type: a key of `COLOR_TYPES`.
        decoder: ``cv2``; or ``pillow`` (``color`` only), whose pixels of a JPEG differ by one level in places.
        max_pixels: maximum of width times height.

    Returns:
        uint8, (H, W, 3) BGR, (H, W) grey, or the channels of the file, depending on `color_type`.

    Raises:
        FrameTooLarge: more than `max_pixels`.
        UndecodableFrame: not a complete image of 8 bits per channel.
    """
    if len(body) == 0:
        raise UndecodableFrame("the body is empty; send the bytes of an image file")
    _check_image(body, max_pixels)
    if decoder == "pillow":
        return _decode_with_pillow(body)
    try:
        pixels = cv2.imdecode(np.frombuffer(body, dtype=np.uint8), COLOR_TYPES[color_type])
    except cv2.error as error:
        raise UndecodableFrame(f"cannot decode the image ({error.err or error})") from None
    if pixels is None:
        raise UndecodableFrame("cannot decode the image; is it complete, with integer samples?")
    if pixels.dtype != np.uint8:  # only with `unchanged`: the others convert
        raise UndecodableFrame(
            f"the image has {pixels.dtype} samples, and this model reads them unchanged; send 8 bits per channel"
        )
    decoded: npt.NDArray[np.uint8] = pixels
    return decoded


def _decode_with_pillow(body: Bytes) -> npt.NDArray[np.uint8]:
    """Decode to (H, W, 3) BGR, rotated by EXIF, as mmcv's ``imfrombytes(backend='pillow')`` does (mmcv.image.io)."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as opened:
            warnings.simplefilter("ignore")  # about a palette with transparency, which mmcv drops too
            image = ImageOps.exif_transpose(opened)
            if image.mode == "LA":  # grey with alpha: mmcv composes it over the mean colour of ImageNet
                rgba = image.convert("RGBA")
                image = Image.new("RGB", rgba.size, (124, 117, 104))
                image.paste(rgba, mask=rgba.split()[3])
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    except UNREADABLE as error:
        raise UndecodableFrame(f"cannot decode the image ({error})") from None


def _check_image(body: Bytes, max_pixels: int) -> None:
    """Check size and completeness before decoding."""
    width, height = image_size(body)
    if width * height > max_pixels:
        raise FrameTooLarge(
            f"the image has {width} x {height} pixels, the limit is {max_pixels} (MMDET3D_SERVE_MAX_PIXELS)"
        )
    match format_of(body):
        case "PNG":
            check_png(body)
        case None:
            _check_with_pillow(body)


def _check_with_pillow(body: Bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:
                if image.format not in _CHECKED_BY_PILLOW:
                    return
                # Decoding at an eighth of the size in grey (JPEG only) still reads every coded byte.
                image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except UNREADABLE as error:
        raise UndecodableFrame(f"not a complete image ({error}); send the file unchanged") from None
