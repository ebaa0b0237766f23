"""Image decoding: bytes to pixels as mmcv's image loaders produce them, checked before memory is allocated."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Bytes

__all__ = ["COLOR_TYPES", "IMAGE_FORMATS", "Decoder", "decode_image"]

Decoder = Literal["cv2", "pillow"]
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# cv2 flags for the `color_type` of mmcv's image loaders (mmcv.image.io.imread_flags).
COLOR_TYPES = {
    "color": cv2.IMREAD_COLOR,
    "grayscale": cv2.IMREAD_GRAYSCALE,
    "unchanged": cv2.IMREAD_UNCHANGED,
    "color_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR,
    "grayscale_ignore_orientation": cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_GRAYSCALE,
}
# Raised by Pillow for bytes that are not an image, or an incomplete one.
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError)


def decode_image(body: Bytes, color_type: str, decoder: Decoder, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode a JPEG, PNG, WebP or BMP image.

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
        raise UndecodableFrame("the body is empty; send the bytes of a JPEG, PNG, WebP or BMP image")
    _check_image(body, max_pixels)
    if decoder == "pillow":
        return _decode_with_pillow(body)
    pixels = cv2.imdecode(np.frombuffer(body, dtype=np.uint8), COLOR_TYPES[color_type])
    if pixels is None:
        raise UndecodableFrame("cannot decode the image")
    if pixels.dtype != np.uint8:
        raise UndecodableFrame(f"the image has {pixels.dtype} samples; 8 bits per channel are expected")
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
    except _UNREADABLE as error:
        raise UndecodableFrame(f"cannot decode the image ({error})") from None


def _check_image(body: Bytes, max_pixels: int) -> None:
    """Check size and completeness before decoding; OpenCV silently fills missing pixels with grey."""
    try:
        with warnings.catch_warnings():
            # Pillow's own size limits; `max_pixels` below gives a better message.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise FrameTooLarge(f"the image has {width} x {height} pixels, the limit is {max_pixels}")
                if image.format == "PNG":
                    image.verify()  # checks the checksums of all chunks without inflating
                else:
                    # Decoding at an eighth of the size in grey (JPEG only) still reads every coded byte.
                    image.draft("L", (max(1, width // 8), max(1, height // 8)))
                    image.load()
    except Image.DecompressionBombError as error:
        raise FrameTooLarge(f"the image is too large: {error}") from None
    except _UNREADABLE as error:
        raise UndecodableFrame(
            f"not a complete {', '.join(IMAGE_FORMATS)} image ({error}); send the file unchanged"
        ) from None
