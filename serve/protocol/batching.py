"""Rule by which frames share a batch, for the gateway's queue and for a run over many frames.

A frame has a cost, a size and a key (`estimate_cost`). Frames of one key share a batch until it has so many frames, so
much cost or so many bytes (`BatchRule`); a frame that alone exceeds a bound is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import SettingsError
from serve.protocol.image_size import image_size
from serve.protocol.worker import EncodedFrame

__all__ = [
    "BATCH_BYTES",
    "BATCH_PIXELS",
    "BATCH_POINTS",
    "BatchLimits",
    "BatchRule",
    "BatchSize",
    "FrameCost",
    "estimate_cost",
    "only_part",
    "padded",
    "ragged",
]

# Defaults of the gateway, and of a run over many frames.
BATCH_POINTS = 2_000_000
BATCH_PIXELS = 64_000_000
BATCH_BYTES = 48 << 20

BatchCost = Callable[[int, int, int], int]


def ragged(items: int, total: int, largest: int) -> int:
    """Cost of a batch whose items are concatenated (point clouds): the sum of their costs."""
    return total


def padded(items: int, total: int, largest: int) -> int:
    """Cost of a batch whose items are padded to the largest (images): their number times the largest cost."""
    return items * largest


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one batch.

    Attributes:
        items: maximum number of items.
        cost: maximum cost, in the unit of the items' costs; an item over it is sent alone.
        nbytes: maximum bytes of bodies.
    """

    items: int = 16
    cost: int = 4_000_000
    nbytes: int = BATCH_BYTES

    def __post_init__(self) -> None:
        for name in ("items", "cost", "nbytes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"batch limit {name} must be at least 1, not {getattr(self, name)}")


@dataclass
class BatchSize:
    """Size of the items that a batch has so far.

    Attributes:
        limits: bounds of the batch.
        batch_cost: cost of a batch from its item count, total cost and largest cost.
        items: number of items.
        total: sum of their costs.
        largest: largest of their costs.
        nbytes: sum of their bytes.
    """

    limits: BatchLimits
    batch_cost: BatchCost
    items: int = 0
    total: int = 0
    largest: int = 0
    nbytes: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it has the maximum number of items."""
        return self.items >= self.limits.items

    def admits(self, cost: int, nbytes: int) -> bool:
        """Whether another item would keep the batch within its bounds; the first one always does."""
        if not self.items:
            return True
        with_it = self.batch_cost(self.items + 1, self.total + cost, max(self.largest, cost))
        return with_it <= self.limits.cost and self.nbytes + nbytes <= self.limits.nbytes

    def add(self, cost: int, nbytes: int) -> None:
        """Count another item."""
        self.items += 1
        self.total += cost
        self.largest = max(self.largest, cost)
        self.nbytes += nbytes


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


@dataclass(frozen=True)
class BatchRule:
    """Bounds and cost of the batches of one model.

    Attributes:
        limits: bounds of one batch.
        batch_cost: cost of a batch from its item count, total cost and largest cost.
    """

    limits: BatchLimits
    batch_cost: BatchCost

    @classmethod
    def of(
        cls,
        spec: Mapping[str, Any],
        *,
        frames: int,
        points: int = BATCH_POINTS,
        pixels: int = BATCH_PIXELS,
        nbytes: int = BATCH_BYTES,
    ) -> BatchRule:
        """Choose the rule for the model described by `spec`.

        Args:
            spec: description of a model (`serve.runtime.Detector.describe`).
            frames: most frames in a batch.
            points: most points in a batch of point clouds, summed.
            pixels: most pixels in a batch of images, each counted as the largest.
            nbytes: most bytes in a batch.
        """
        concatenated = "points" in spec["parts"] if spec.get("parts") else spec["modality"] == "lidar"
        limits = BatchLimits(frames, points if concatenated else pixels, nbytes)
        return cls(limits, ragged if concatenated else padded)

    def open_batch(self) -> BatchSize:
        """Begin a batch."""
        return BatchSize(self.limits, self.batch_cost)


def estimate_cost(frame: EncodedFrame, spec: Mapping[str, Any]) -> FrameCost:
    """Estimate the cost of one frame for the model described by `spec`, from its size and image headers.

    Raises:
        UndecodableFrame: the header of an image cannot be read.
        FrameTooLarge: the header is that of an image far beyond any limit.
    """
    stride = 4 * int(spec.get("load_dim") or 4)
    only = None if isinstance(frame.body, Mapping) else only_part(spec)
    if only == "points":  # no part of it is looked at
        return FrameCost(max(1, frame.nbytes // stride), frame.nbytes)
    body = frame.join()
    parts = body if isinstance(body, Mapping) else {str(only): body}
    points = sum(len(part) for name, part in parts.items() if name == "points" or name.startswith("sweep."))
    sizes = tuple(image_size(part) for name, part in sorted(parts.items()) if name.startswith("image"))
    cost = points // stride if points else sum(width * height for width, height in sizes)
    return FrameCost(max(1, cost), frame.nbytes, sizes or None)


def only_part(spec: Mapping[str, Any]) -> str:
    """Return the name of the part that a frame without names is, for the model described by `spec`."""
    parts = spec.get("parts")
    if parts:
        return str(parts[0])
    return "points" if spec["modality"] == "lidar" else "image"
