"""Image decoding as mmcv's loader does it, within the limits."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.image_size import image_size
from serve.protocol.images import COLOR_TYPES, decode_image

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


def with_pillow(mode: str, suffix: str, **options: object) -> bytes:
    """Encode a smooth picture of 96 x 64 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 4), np.uint8)
    image = Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0), "RGBA").convert(mode)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(buffer, suffix, **options)
    return buffer.getvalue()


def with_opencv(suffix: str, dtype: type) -> bytes:
    rng = np.random.default_rng(1)
    pixels = rng.random((64, 96, 3), np.float32)
    if dtype is not np.float32:
        pixels = (pixels * np.iinfo(dtype).max).astype(dtype)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def png_chunk(kind: bytes, data: bytes, *, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_with(chunk: bytes) -> bytes:
    plain = with_pillow("RGB", "png")
    return plain[:33] + chunk + plain[33:]  # after the header chunk


COLOURS = np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)


def pam(
    pixels: np.ndarray, kind: str = "", maxval: int = 0, depth: int | None = None, more: str = ""
) -> bytes:
    depth = depth or (1 if pixels.ndim == 2 else pixels.shape[2])
    lines = [f"WIDTH {pixels.shape[1]}", f"HEIGHT {pixels.shape[0]}", f"DEPTH {depth}"]
    lines += [f"MAXVAL {maxval or np.iinfo(pixels.dtype).max}", *([f"TUPLTYPE {kind}"] if kind else [])]
    header = "\n".join(["P7", *lines, *([more] if more else []), "ENDHDR", ""])
    return header.encode() + pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()


def rotated(suffix: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return with_pillow("RGB", suffix, exif=exif)


NATIVE = {
    **{
        f"tiff {c}": with_pillow("RGB", "tiff", compression=c)
        for c in ("raw", "tiff_lzw", "jpeg", "packbits")
    },
    **{f"tiff {mode}": with_pillow(mode, "tiff") for mode in ("1", "L", "P", "RGBA", "CMYK")},
    "tiff of 16 bits": with_opencv(".tiff", np.uint16),
    "tiff pages": with_pillow("RGB", "tiff", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "tiff on its side": rotated("tiff"),
    "jpeg 2000": with_pillow("RGB", "jpeg2000"),
    "jpeg 2000 stream": with_pillow("RGB", "jpeg2000", no_jp2=True),
    "jpeg 2000 grey": with_pillow("L", "jpeg2000"),
    "jpeg 2000 alpha": with_pillow("RGBA", "jpeg2000"),
    "gif": with_pillow("P", "gif"),
    "gif animated": with_pillow("P", "gif", save_all=True, append_images=[Image.new("P", (96, 64), 7)]),
    "gif transparent": with_pillow("P", "gif", transparency=3),
    "png of 16 bits": with_opencv(".png", np.uint16),
    "png bits": with_pillow("1", "png"),
    "png palette": with_pillow("P", "png"),
    "png alpha": with_pillow("RGBA", "png"),
    "png on its side": rotated("png"),
    "png with long text": png_with(png_chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000)),
    "png with long packed text": png_with(
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000))
    ),
    "png with a damaged text": png_with(png_chunk(b"tEXt", b"Comment\0x", checksum=1)),
    "png with an unknown chunk": png_with(png_chunk(b"abCd", b"anything")),
    "png followed by bytes": with_pillow("RGB", "png") + b"trailer",
    "jpeg cmyk": with_pillow("CMYK", "jpeg"),
    "jpeg progressive": with_pillow("RGB", "jpeg", progressive=True),
    "jpeg grey": with_pillow("L", "jpeg"),
    "jpeg on its side": rotated("jpeg"),
    "webp alpha": with_pillow("RGBA", "webp"),
    "webp on its side": rotated("webp"),
    "bmp palette": with_pillow("P", "bmp"),
    "bmp bits": with_pillow("1", "bmp"),
    "bmp alpha": with_pillow("RGBA", "bmp"),
    "ppm": with_pillow("RGB", "ppm"),
    "pgm": with_pillow("L", "ppm"),
    "pam": pam(COLOURS, "RGB"),
    "pam of opencv": with_opencv(".pam", np.uint8),
    "pam grey": pam(COLOURS[:, :, 0], "GRAYSCALE", more="# by hand\n"),
    "pam of 16 bits": pam(COLOURS.astype(np.uint16) * 257, "RGB"),
    "pam grey of 12 bits": pam(COLOURS[:, :, 0].astype(np.uint16) * 16, "GRAYSCALE", maxval=4095),
    "sun raster": with_opencv(".ras", np.uint8),
    "radiance": with_opencv(".hdr", np.float32),
    "pfm": with_opencv(".pfm", np.float32),
}


