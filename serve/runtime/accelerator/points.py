"""Detectors of point clouds on an accelerator: voxels of a batch by one sort, and no waiting for its size."""

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
    """Replace hard voxelization, and the functions that read the size of a batch from its last voxel."""
    from mmdet3d.models.data_preprocessors import Det3DDataPreprocessor
    from mmdet3d.models.detectors import MVXTwoStageDetector, VoxelNet
    from mmdet3d.models.middle_encoders import PointPillarsScatter

    from serve.runtime.background import ChannelsLastScatter

    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if (
        isinstance(preprocessor, Det3DDataPreprocessor)
        and not overrides(preprocessor, Det3DDataPreprocessor, "voxelize")
        and getattr(preprocessor, "voxel", False)
        and preprocessor.voxel_type == "hard"
        and min(preprocessor.voxel_layer.max_num_points, preprocessor.voxel_layer.max_voxels[1]) > 0
    ):
        preprocessor.voxelize = HardVoxelizer(preprocessor.voxel_layer)
    target: Any = network
    if isinstance(network, VoxelNet) and not overrides(network, VoxelNet, "extract_feat"):
        target.extract_feat = _ExtractFeatures(network)
    if isinstance(network, MVXTwoStageDetector) and not overrides(
        network, MVXTwoStageDetector, "extract_pts_feat"
    ):
        target.extract_pts_feat = _ExtractPointFeatures(network)
    for name in ("middle_encoder", "pts_middle_encoder"):
        if type(getattr(network, name, None)) is PointPillarsScatter:
            setattr(network, name, ChannelsLastScatter(getattr(network, name)))


class HardVoxelizer:
    """Hard voxelization in the place of ``Det3DDataPreprocessor.voxelize``."""

    def __init__(self, layer: Any) -> None:
        """Take the extents of mmdet3d's `layer`."""
        size = np.array(layer.voxel_size, np.float32)
        bounds = np.array(layer.point_cloud_range, np.float32)
        # Halves are rounded up, as C's round does.
        shape = np.floor(((bounds[3:] - bounds[:3]) / size).astype(np.float64) + 0.5).astype(np.int64)
        self._size, self._low = tuple(size.tolist()), tuple(bounds[:3].tolist())
        self._grid = tuple(shape.tolist())
        self._max_points, self._max_voxels = int(layer.max_num_points), int(layer.max_voxels[1])

    def __call__(self, points: Sequence[Tensor], data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Voxelize (N, C) clouds; return what ``Det3DDataPreprocessor.voxelize`` returns."""
        voxels, coordinates, counts = voxelize_clouds(
            points, self._size, self._low, self._grid, self._max_points, self._max_voxels
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


class _ExtractFeatures:
    """``VoxelNet.extract_feat`` that knows the size of the batch."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(self, batch_inputs_dict: dict[str, Any]) -> Any:
        network, voxels = self._network, batch_inputs_dict["voxels"]
        features = network.voxel_encoder(voxels["voxels"], voxels["num_points"], voxels["coors"])
        x = network.middle_encoder(features, voxels["coors"], len(batch_inputs_dict["points"]))
        x = network.backbone(x)
        return network.neck(x) if network.with_neck else x


class _ExtractPointFeatures:
    """``MVXTwoStageDetector.extract_pts_feat`` that knows the size of the batch."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __call__(
        self,
        voxel_dict: dict[str, Tensor],
        points: Any = None,
        img_feats: Any = None,
        batch_input_metas: Any = None,
    ) -> Any:
        network = self._network
        if not network.with_pts_bbox:
            return None
        features = network.pts_voxel_encoder(
            voxel_dict["voxels"], voxel_dict["num_points"], voxel_dict["coors"], img_feats, batch_input_metas
        )
        x = network.pts_middle_encoder(features, voxel_dict["coors"], len(points))
        x = network.pts_backbone(x)
        return network.pts_neck(x) if network.with_pts_neck else x
