"""Encoders of voxels that compute a row per point instead of one per place for a point.

mmdet3d's PillarFeatureNet and HardVFE hold a voxel's points in 32 or 64 places, mostly padding: a pillar of a
KITTI frame has two or three points. Padded places of a voxel are all alike, zeros behind the mask, so one of them
stands for all in the maximum over the voxel. The rest is the encoder's own arithmetic, layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PointRows", "install"]


class PointRows(nn.Module):
    """PillarFeatureNet or HardVFE over rows of points. Only for inference, on the CPU."""

    def __init__(self, encoder: Any, layers: nn.ModuleList) -> None:
        """Take mmdet3d's `encoder` and its layers, which `install` has checked."""
        super().__init__()
        self.encoder = encoder
        self._layers: tuple[Any, ...] = tuple(layers)

    def forward(
        self, features: Tensor, num_points: Tensor, coors: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        """Encode voxels.

        Args:
            features: (V, M, C) points of each voxel, metres in the first three columns, zero behind the last point.
            num_points: (V,) points of each voxel, 1 to M.
            coors: (V, 4) integers: frame, z, y, x.
            *args: ignored, as mmdet3d does without a fusion layer.
            **kwargs: ignored likewise.

        Returns:
            (V, U) features of the voxels.
        """
        places = features.shape[1]
        rows = (num_points + 1).clamp(max=places)  # a row of padding, unless the voxel is full
        voxel, place = (torch.arange(places, device=features.device) < rows[:, None]).nonzero().unbind(1)
        x = self._decorate(features, num_points, coors, voxel, place)
        x *= (place < num_points[voxel]).type_as(x)[:, None]
        aggregated = x
        for i, layer in enumerate(self._layers):
            x = functional.relu(layer.norm(layer.linear(x)))
            index = voxel[:, None].expand_as(x)
            aggregated = x.new_full((len(features), x.shape[1]), -torch.inf).scatter_reduce(
                0, index, x, "amax"
            )
            if i + 1 < len(self._layers):
                x = torch.cat((x, aggregated[voxel]), 1)
        return aggregated

    def _decorate(
        self, features: Tensor, num_points: Tensor, coors: Tensor, voxel: Tensor, place: Tensor
    ) -> Tensor:
        """Append offsets from the mean, offsets from the centre and distances to the rows, as configured."""
        encoder = self.encoder
        points = features[voxel, place]
        parts = [points]
        if encoder._with_cluster_center:
            means = features[:, :, :3].sum(dim=1) / num_points.type_as(features)[:, None]
            parts.append(points[:, :3] - means[voxel])
        if encoder._with_voxel_center:
            size = features.new_tensor((encoder.vx, encoder.vy, encoder.vz))
            offset = features.new_tensor((encoder.x_offset, encoder.y_offset, encoder.z_offset))
            centres = coors[:, [3, 2, 1]].type_as(features) * size + offset
            parts.append(points[:, :3] - centres[voxel])
            if getattr(encoder, "legacy", False):  # there the offsets are written over the coordinates
                parts[0] = torch.cat((parts[-1], points[:, 3:]), 1)
        if encoder._with_distance:
            parts.append(torch.norm(parts[0][:, :3], 2, 1, keepdim=True))
        return torch.cat(parts, 1)


def install(network: nn.Module) -> None:
    """Replace the voxel encoder of a network by `PointRows`, if it is of a known kind.

    Known are PillarFeatureNet with maxima, and HardVFE without a fusion layer, on the CPU. Others stay as they are.
    """
    from mmdet3d.models.voxel_encoders import HardVFE, PillarFeatureNet
    from mmdet3d.models.voxel_encoders.utils import PFNLayer, VFELayer

    for name in ("voxel_encoder", "pts_voxel_encoder"):
        encoder: Any = getattr(network, name, None)
        if type(encoder) is PillarFeatureNet:
            layers = encoder.pfn_layers
            known = all(
                type(layer) is PFNLayer and layer.mode == "max" and layer.last_vfe == (layer is layers[-1])
                for layer in layers
            )
        elif type(encoder) is HardVFE:
            layers = encoder.vfe_layers
            known = encoder.fusion_layer is None and all(
                type(layer) is VFELayer and layer.max_out and layer.cat_max == (layer is not layers[-1])
                for layer in layers
            )
        else:
            continue
        if known and layers[0].linear.weight.device.type == "cpu":
            setattr(network, name, PointRows(encoder, layers))