@pytest.mark.parametrize("color_type", COLOR_TYPES)
@pytest.mark.parametrize("name", NATIVE)
def test_images_of_every_kind_have_mmcvs_pixels(name: str, color_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmcv import imfrombytes

        expected = imfrombytes(NATIVE[name], flag=color_type)
    found = decode_image(NATIVE[name], color_type, "cv2", 96 * 64)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize(
    "body",
    [
        pam(COLOURS[:, :, :2], "GRAYSCALE_ALPHA"),
        pam(np.dstack([COLOURS, COLOURS[:, :, 0]]), "RGB_ALPHA"),
        pam(COLOURS[:, :, 0], "RGB"),  # of which OpenCV reads three bytes a pixel
        pam(COLOURS, "GRAYSCALE"),
        pam(COLOURS.astype(np.uint16)),  # a third of each row is written
        pam(COLOURS[:, :, 0].astype(np.uint16) * 16, maxval=4095),
        pam(COLOURS[:, :, 0], "GRAYSCALE", depth=100_000_000),
        pam(COLOURS[:, :, 0] // 255, "BLACKANDWHITE", maxval=1),
        pam(COLOURS, "RGB", more="DEPTH 1"),
        pam(COLOURS, "RGB", more="# a comment\rDEPTH 1"),
        pam(COLOURS, "RGB", more=" DEPTH 1"),
        pam(COLOURS, "RGB").replace(b"\n", b"\r\n", 6),
    ],
)
def test_a_pam_whose_header_opencv_would_trust_too_far_is_refused(body: bytes) -> None:
    for color_type in COLOR_TYPES:
        with pytest.raises(UndecodableFrame):
            decode_image(body, color_type, "cv2", 96 * 64)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "video"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"%PDF-1.7", "PDF"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"\n<!DOCTYPE html>", "HTML"),
        (base64.b64encode(with_pillow("RGB", "jpeg")), "base64"),
        (base64.b64encode(with_pillow("RGB", "png")), "base64"),
        (b"data:image/png;base64,iVBORw0KGgo=", "base64"),
        (b'{"instances": []}', "JSON"),
        (b"\x93NUMPY\1\0", "numpy"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(body: bytes, named: str) -> None:
    with pytest.raises(UndecodableFrame, match=named):
        decode_image(body, "color", "cv2", 10_000)


def test_an_unchanged_image_with_an_infinite_sample_is_refused() -> None:
    pixels = np.zeros((64, 96, 3), np.float32)
    pixels[3, 4] = np.inf
    body = cv2.imencode(".pfm", pixels)[1].tobytes()
    with pytest.raises(UndecodableFrame, match="inf"):
        decode_image(body, "unchanged", "cv2", 96 * 64)


@pytest.mark.parametrize("name", NATIVE)
def test_limit_on_pixels_holds_for_every_kind_and_names_its_setting(name: str) -> None:
    assert sorted(image_size(NATIVE[name])) == [64, 96]
    with pytest.raises(FrameTooLarge, match="MMDET3D_SERVE_MAX_PIXELS"):
        decode_image(NATIVE[name], "color", "cv2", 96 * 64 - 1)


@pytest.mark.parametrize("size", [(60_000, 64), (96, 60_000)])
def test_code_stream_larger_than_its_header_counts(size: tuple[int, int]) -> None:
    body = bytearray(NATIVE["jpeg 2000"])
    at = body.index(b"\xff\x4f\xff\x51") + 8
    body[at : at + 8] = struct.pack(">II", *size)
    with pytest.raises(FrameTooLarge):
        decode_image(bytes(body), "color", "cv2", 96 * 64)


def tiff_of_tiles(tile: int) -> bytes:
    """Build the header of a TIFF of 64 x 64 pixels in tiles of `tile` x `tile`."""
    tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 4096}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(5000)


def test_tile_larger_than_its_image_counts() -> None:
    assert image_size(tiff_of_tiles(64)) == image_size(tiff_of_tiles(512)) == (64, 64)
    with pytest.raises(FrameTooLarge):
        decode_image(tiff_of_tiles(30_000), "color", "cv2", 1_000_000)


@pytest.mark.parametrize("name", NATIVE)
def test_cut_image_is_refused(name: str) -> None:
    body = NATIVE[name]
    if name in ("gif animated", "png followed by bytes", "tiff pages"):
        pytest.skip("what is cut is not part of the first picture")
    with pytest.raises(UndecodableFrame):
        decode_image(body[: len(body) * 2 // 3], "color", "cv2", 96 * 64)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(NATIVE)))
def test_damaged_images_decode_or_raise_a_client_error(data: st.DataObject, name: str) -> None:
    body = bytearray(NATIVE[name])
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, min(len(body), 600) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(len(body) // 2, len(body))) :]
    with suppress(UndecodableFrame, FrameTooLarge):
        decode_image(bytes(body), "color", "cv2", 10_000)
