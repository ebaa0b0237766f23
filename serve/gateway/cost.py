"""Estimate the cost of a frame from its size and image headers: points of a point cloud, pixels of an image."""

from __future__ import annotations

import io
import struct
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from serve.errors import UndecodableFrame
from serve.protocol.batch import Body, Bytes

__all__ = ["FrameCost", "estimate_cost"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


@dataclass(frozen=True)
class FrameCost:
    """Input of batching.

    Attributes:
        cost: points of the point cloud, else the pixels of all images together.
        nbytes: size as sent.
        key: frames of different keys do not share a batch: images of different sizes would be padded to the
            largest, which changes their answers.
    """

    cost: int
    nbytes: int
    key: Hashable = None


def estimate_cost(body: Body, spec: Mapping[str, Any]) -> FrameCost:
    """Estimate the cost of one frame for the model described by `spec`.

    Raises:
        UndecodableFrame: the header of an image cannot be read.
    """
    parts = body if isinstance(body, Mapping) else {_only_part(spec): body}
    points = sum(len(part) for name, part in parts.items() if name == "points")
    sizes = tuple(_image_size(part) for name, part in sorted(parts.items()) if name.startswith("image"))
    stride = 4 * int(spec.get("load_dim") or 4)
    cost = points // stride if points else sum(width * height for width, height in sizes)
    return FrameCost(max(1, cost), sum(len(part) for part in parts.values()), sizes or None)


def _only_part(spec: Mapping[str, Any]) -> str:
    parts = spec.get("parts")
    if parts:
        return str(parts[0])
    return "points" if spec["modality"] == "lidar" else "image"


def _image_size(image: Bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            return opened.size
    except Image.DecompressionBombError as error:
        raise UndecodableFrame(f"the image is too large: {error}") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError):
        raise UndecodableFrame(
            f"the bytes are not a {', '.join(_FORMATS)} image; send the file unchanged"
        ) from None
