"""Mends of networks that upstream cannot run everywhere, applied to the network after it is built.

One so far: on the way into MinkUNet and SPVCNN mmdet3d 1.4.0 (`Det3DDataPreprocessor.voxelize`) moves its
indices to CUDA by name, whatever the device, so that a CPU cannot run them. Knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["mend"]


def mend(network: nn.Module) -> None:
    """Mend `network` in place, where it needs it."""
    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if getattr(preprocessor, "voxel", False) and preprocessor.voxel_type == "minkunet":
        preprocessor.voxelize = _QuantizeInPlace(preprocessor)


class _QuantizeInPlace:
    """Voxelization of MinkUNet on the device of its points, for inference."""

    def __init__(self, preprocessor: Any) -> None:
        # Not as a child module: it would be its own parent.
        self._preprocessor = preprocessor

    def __call__(self, points: Sequence[Tensor], data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Keep the first point of every voxel.

        Args:
            points: (N, C) of every cloud, x, y, z first, metres.
            data_samples: get ``batch_idx`` (M,) and ``point2voxel_map`` (N,), the row of each point's voxel.

        Returns:
            ``voxels`` (M, C) and ``coors`` (M, 4), whole voxels counted from each cloud's lowest corner, with
            the number of the cloud first or last.
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
