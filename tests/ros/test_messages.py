"""Frames out of ROS messages: layouts and encodings as drivers write them, and as they should not."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from serve.errors import UndecodableFrame
from serve.ros import messages

TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}


def cloud(points: NDArray[Any], *, height: int = 1, row_padding: int = 0) -> Any:
    """A PointCloud2 with the layout of a structured array."""
    dtype = points.dtype
    assert dtype.fields is not None
    fields = [
        SimpleNamespace(name=name, offset=offset, datatype=TYPES[kind.str[1:]], count=1)
        for name, (kind, offset, *_) in dtype.fields.items()
    ]
    width = len(points) // height
    rows = points.reshape(height, width)
    data = b"".join(row.tobytes() + b"\xff" * row_padding for row in rows)
    message = SimpleNamespace(
        header=SimpleNamespace(stamp=SimpleNamespace(sec=3, nanosec=250_000_000), frame_id="lidar"),
        height=height,
        width=width,
        fields=fields,
        is_bigendian=any(kind.str.startswith(">") for kind, *_ in dtype.fields.values()),
        point_step=dtype.itemsize,
        row_step=width * dtype.itemsize + row_padding,
        data=np.frombuffer(data, np.uint8),
        is_dense=True,
    )
    return message


def altered(message: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def read(message: Any) -> NDArray[Any]:
    return np.load(io.BytesIO(messages.cloud_bytes(message)))


def velodyne(count: int = 6, order: str = "<") -> NDArray[Any]:
    """Velodyne's layout: padding between z and intensity, and behind the ring."""
    dtype = np.dtype(
        {
            "names": ["x", "y", "z", "intensity", "ring", "time"],
            "formats": [f"{order}f4"] * 4 + [f"{order}u2", f"{order}f8"],
            "offsets": [0, 4, 8, 16, 20, 24],
            "itemsize": 40,
        }
    )
    points = np.zeros(count, dtype)
    rng = np.random.default_rng(0)
    for name in ("x", "y", "z", "intensity", "time"):
        points[name] = rng.uniform(-50, 50, count)
    points["ring"] = rng.integers(0, 64, count)
    return points


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("height", "padding"), [(1, 0), (2, 0), (3, 24)])
def test_fields_are_read_at_their_offsets(order: str, height: int, padding: int) -> None:
    points = velodyne(order=order)
    found = read(cloud(points, height=height, row_padding=padding))
    assert found.dtype.names == points.dtype.names
    for name in points.dtype.names or ():
        np.testing.assert_array_equal(found[name], points[name])
        assert found.dtype[name].byteorder in "<=|"


def test_invalid_points_are_left_out() -> None:
    points = velodyne()
    points["y"][1], points["x"][4], points["intensity"][0] = np.nan, np.inf, np.nan
    found = read(cloud(points))
    np.testing.assert_array_equal(found["ring"], np.delete(points["ring"], [1, 4]))


def test_rows_without_a_length_are_read_if_there_is_one() -> None:
    assert len(read(altered(cloud(velodyne()), row_step=0))) == 6


def test_an_empty_cloud_has_its_columns() -> None:
    found = read(cloud(velodyne(0)))
    assert len(found) == 0 and found.dtype.names == velodyne().dtype.names


def test_an_empty_cloud_is_read_whatever_its_layout() -> None:
    message = altered(cloud(velodyne(0)), point_step=(1 << 32) - 1)
    for field in message.fields:
        field.offset = (1 << 32) - 8
    assert len(read(message)) == 0


def test_a_field_of_several_values_is_left_out() -> None:
    message = cloud(velodyne())
    message.fields.append(SimpleNamespace(name="normal", offset=24, datatype=7, count=3))
    assert "normal" not in (read(message).dtype.names or ())


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 7},
        {"height": 4},
        {"width": 1 << 31, "height": 1 << 31},
        {"point_step": 8},
        {"point_step": 0},
        {"row_step": 1, "height": 2, "width": 3},
        {"data": b""},
        {"fields": []},
        {"fields": [SimpleNamespace(name="x", offset=0, datatype=9, count=1)]},
        {"fields": [SimpleNamespace(name=n, offset=1 << 31, datatype=7, count=1) for n in "xyz"]},
    ],
)
def test_a_cloud_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UndecodableFrame):
        messages.cloud_bytes(altered(cloud(velodyne()), **changes))


