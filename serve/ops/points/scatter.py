"""Reduction of point features to voxel features (``DynamicScatter``).

The reference is mmcv 2.1.0 `csrc/pytorch/cuda/scatter_points_cuda.cu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import (
    check_floating,
    check_indices,
    check_integer,
    check_rank,
    check_same_device,
    check_shape,
    check_tensor,
)

__all__ = ["dynamic_point_to_voxel_backward", "dynamic_point_to_voxel_forward"]

_REDUCE = {"max": "amax", "sum": "sum", "mean": "mean"}


def dynamic_point_to_voxel_forward(feats: Tensor, coors: Tensor, reduce_type: str) -> list[Tensor]:
    """Reduce `feats` (N, C) over equal `coors` (N, D) int; rows with a negative coordinate are dropped.

    Returns:
        Reduced features (M, C); coordinates (M, D) in ascending order; the voxel of each point (N,)
        int32, -1 where dropped; points per voxel (M,) int32.
    """
    check_rank("feats", feats, 2)
    check_rank("coors", coors, 2)
    check_floating(feats=feats)
    check_shape("coors", coors, feats.shape[0], None)
    check_integer(coors=coors)
    check_same_device(feats=feats, coors=coors)
    if coors.shape[1] == 0:
        raise ValueError(f"coors must be (N, at least 1), got {tuple(coors.shape)}")
    if reduce_type not in _REDUCE:
        raise ValueError(f"reduce_type must be one of {sorted(_REDUCE)}, got {reduce_type!r}")
    valid = (coors >= 0).all(dim=1)
    out_coors, inverse, counts = torch.unique(coors[valid], dim=0, return_inverse=True, return_counts=True)
    coors_map = torch.full((coors.shape[0],), -1, dtype=torch.int32, device=coors.device)
    coors_map[valid] = inverse.to(torch.int32)
    reduced = feats.new_zeros((out_coors.shape[0], feats.shape[1]))
    index = inverse[:, None].expand(-1, feats.shape[1])
    values = feats[valid]
    if reduce_type == "max":
        # A value that is no number is not the largest; where there is no other, minus infinity stands.
        values = torch.where(values.isnan(), torch.full_like(values, -torch.inf), values)
    reduced.scatter_reduce_(0, index, values, _REDUCE[reduce_type], include_self=False)
    return [reduced, out_coors, coors_map, counts.to(torch.int32)]


def dynamic_point_to_voxel_backward(
    grad_feats: Tensor,
    grad_reduced_feats: Tensor,
    feats: Tensor,
    reduced_feats: Tensor,
    coors_idx: Tensor,
    reduce_count: Tensor,
    reduce_type: str,
) -> None:
    """Write into `grad_feats` (N, C) the gradient of the forward reduction.

    Args:
        grad_feats: (N, C) float, written in place.
        grad_reduced_feats: (M, C) float.
        feats: (N, C) float.
        reduced_feats: (M, C) float, from the forward function.
        coors_idx: (N,) int, the voxel of each point, negative where dropped.
        reduce_count: (M,) int, points per voxel.
        reduce_type: as in the forward function.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; an unknown reduction.
        IndexError: a voxel out of range.
    """
    check_shape("feats", feats, None, None)
    check_shape("reduced_feats", reduced_feats, None, feats.shape[1])
    for name, tensor, like in (
        ("grad_feats", grad_feats, feats),
        ("grad_reduced_feats", grad_reduced_feats, reduced_feats),
        ("reduced_feats", reduced_feats, reduced_feats),
    ):
        check_tensor(("feats", feats), name, tensor, *like.shape)
    check_floating(feats=feats)
    check_shape("coors_idx", coors_idx, feats.shape[0])
    check_shape("reduce_count", reduce_count, reduced_feats.shape[0])
    check_integer(coors_idx=coors_idx, reduce_count=reduce_count)
    check_same_device(feats=feats, coors_idx=coors_idx, reduce_count=reduce_count)
    if reduce_type not in _REDUCE:
        raise ValueError(f"reduce_type must be one of {sorted(_REDUCE)}, got {reduce_type!r}")
    check_indices("coors_idx", coors_idx.clamp(min=0), max(1, reduced_feats.shape[0]))
    grad_feats.zero_()
    valid = (coors_idx >= 0).nonzero().squeeze(1)
    voxel = coors_idx[valid].long()
    grad = grad_reduced_feats[voxel]
    if reduce_type == "mean":
        grad = grad / reduce_count[voxel, None].to(grad.dtype)
    elif reduce_type == "max":
        # As in the reference, the first point with the maximum gets the whole gradient.
        hit = feats[valid] == reduced_feats[voxel]
        position = torch.arange(valid.numel(), device=feats.device)[:, None].expand_as(hit)
        beyond = valid.numel()
        candidate = torch.where(hit, position, torch.full_like(position, beyond))
        first = torch.full(reduced_feats.shape, beyond, device=feats.device)
        first.scatter_reduce_(0, voxel[:, None].expand_as(hit), candidate, "amin")
        grad = torch.where(first[voxel] == position, grad, torch.zeros_like(grad))
    grad_feats[valid] = grad.to(grad_feats.dtype)
