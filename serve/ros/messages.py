"""Frames out of ROS messages: PointCloud2, Image and CompressedImage of ``sensor_msgs``, of ROS 1 and 2.

A message is any object with the fields of its definition, as rclpy, rosbags and mcap-ros2-support deserialise it.
Numbers are checked before they are used, because bags hold what drivers wrote.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.errors import UndecodableFrame, quote

__all__ = [
    "COMPRESSED_IMAGE",
    "IMAGE",
    "POINT_CLOUD",
    "cloud_bytes",
    "compressed_bytes",
    "pixels",
    "stamp_ns",
]

POINT_CLOUD, IMAGE, COMPRESSED_IMAGE = (
    f"sensor_msgs/msg/{name}" for name in ("PointCloud2", "Image", "CompressedImage")
)
# Constants of sensor_msgs/PointField.
_FIELD_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
_MOST_POINTS = 1 << 26
# Encoding → channels, bytes per channel, and the conversion to BGR; names of sensor_msgs/image_encodings.hpp.
_COLOURS: Mapping[str, tuple[int, int, int | None]] = {
    "bgr8": (3, 1, None),
    "8UC3": (3, 1, None),
    "rgb8": (3, 1, cv2.COLOR_RGB2BGR),
    "bgra8": (4, 1, cv2.COLOR_BGRA2BGR),
    "8UC4": (4, 1, cv2.COLOR_BGRA2BGR),
    "rgba8": (4, 1, cv2.COLOR_RGBA2BGR),
    "mono8": (1, 1, cv2.COLOR_GRAY2BGR),
    "8UC1": (1, 1, cv2.COLOR_GRAY2BGR),
    "bgr16": (3, 2, None),
    "rgb16": (3, 2, cv2.COLOR_RGB2BGR),
    "bgra16": (4, 2, cv2.COLOR_BGRA2BGR),
    "rgba16": (4, 2, cv2.COLOR_RGBA2BGR),
    "mono16": (1, 2, cv2.COLOR_GRAY2BGR),
    # OpenCV names a pattern by its second row: ROS' RGGB is its BG.
    "bayer_rggb8": (1, 1, cv2.COLOR_BayerBG2BGR),
    "bayer_bggr8": (1, 1, cv2.COLOR_BayerRG2BGR),
    "bayer_gbrg8": (1, 1, cv2.COLOR_BayerGR2BGR),
    "bayer_grbg8": (1, 1, cv2.COLOR_BayerGB2BGR),
    "yuv422": (2, 1, cv2.COLOR_YUV2BGR_UYVY),
    "uyvy": (2, 1, cv2.COLOR_YUV2BGR_UYVY),
    "yuv422_yuy2": (2, 1, cv2.COLOR_YUV2BGR_YUY2),
    "yuyv": (2, 1, cv2.COLOR_YUV2BGR_YUY2),
}


def stamp_ns(message: Any) -> int:
    """Time of a message's header, nanoseconds; 0 if the driver set none."""
    stamp = message.header.stamp
    seconds = getattr(stamp, "sec", getattr(stamp, "secs", 0))
    return int(seconds) * 10**9 + int(getattr(stamp, "nanosec", getattr(stamp, "nsecs", 0)))