def image(data: NDArray[Any], encoding: str, *, padding: int = 0) -> Any:
    rows = [row.tobytes() + b"\x00" * padding for row in data]
    message = SimpleNamespace(
        height=data.shape[0],
        width=data.shape[1],
        encoding=encoding,
        is_bigendian=data.dtype.byteorder == ">",
        step=len(rows[0]),
        data=np.frombuffer(b"".join(rows), np.uint8),
    )
    return message


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("bgr8", PICTURE),
        ("8UC3", PICTURE),
        ("rgb8", PICTURE[..., ::-1]),
        ("rgba8", np.dstack([PICTURE[..., ::-1], PICTURE[..., 0]])),
        ("bgra8", np.dstack([PICTURE, PICTURE[..., 0]])),
        ("bgr16", (PICTURE.astype("<u2") << 8) + 7),
        ("rgb16", (PICTURE[..., ::-1].astype(">u2") << 8) + 7),
    ],
)
def test_colours_are_read(encoding: str, data: NDArray[Any], padding: int) -> None:
    if encoding == "rgb16":
        data = data.astype(">u2")
    found = messages.pixels(image(np.ascontiguousarray(data), encoding, padding=padding))
    np.testing.assert_array_equal(found, PICTURE)


@pytest.mark.parametrize(
    ("encoding", "shift", "dtype"), [("mono8", 0, "u1"), ("8UC1", 0, "u1"), ("mono16", 8, ">u2")]
)
def test_grey_is_read(encoding: str, shift: int, dtype: str) -> None:
    grey = PICTURE[..., :1]
    found = messages.pixels(image((grey.astype(dtype) << shift).astype(dtype), encoding))
    np.testing.assert_array_equal(found, np.repeat(grey, 3, 2))


@pytest.mark.parametrize(
    ("encoding", "pattern"),
    [("bayer_rggb8", "RGGB"), ("bayer_bggr8", "BGGR"), ("bayer_gbrg8", "GBRG"), ("bayer_grbg8", "GRBG")],
)
def test_bayer_patterns_give_the_colour_that_they_hold(encoding: str, pattern: str) -> None:
    colour = {"R": 200, "G": 100, "B": 50}
    tile = np.array([colour[letter] for letter in pattern], np.uint8).reshape(2, 2)
    found = messages.pixels(image(np.tile(tile, (8, 8))[..., None], encoding))
    np.testing.assert_array_equal(found[4:-4, 4:-4].reshape(-1, 3), [[50, 100, 200]] * 64)


@pytest.mark.parametrize(("encoding", "code"), [("uyvy", "UYVY"), ("yuv422_yuy2", "YUY2")])
def test_yuv_gives_the_colour_that_it_holds(encoding: str, code: str) -> None:
    luma, u, v = 120, 90, 160
    values = {"Y": luma, "U": u, "V": v, "2": v}
    order = [values[letter] for letter in ("UYVY" if code == "UYVY" else "YUYV")]
    packed = np.tile(np.array(order, np.uint8), (4, 4)).reshape(4, 8, 2)
    found = messages.pixels(image(packed, encoding))
    expected = (luma + 1.402 * (v - 128), luma + 1.772 * (u - 128))
    assert abs(int(found[0, 0, 2]) - expected[0]) < 30 and abs(int(found[0, 0, 0]) - expected[1]) < 30


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": "32FC1"},
        {"encoding": "16UC1"},
        {"encoding": ""},
        {"step": 4},
        {"height": 7},
        {"width": 0},
        {"height": 1 << 40},
        {"data": b""},
    ],
)
def test_an_image_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UndecodableFrame):
        messages.pixels(altered(image(PICTURE, "bgr8"), **changes))


def test_an_unknown_encoding_is_named_with_those_that_are_read() -> None:
    with pytest.raises(UndecodableFrame, match=r"32FC1.*rgb8"):
        messages.pixels(image(PICTURE, "32FC1"))


def test_compressed_images_are_handed_on_and_depth_is_refused() -> None:
    jpeg = cv2.imencode(".jpg", PICTURE)[1]
    assert messages.compressed_bytes(SimpleNamespace(format="jpeg", data=jpeg)) == jpeg.tobytes()
    with pytest.raises(UndecodableFrame):
        messages.compressed_bytes(SimpleNamespace(format="16UC1; compressedDepth png", data=jpeg))


def test_times_of_ros_1_and_2_are_read() -> None:
    two = SimpleNamespace(sec=3, nanosec=5)
    one = SimpleNamespace(secs=3, nsecs=5)
    for stamp in (one, two):
        assert messages.stamp_ns(SimpleNamespace(header=SimpleNamespace(stamp=stamp))) == 3_000_000_005
