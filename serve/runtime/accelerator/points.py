"""Detectors of point clouds on an accelerator: voxels of a batch by one sort, and no waiting for its size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from serve.runtime import voxelizer
from serve.runtime.accelerator.graphs import GraphCache
from serve.runtime.accelerator.replace import overrides

__all__ = ["install"]


def install(network: nn.Module, graphs: GraphCache | None = None) -> None:
    """Replace hard voxelization, and the functions that read the size of a batch from its last voxel.

    With `graphs`, backbone and neck behind the voxels are recorded as CUDA graphs.
    """
    from mmdet3d.models.detectors import MVXTwoStageDetector, VoxelNet
    from mmdet3d.models.middle_encoders import PointPillarsScatter

    from serve.runtime.background import ChannelsLastScatter

    voxelizer.install(network)
    target: Any = network
    if isinstance(network, VoxelNet) and not overrides(network, VoxelNet, "extract_feat"):
        target.extract_feat = _ExtractFeatures(network, graphs)
    if isinstance(network, MVXTwoStageDetector) and not overrides(
        network, MVXTwoStageDetector, "extract_pts_feat"
    ):
        target.extract_pts_feat = _ExtractPointFeatures(network, graphs)
    for name in ("middle_encoder", "pts_middle_encoder"):
        if type(getattr(network, name, None)) is PointPillarsScatter:
            setattr(network, name, ChannelsLastScatter(getattr(network, name)))


class _ExtractFeatures:
    """``VoxelNet.extract_feat`` that knows the size of the batch."""

    def __init__(self, network: Any, graphs: GraphCache | None) -> None:
        self._network = network
        self._dense = self._run_dense if graphs is None else graphs.wrap(self._run_dense)

    def _run_dense(self, x: Any) -> Any:
        network = self._network
        x = network.backbone(x)
        return network.neck(x) if network.with_neck else x

    def __call__(self, batch_inputs_dict: dict[str, Any]) -> Any:
        network, voxels = self._network, batch_inputs_dict["voxels"]
        features = network.voxel_encoder(voxels["voxels"], voxels["num_points"], voxels["coors"])
        return self._dense(
            network.middle_encoder(features, voxels["coors"], len(batch_inputs_dict["points"]))
        )


class _ExtractPointFeatures:
    """``MVXTwoStageDetector.extract_pts_feat`` that knows the size of the batch."""

    def __init__(self, network: Any, graphs: GraphCache | None) -> None:
        self._network = network
        self._dense = self._run_dense if graphs is None else graphs.wrap(self._run_dense)

    def _run_dense(self, x: Any) -> Any:
        network = self._network
        x = network.pts_backbone(x)
        return network.pts_neck(x) if network.with_pts_neck else x

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
        return self._dense(network.pts_middle_encoder(features, voxel_dict["coors"], len(points)))
