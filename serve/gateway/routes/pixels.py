"""Images as tensors of pixels, in the layouts that clients of Triton send, to PNG.

RGB, as UINT8 or as FP32 of whole numbers from 0 to 255: [H, W, 3], [1, H, W, 3], [3, H, W] or [1, 3, H, W]. The length
3 tells the channels; of [3, N, 3] the last one is. Normalized pixels are refused: the model's own pipeline does that.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from serve.errors import UndecodableFrame

__all__ = ["encode_pixels"]

_LAYOUTS = "[H, W, 3], [1, H, W, 3], [3, H, W] or [1, 3, H, W]"


def encode_pixels(name: str, tensor: npt.NDArray[Any]) -> bytes:
    """Encode the pixels of one image, without loss.

    Args:
        name: of the input, for messages.
        tensor: the pixels, RGB.

    Raises:
        UndecodableFrame: another layout or datatype, or values that are no levels of brightness.
    """
    pixels = tensor[0] if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if tensor.dtype not in (np.uint8, np.float32) or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UndecodableFrame(
            f"{name} must be BYTES [1], or UINT8 or FP32 {_LAYOUTS}, RGB, one image per request; not {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if not pixels.size:
        raise UndecodableFrame(f"{name} has no pixels: its shape is {list(tensor.shape)}")
    if pixels.dtype != np.uint8:
        levels = pixels.astype(np.uint8) if _are_levels(pixels) else None
        if levels is None:
            raise UndecodableFrame(
                f"{name} of FP32 must have whole numbers from 0 to 255; send pixels as they are, the server "
                "normalizes them as the model needs it"
            )
        pixels = levels
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _are_levels(pixels: npt.NDArray[np.float32]) -> bool:
    """Whether values are whole numbers from 0 to 255; an image scaled to 0 to 1 has only 0 and 1 among them."""
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 255):
        return False
    return bool((pixels == np.floor(pixels)).all())
