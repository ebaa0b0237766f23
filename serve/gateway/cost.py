"""Estimate the cost of a frame from its size and image headers: points of a point cloud, pixels of an image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.protocol.batch import Body
from serve.protocol.image_size import image_size

__all__ = ["FrameCost", "estimate_cost"]


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
        FrameTooLarge: the header is that of an image far beyond any limit.
    """
    parts = body if isinstance(body, Mapping) else {_only_part(spec): body}
    points = sum(len(part) for name, part in parts.items() if name == "points" or name.startswith("sweep."))
    sizes = tuple(image_size(part) for name, part in sorted(parts.items()) if name.startswith("image"))
    stride = 4 * int(spec.get("load_dim") or 4)
    cost = points // stride if points else sum(width * height for width, height in sizes)
    return FrameCost(max(1, cost), sum(len(part) for part in parts.values()), sizes or None)


def _only_part(spec: Mapping[str, Any]) -> str:
    parts = spec.get("parts")
    if parts:
        return str(parts[0])
    return "points" if spec["modality"] == "lidar" else "image"