def cloud_bytes(message: Any) -> bytes:
    """Return a PointCloud2 as the bytes of a structured ``.npy``: its fields by name, without its invalid points.

    Points without finite coordinates are left out: the message's definition calls them invalid, and organised clouds
    have one for every ray without a return.

    Raises:
        UndecodableFrame: the layout contradicts itself, or x, y and z are not there.
    """
    fields: dict[str, tuple[str, int]] = {}
    for field in message.fields:
        kind = _FIELD_TYPES.get(int(field.datatype))
        if kind is None:
            raise UndecodableFrame(
                f"field {quote(str(field.name))} of the PointCloud2 has datatype {field.datatype}; 1 to 8 are known"
            )
        if int(field.count) in (0, 1) and field.name:  # some drivers write 0 for one
            fields[str(field.name)] = (kind, int(field.offset))
    if missing := [name for name in "xyz" if name not in fields]:
        raise UndecodableFrame(
            f"the PointCloud2 has the fields {', '.join(fields) or 'none'}, but no {', '.join(missing)}"
        )
    height, width, step, row = (
        int(getattr(message, name)) for name in ("height", "width", "point_step", "row_step")
    )
    data = np.frombuffer(memoryview(message.data), np.uint8)
    points = height * width
    row = row if height > 1 else step * width  # of one row, drivers leave row_step at 0
    last = max(offset + np.dtype(kind).itemsize for kind, offset in fields.values())
    if not (0 <= points <= _MOST_POINTS and last <= step and step * width <= row) and points:
        raise UndecodableFrame(
            f"the PointCloud2 contradicts itself: {height} x {width} points of {step} bytes in rows of {row} bytes, "
            f"with fields up to byte {last}"
        )
    if points and (height - 1) * row + width * step > len(data):
        raise UndecodableFrame(
            f"the PointCloud2 has {len(data)} bytes of data, and {height} x {width} points take "
            f"{(height - 1) * row + width * step}; is the recording complete?"
        )
    packed_kind = np.dtype([(name, "<" + kind) for name, (kind, _) in fields.items()])
    if not points:  # whose layout may be one that numpy cannot have
        return _npy(np.empty(0, packed_kind))
    order = ">" if message.is_bigendian else "<"
    laid_out = np.dtype(
        {
            "names": list(fields),
            "formats": [order + kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": step,
        }
    )
    found = np.ndarray((height, width), laid_out, data.data, 0, (row, step)).reshape(-1)
    finite = np.ones(len(found), bool)
    for name in "xyz":
        finite &= np.isfinite(found[name])
    packed = np.empty(int(finite.sum()), packed_kind)
    for name in fields:
        packed[name] = found[name][finite]
    return _npy(packed)


def _npy(points: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, points, allow_pickle=False)
    return file.getvalue()


def pixels(message: Any) -> NDArray[np.uint8]:
    """Pixels of an Image, (H, W, 3) BGR; of 16 bits the upper eight.

    Raises:
        UndecodableFrame: an encoding that is no picture (depth, flow), or too little data.
    """
    encoding = str(message.encoding)
    if encoding not in _COLOURS:
        raise UndecodableFrame(
            f"Image encoding {quote(encoding)} is no picture that is read; known: {', '.join(_COLOURS)}"
        )
    channels, size, conversion = _COLOURS[encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    step = step or width * channels * size
    data = np.frombuffer(memoryview(message.data), np.uint8)
    if not (0 < height < 1 << 16 and 0 < width < 1 << 16) or step < width * channels * size:
        raise UndecodableFrame(
            f"the Image contradicts itself: {width} x {height} pixels of {encoding} in rows of {step} bytes"
        )
    if (height - 1) * step + width * channels * size > len(data):
        raise UndecodableFrame(
            f"the Image has {len(data)} bytes, and {width} x {height} pixels of {encoding} take {height * step}; is "
            "the recording complete?"
        )
    shape, strides = (height, width, channels), (step, channels * size, size)
    order = ">" if message.is_bigendian else "<"
    raw: NDArray[Any] = np.ndarray(shape, f"{order}u{size}", data.data, 0, strides)
    image = np.ascontiguousarray(raw if size == 1 else raw >> 8, np.uint8)
    if conversion is None:
        return image
    if channels == 1:
        image = image[..., 0]
    elif channels == 2 and width % 2:
        raise UndecodableFrame(f"an Image of {encoding} has an even width, this one {width}")
    try:
        return np.asarray(cv2.cvtColor(image, conversion), np.uint8)
    except cv2.error as error:  # a Bayer pattern of one row
        raise UndecodableFrame(
            f"{width} x {height} pixels of {encoding} cannot be converted: {error}"
        ) from error


def compressed_bytes(message: Any) -> bytes:
    """Return the file in a CompressedImage: JPEG, PNG or another that images are read from.

    Raises:
        UndecodableFrame: depth, which is no picture.
    """
    kind = str(message.format)
    if "compressedDepth" in kind:
        raise UndecodableFrame(f"the CompressedImage has the format {quote(kind)}: depth, and no picture")
    return bytes(memoryview(message.data))
