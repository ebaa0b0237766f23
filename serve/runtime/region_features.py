"""Features of regions on a CPU: all levels of a pyramid pooled into one tensor, in the layout of what reads it."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from serve import ops
from serve.ops.roi.align import average_into

__all__ = ["install"]


def install(network: nn.Module) -> None:
    """Replace the extractors of `network` that have mmdet's own `forward` and average by RoIAlign, in place."""
    if ops.kernels_in_use() != "portable":  # a compiled extension has a RoIAlign of its own
        return
    module: Any
    for module in network.modules():
        if type(module) is SingleRoIExtractor and all(map(_averages, module.roi_layers)):
            module.__class__ = FusedRoIExtractor
    for head in network.modules():
        if not isinstance(head, StandardRoIHead) or not isinstance(
            getattr(head, "mask_head", None), FCNMaskHead
        ):
            continue
        extractor: Any = head.mask_roi_extractor
        if type(extractor) is FusedRoIExtractor and extractor is not head.bbox_roi_extractor:
            extractor.memory_format = torch.channels_last


class FusedRoIExtractor(SingleRoIExtractor):  # type: ignore[misc]
    """SingleRoIExtractor whose levels write their rows of one tensor.

    Attributes:
        memory_format: layout of the result.
    """

    memory_format = torch.contiguous_format

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pool `rois` (N, 5) out of the levels they belong to; return (N, C, bins down, bins across)."""
        rois = rois.type_as(feats[0])
        shape = (len(rois), self.out_channels, *self.roi_layers[0].output_size)
        pooled = torch.empty(shape, memory_format=self.memory_format)
        # Without a scale, as upstream, if there is but one level.
        levels = self.map_roi_levels(rois, len(feats)) if len(feats) > 1 else torch.zeros(len(rois)).long()
        if roi_scale_factor is not None and len(feats) > 1:
            rois = self.roi_rescale(rois, roi_scale_factor)
        found = 0
        for level, (layer, maps) in enumerate(zip(self.roi_layers, feats, strict=False)):
            rows = (levels == level).nonzero()[:, 0]
            found += len(rows)
            if len(rows):
                average_into(
                    maps,
                    rois[rows],
                    pooled,
                    rows,
                    layer.spatial_scale,
                    layer.sampling_ratio,
                    aligned=layer.aligned,
                )
        if found < len(rois):  # boxes of no number belong to no level
            pooled[(levels < 0) | (levels >= len(feats))] = 0
        return pooled


def _averages(layer: Any) -> bool:
    return type(layer) is RoIAlign and layer.pool_mode == "avg" and not layer.use_torchvision
