"""Hard voxelization of a batch of clouds, in the place of mmdet3d's data preprocessor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from serve.ops.constants import constant
from serve.ops.points.grouped_voxels import voxelize_clouds
from serve.runtime.accelerator.replace import overrides

__all__ = ["HardVoxelizer", "install"]


def install(network: nn.Module) -> None:
    """Replace the hard voxelization of `network`, if it is mmdet3d's own."""
    from mmdet3d.models.data_preprocessors import Det3DDataPreprocessor

    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if (
        isinstance(preprocessor, Det3DDataPreprocessor)
        and not overrides(preprocessor, Det3DDataPreprocessor, "voxelize")
        and getattr(preprocessor, "voxel", False)
        and preprocessor.voxel_type == "hard"
        and min(preprocessor.voxel_layer.max_num_points, preprocessor.voxel_layer.max_voxels[1]) > 0
    ):
        preprocessor.voxelize = HardVoxelizer(preprocessor.voxel_layer)


class HardVoxelizer:
    """Hard voxelization in the place of ``Det3DDataPreprocessor.voxelize``."""

    def __init__(self, layer: Any) -> None:
        """Take the extents of mmdet3d's `layer`; its caps are read at each call."""
        size = np.array(layer.voxel_size, np.float32)
        bounds = np.array(layer.point_cloud_range, np.float32)
        # Halves are rounded up, as C's round does.
        shape = np.floor(((bounds[3:] - bounds[:3]) / size).astype(np.float64) + 0.5).astype(np.int64)
        self._size, self._low = tuple(size.tolist()), tuple(bounds[:3].tolist())
        self._grid = tuple(shape.tolist())
        self._layer = layer

    def __call__(self, points: Sequence[Tensor], data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Voxelize (N, C) clouds; return what ``Det3DDataPreprocessor.voxelize`` returns."""
        layer = self._layer
        voxels, coordinates, counts = voxelize_clouds(
            points, self._size, self._low, self._grid, int(layer.max_num_points), int(layer.max_voxels[1])
        )
        size = constant(self._size, voxels.dtype, voxels.device)
        centers = coordinates[:, 1:].flip(1) + 0.5
        low = constant(self._low, voxels.dtype, voxels.device)
        return {
            "voxels": voxels,
            "coors": coordinates,
            "num_points": counts,
            "voxel_centers": centers * size + low,
        }
