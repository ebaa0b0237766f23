"""Frame decoding: exact values, named mistakes, no allocation before the checks."""

from __future__ import annotations

import base64
import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.errors import (
    ClientError,
    FrameTooLarge,
    NonFinitePoints,
    UndecodableFrame,
)
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits

LIDAR, IMAGE = FrameSpec("lidar", load_dim=4), FrameSpec("image")


def points(n: int, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(n).uniform(-50, 50, (n, dim)).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def decode(body, spec=LIDAR, limits=None, **options):
    return decode_frame(body, spec, FrameOptions(**options), limits or Limits()).data


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bin_is_decoded_bit_for_bit(wrap):
    cloud = points(100)
    np.testing.assert_array_equal(decode(wrap(cloud.tobytes())), cloud)


@pytest.mark.parametrize(
    "array", [points(7), points(7).astype(np.float64), np.asfortranarray(points(7)), points(0)]
)
def test_npy_is_decoded_as_float32(array):
    decoded = decode(npy(array))
    assert decoded.dtype == np.float32 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, array.astype(np.float32))


def test_empty_point_cloud_must_be_declared():
    assert decode(b"", num_points=0).shape == (0, 4)
    with pytest.raises(UndecodableFrame, match="num_points"):
        decode(b"")


@pytest.mark.parametrize(
    ("body", "options", "named"),
    [
        (points(10).tobytes()[:-3], {}, "4 float32"),
        (points(3, 5).tobytes(), {}, "4 float32"),
        (points(4, 5).tobytes(), {"load_dim": 5}, "5"),
        (points(4, 5).tobytes(), {"num_points": 4}, "4.* 5"),
        (npy(points(4, 5)), {}, r"\(4, 5\).*\(N, 4\)"),
        (npy(points(4))[:-8], {}, "bytes"),
        (npy(np.zeros((3, 4), dtype="<U4")), {}, "<U4"),
        (b"\x93NUMPY\x01\x00\xff\xff{", {}, "npy"),
        (b"hello, this is text, not a point cloud, but of 64 bytes in all!!", {}, "text"),
        (base64.b64encode(points(12).tobytes()), {}, "b64"),
        (np.full((4, 4), 3e38, dtype=np.float32).tobytes(), {}, "3e\\+38"),
    ],
)
def test_bytes_that_are_not_a_point_cloud_are_rejected(body, options, named):
    with pytest.raises(UndecodableFrame, match=named):
        decode(body, **options)


def test_npy_with_a_pickle_is_not_opened(tmp_path):
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    with pytest.raises(UndecodableFrame):
        decode(npy(np.array([[Evil()] * 4], dtype=object)))
    assert not witness.exists()


def test_npy_that_claims_a_petabyte_is_rejected_without_allocation():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (281474976710656, 4), }"
    body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(FrameTooLarge, match="281474976710656"):
        decode(body)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encode", [np.ndarray.tobytes, npy])
def test_non_finite_points_are_counted(value, encode):
    cloud = points(10)
    cloud[3, 3] = cloud[7, 0] = value
    with pytest.raises(NonFinitePoints, match="2 of 10"):
        decode(encode(cloud))


def test_limits_are_checked_first():
    with pytest.raises(FrameTooLarge, match="100"):
        decode(points(10).tobytes(), limits=Limits(max_frame_bytes=100))
    with pytest.raises(FrameTooLarge, match="10"):
        decode(points(10).tobytes(), limits=Limits(max_points=9))


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_image_is_decoded_as_by_opencv(suffix):
    body = cv2.imencode(suffix, picture())[1].tobytes()
    np.testing.assert_array_equal(
        decode(body, IMAGE), cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
def test_truncated_image_is_rejected(suffix, kept):
    body = cv2.imencode(suffix, picture())[1].tobytes()
    with pytest.raises(UndecodableFrame):
        decode(body[: int(len(body) * kept)], IMAGE)


def test_decompression_bomb_is_rejected_by_its_header():
    stream = io.BytesIO()
    Image.new("1", (30000, 30000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 200_000
    with pytest.raises(FrameTooLarge):
        decode(stream.getvalue(), IMAGE)


@pytest.mark.parametrize("body", [b"", b"GIF89a" + bytes(50), b"plain text", points(5).tobytes()])
def test_bytes_that_are_not_an_image_are_rejected(body):
    with pytest.raises(UndecodableFrame):
        decode(body, IMAGE)


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=300), image=st.booleans())
def test_random_bytes_decode_or_raise_a_client_error(body, image):
    try:
        decode(body, IMAGE if image else LIDAR)
    except ClientError as error:
        assert str(error)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), image=st.booleans())
def test_corrupted_files_decode_or_raise_a_client_error(data, image):
    body = bytearray(cv2.imencode(".jpg", picture())[1].tobytes() if image else npy(points(5)))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(body), IMAGE if image else LIDAR)
    except ClientError as error:
        assert str(error)
