"""What a frame will cost, seen from its size alone: points of a cloud, pixels of an image.

Looks at no more than a header; whether the rest decodes is the worker's to say. Knows nothing about queues.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from serve.errors import UndecodableFrame
from serve.protocol.batch import Body, Bytes

__all__ = ["Measure", "measure"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


@dataclass(frozen=True)
class Measure:
    """What batching goes by.

    Attributes:
        cost: points of a cloud, or pixels of an image (of all images together).
        nbytes: size as sent.
        key: frames of different keys are not put into one batch: images of different size would be padded to
            each other's, which changes their answers.
    """

    cost: int
    nbytes: int
    key: Hashable = None


def measure(body: Body, spec: Mapping[str, Any]) -> Measure:
    """Measure one frame for the model that describes itself as `spec`.

    Raises:
        UndecodableFrame: an image's header cannot be read.
    """
    parts = body if isinstance(body, Mapping) else {_only_part(spec): body}
    points = sum(len(part) for name, part in parts.items() if name == "points")
    sizes = tuple(_size(part) for name, part in sorted(parts.items()) if name.startswith("image"))
    stride = 4 * int(spec.get("load_dim") or 4)
    cost = points // stride if points else sum(width * height for width, height in sizes)
    return Measure(max(1, cost), sum(len(part) for part in parts.values()), sizes or None)


def _only_part(spec: Mapping[str, Any]) -> str:
    parts = spec.get("parts")
    if parts:
        return str(parts[0])
    return "points" if spec["modality"] == "lidar" else "image"


def _size(image: Bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            return opened.size
    except Image.DecompressionBombError as error:
        raise UndecodableFrame(f"the image is too large: {error}") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError):
        raise UndecodableFrame(
            f"not a {', '.join(_FORMATS)} image; send the unchanged bytes of the file"
        ) from None
