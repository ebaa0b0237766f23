"""Decoding with OpenCV or Pillow, and a process that decodes one image: standard input to pixels on standard output.

What decoding takes cannot be seen in the header of a JPEG 2000 or AVIF file: the first may name thousands of layers
and millions of precincts, the second hide any number of frames behind the one that is shown. In a process of its own,
with a bound on CPU time and memory, such a file costs one frame. Runs as a script, so that it imports nothing of this
package.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import warnings
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

__all__ = ["OUT_OF_MEMORY", "PILLOW", "decode_with_opencv", "decode_with_pillow", "main"]

PILLOW = -1000  # in place of OpenCV's flags
OUT_OF_MEMORY = 3  # exit status

# Formats that Pillow may take the bytes for; OpenCV decodes all of them.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "GIF", "PPM", "SUN", "AVIF")

# A line per strip that cannot be read is no news to anyone: the sender gets the error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_with_opencv(body: Any, flags: int) -> npt.NDArray[Any]:
    """Decode with ``cv2.imdecode``.

    Raises:
        ValueError: it cannot.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(body, dtype=np.uint8), flags)
    except cv2.error as error:
        raise ValueError(str(error.err or error)) from None
    if pixels is None:
        raise ValueError("is it complete, with integer samples?")
    decoded: npt.NDArray[Any] = pixels
    return decoded


def decode_with_pillow(body: Any, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode to (H, W, 3) BGR, rotated by EXIF, as mmcv's ``imfrombytes(backend='pillow')`` does (mmcv.image.io).

    Raises:
        OSError, ValueError, SyntaxError, …: it cannot.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a palette with transparency, which mmcv drops too
        with Image.open(io.BytesIO(body), formats=PILLOW_FORMATS) as opened:
            if opened.width * opened.height > max_pixels:  # a GIF's first frame may be larger than its screen
                raise ValueError(f"it has {opened.width} x {opened.height} pixels")
            image = ImageOps.exif_transpose(opened)
            if image.mode == "LA":  # grey with alpha: mmcv composes it over the mean colour of ImageNet
                rgba = image.convert("RGBA")
                image = Image.new("RGB", rgba.size, (124, 117, 104))
                image.paste(rgba, mask=rgba.split()[3])
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def main() -> int:
    """Decode; exit status 0, 1 with the reason on standard error, or `OUT_OF_MEMORY`."""
    memory_bytes, seconds, max_pixels, flags = (int(text) for text in sys.argv[1:5])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    body = sys.stdin.buffer.read()
    try:
        pixels = decode_with_pillow(body, max_pixels) if flags == PILLOW else decode_with_opencv(body, flags)
    except Exception as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return OUT_OF_MEMORY
        print((str(error).splitlines() or [type(error).__name__])[0][:200], file=sys.stderr)
        return 1
    header = {"dtype": str(pixels.dtype), "shape": pixels.shape}
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n")
    sys.stdout.buffer.write(np.ascontiguousarray(pixels).data)
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without the time that the libraries take to end
