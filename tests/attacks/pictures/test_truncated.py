"""A picture that ends early is refused, also if what is left was closed so that it looks whole."""

from __future__ import annotations

import pytest

from serve.errors import UndecodableFrame
from serve.protocol.images import decode_image
from tests.attacks.pictures import hostile

PIXELS = 96 * 64

CLOSED = {
    **{f"jpeg at {part}": (lambda part=part: hostile.closed_jpeg(part)) for part in (0.5, 0.9, 0.99)},
    **{
        f"progressive jpeg at {part}": (lambda part=part: hostile.closed_jpeg(part, progressive=True))
        for part in (0.5, 0.9, 0.99)
    },
    "jpeg with restart markers": lambda: hostile.closed_jpeg(0.8, restart_marker_rows=1),
    "png": lambda: hostile.closed_png(whole_stream=False),
    "png of few rows": lambda: hostile.closed_png(whole_stream=True),
    "gif": hostile.closed_gif,
    "webp": lambda: hostile.closed_webp(lossless=False),
    "webp without loss": lambda: hostile.closed_webp(lossless=True),
    "tiff": lambda: hostile.closed_tiff(1),
    "tiff, deflate": lambda: hostile.closed_tiff(8),
    "tiff, packbits": lambda: hostile.closed_tiff(32773),
    "jpeg 2000": hostile.closed_jpeg2000,
    "bmp of runs": lambda: hostile.bmp_of_runs(96, 64, 32),
}


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
@pytest.mark.parametrize("kind", CLOSED)
def test_picture_that_was_cut_and_closed_is_refused(kind: str, decoder: str) -> None:
    with pytest.raises(UndecodableFrame):
        decode_image(CLOSED[kind](), "color", decoder, PIXELS)


WHOLE = {
    "jpeg": {},
    "jpeg of other subsampling": {"subsampling": 0},
    "jpeg with restart markers": {"restart_marker_rows": 1},
    "jpeg of optimal codes": {"optimize": True},
    "progressive jpeg": {"progressive": True},
    "progressive jpeg with restart markers": {"progressive": True, "restart_marker_blocks": 3},
    "jpeg with metadata": {"comment": b"c" * 60000, "icc_profile": bytes(200_000)},
}


@pytest.mark.parametrize("size", [(96, 64), (1, 1), (7, 9), (640, 8), (17, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_jpeg_of_any_kind_is_decoded(kind: str, mode: str, size: tuple[int, int]) -> None:
    options = {**WHOLE[kind], "quality": 35 if size[0] == 96 else 95}
    body = hostile.saved(hostile.smooth(*size).convert(mode), "JPEG", **options)
    for decoder in ("cv2", "pillow"):
        assert decode_image(body, "color", decoder, PIXELS).shape == (size[1], size[0], 3)


def test_jpeg_followed_by_other_bytes_is_decoded() -> None:
    body = hostile.saved(hostile.smooth(), "JPEG") + b"\xff\xd8 another picture, as phones append"
    assert decode_image(body, "color", "cv2", PIXELS).shape == (64, 96, 3)


def test_jpeg_with_a_preview_in_its_metadata_is_decoded() -> None:
    preview = hostile.saved(hostile.smooth(32, 32), "JPEG")
    body = hostile.jpeg_with(b"\xff\xe2" + (len(preview) + 2).to_bytes(2, "big") + preview)
    assert decode_image(body, "color", "cv2", PIXELS).shape == (64, 96, 3)
