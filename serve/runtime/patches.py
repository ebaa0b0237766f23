"""Patches of networks that upstream cannot build or run.

* For MinkUNet and SPVCNN, mmdet3d 1.4.0 (`Det3DDataPreprocessor.voxelize`) moves indices to CUDA on any device, so that
  they cannot run on a CPU.
* SSD's head in mmdet 3.2.0 skips the constructor of `AnchorHead`, which sets ``loss_cls``;
  `BaseDenseHead._predict_by_feat_single` then reads it.
* CrowdDet's config uses torchvision's RoIAlign; torchvision may be missing, or lack kernels for this build of torch.
  mmcv's kernel computes the same.
* mmcv's synchronized norm (``MMSyncBN``) needs a process group to be built; torch's does not. Both become plain norms
  for inference.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["add_missing_loss", "disable_torchvision_align", "patch", "use_torch_sync_bn"]


def use_torch_sync_bn(config: Any) -> Any:
    """Replace mmcv's synchronized norm by torch's in the config of a model, in place; return the config.

    Args:
        config: dictionaries and lists, mmengine's or plain.
    """
    for value in config.values() if isinstance(config, Mapping) else config:
        if isinstance(value, Mapping | list | tuple):
            use_torch_sync_bn(value)
    if isinstance(config, MutableMapping) and config.get("type") == "MMSyncBN":
        config["type"] = "SyncBN"
    return config


def add_missing_loss(network: nn.Module) -> bool:
    """Set the missing ``loss_cls`` of SSD's heads to None; return whether there was one."""
    heads: list[Any] = [part for part in network.modules() if type(part).__name__ == "SSDHead"]
    heads = [head for head in heads if not hasattr(head, "loss_cls")]
    for head in heads:
        head.loss_cls = None
    return bool(heads)


def disable_torchvision_align(network: nn.Module) -> bool:
    """Switch every RoIAlign to mmcv's kernel; return whether one used torchvision."""
    layers: list[Any] = [part for part in network.modules() if getattr(part, "use_torchvision", False)]
    for layer in layers:
        layer.use_torchvision = False
    return bool(layers)


def patch(network: nn.Module) -> None:
    """Apply all patches that `network` needs, in place."""
    add_missing_loss(network)
    disable_torchvision_align(network)
    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if getattr(preprocessor, "voxel", False) and preprocessor.voxel_type == "minkunet":
        preprocessor.voxelize = _QuantizeInPlace(preprocessor)


class _QuantizeInPlace:
    """Voxelization of MinkUNet for inference, on the device of its points."""

    def __init__(self, preprocessor: Any) -> None:
        # Not a child module, which would create a cycle.
        self._preprocessor = preprocessor

    def __call__(self, points: Sequence[Tensor], data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Keep the first point of every voxel.

        Args:
            points: (N, C) of each cloud; the first columns are x, y, z in metres.
            data_samples: get ``batch_idx`` (M,) and ``point2voxel_map`` (N,), the row of each point's voxel.

        Returns:
            ``voxels`` (M, C) and ``coors`` (M, 4), voxel indices relative to each cloud's minimum corner, with the
            index of the cloud first or last.
        """
        size = points[0].new_tensor(self._preprocessor.voxel_layer.voxel_size)
        kept: list[Tensor] = []
        places: list[Tensor] = []
        for number, (cloud, sample) in enumerate(zip(points, data_samples, strict=True)):
            coordinates = torch.round(cloud[:, :3] / size).int()
            coordinates -= coordinates.min(0)[0]
            rows, voxel_of = self._preprocessor.sparse_quantize(
                coordinates.cpu().numpy(), return_index=True, return_inverse=True
            )
            first = torch.from_numpy(rows).to(cloud.device)
            sample.point2voxel_map = torch.from_numpy(voxel_of).to(cloud.device).long()
            around = (1, 0) if self._preprocessor.batch_first else (0, 1)
            placed = nn.functional.pad(coordinates[first], around, value=number)
            sample.batch_idx = placed[:, 0 if self._preprocessor.batch_first else -1]
            kept.append(cloud[first])
            places.append(placed)
        return {"voxels": torch.cat(kept), "coors": torch.cat(places)}
