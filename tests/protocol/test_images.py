"""Image decoding with Pillow, as mmcv's loader does it."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.images import decode_image

ORIENTATION = 0x0112


def encoded(mode: str, suffix: str, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, suffix, **({"exif": exif} if orientation != 1 else {}))
    return buffer.getvalue()


PICTURES = {
    "png": encoded("RGB", "png"),
    "jpeg": encoded("RGB", "jpeg"),
    "webp": encoded("RGB", "webp"),
    "bmp": encoded("RGB", "bmp"),
    "grey": encoded("L", "png"),
    "grey over transparent": encoded("LA", "png"),
    "transparent": encoded("RGBA", "png"),
    "palette": encoded("P", "png"),
    "on its side": encoded("RGB", "jpeg", orientation=6),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pillow_decoder_gives_mmcvs_pixels(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmcv import imfrombytes

        expected = imfrombytes(PICTURES[name], flag="color", backend="pillow")
    got = decode_image(PICTURES[name], "color", "pillow", 10_000)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and np.array_equal(got, expected)


def test_pillow_and_opencv_agree_on_lossless_formats() -> None:
    one, other = (decode_image(PICTURES["png"], "color", decoder, 10_000) for decoder in ("cv2", "pillow"))
    assert np.array_equal(one, other)


def test_image_size_is_checked_before_decoding() -> None:
    with pytest.raises(FrameTooLarge, match="30 x 20"):
        decode_image(PICTURES["png"], "color", "pillow", 599)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PICTURES)))
def test_corrupted_images_decode_or_raise_a_client_error(data: st.DataObject, name: str) -> None:
    body = bytearray(PICTURES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(1, len(body))) :]
    with suppress(UndecodableFrame, FrameTooLarge):
        decode_image(bytes(body), "color", "pillow", 10_000)
