"""Frames that a model accepts: modality, names of parts, how each part is read.

The gateway and the worker know a model's frames from the metadata of its archive, without loading the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.protocol.frame_warnings import FrameWarning, PointExpectations
from serve.protocol.images import Decoder
from serve.protocol.point_columns import PointLayout
from serve.protocol.sweeps import SweepSpec, is_sweep_part

__all__ = ["MODALITIES", "FrameSpec", "Modality", "is_part"]

Modality = Literal["lidar", "depth", "image", "mono3d", "multiview", "fusion"]
# Modality → description and parts of a frame.
MODALITIES: Mapping[Modality, str] = {
    "lidar": "a point cloud in the LiDAR frame (points)",
    "depth": "a point cloud of a depth camera or an indoor scan, x right, y forward, z up (points)",
    "image": "an image (image)",
    "mono3d": "an image and its calibration (image, calibration)",
    "multiview": "images of several cameras and their calibration (image.<CAMERA> for each, calibration)",
    "fusion": "a point cloud, an image and their calibration (points, image, calibration)",
}


@dataclass(frozen=True)
class FrameSpec:
    """Frames that a model accepts.

    Attributes:
        modality: one of `MODALITIES`.
        load_dim: float32 numbers per point in a ``.bin`` (point clouds only).
        color_type: mmcv's name for the channels of a decoded image.
        decoder: ``cv2``, or ``pillow`` (``color`` only), whose pixels of a JPEG differ by one level in places.
        cameras: names of the cameras in the model's order (multi-view only).
        calibration: names of the matrices that the model needs for each camera.
        used_columns: indices of the columns of a point that the model uses; None for all.
        sweeps: earlier point clouds that a frame may have; None if the model takes one cloud.
        expected: what the model expects of a point cloud, for warnings.
    """

    modality: Modality
    load_dim: int = 4
    color_type: str = "color"
    decoder: Decoder = "cv2"
    cameras: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    used_columns: tuple[int, ...] | None = None
    sweeps: SweepSpec | None = None
    expected: PointExpectations = field(default_factory=PointExpectations)

    @property
    def layout(self) -> PointLayout:
        """Columns of the points."""
        is_depth = self.modality == "depth" or "depth2img" in self.calibration
        return PointLayout.default(self.load_dim, is_depth=is_depth, used=self.used_columns)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the required parts of a frame; `accepts` knows the optional ones too."""
        points = ("points",) if self.has_points else ()
        images = tuple(f"image.{camera}" for camera in self.cameras)
        if self.modality in ("image", "mono3d", "fusion"):
            images = ("image",)
        return (*points, *images, *(("calibration",) if self.calibration else ()))

    @property
    def has_points(self) -> bool:
        """Whether a point cloud is among the parts."""
        return self.modality in ("lidar", "depth", "fusion")

    def accepts(self, part: str) -> bool:
        """Return whether a frame may have a part of that name."""
        return part in self.parts or (self.sweeps is not None and is_sweep_part(part))

    @property
    def warnings(self) -> tuple[FrameWarning, ...]:
        """Warnings that concern every frame of required parts only."""
        return () if self.sweeps is None else (FrameWarning("one_sweep", self.sweeps.warning),)


def is_part(name: str, value: Any = None) -> bool:
    """Return whether a form field or JSON member is a part of a frame rather than an option.

    Args:
        name: its name.
        value: its value, if known: ``sweeps`` is a part or an option, depending on it.
    """
    if name in ("points", "image", "calibration", "text") or name.startswith("image."):
        return True
    return is_sweep_part(name, value)
