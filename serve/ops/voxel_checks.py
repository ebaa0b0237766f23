"""Argument checks of the kernels for voxels: buffers to write them to, and rulebooks. Knows no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import check_rank, check_same_device
from serve.ops.point_checks import check_floating, check_integer, check_shape, check_tensor

__all__ = ["check_grid", "check_rulebook", "check_rulebook_rows", "check_voxel_buffers"]


def check_grid(points: Tensor, voxel_size: Tensor, coors_range: Tensor) -> None:
    """Raise unless `points` are (N, at least 3) float and the others 3 and 6 floats whose values can be read."""
    check_rank("points", points, 2)
    if points.shape[1] < 3:
        raise ValueError(f"points must be (N, >=3), got shape {tuple(points.shape)}")
    check_floating(points=points, voxel_size=voxel_size, coors_range=coors_range)
    check_shape("voxel_size", voxel_size, 3)
    check_shape("coors_range", coors_range, 6)
    for name, tensor in (("points", points), ("voxel_size", voxel_size), ("coors_range", coors_range)):
        _check_values(name, tensor)


def check_voxel_buffers(
    points: Tensor,
    voxels: Tensor,
    coors: Tensor,
    num_points_per_voxel: Tensor,
    voxel_num: Tensor,
    max_points: int,
    max_voxels: int,
) -> None:
    """Raise unless there is room for `max_voxels` voxels of `max_points` of `points`, to be written in place."""
    if max_points < 0 or max_voxels < 0:
        raise ValueError(f"max_points and max_voxels must be at least 0, got {max_points} and {max_voxels}")
    check_tensor(("points", points), "voxels", voxels, None, None, points.shape[1])
    check_shape("coors", coors, None, 3)
    check_shape("num_points_per_voxel", num_points_per_voxel, None)
    check_same_device(points=points, coors=coors, num_points_per_voxel=num_points_per_voxel)
    if voxels.dtype != points.dtype:
        raise TypeError(f"voxels must be {points.dtype} as points are, got {voxels.dtype}")
    check_integer(coors=coors, num_points_per_voxel=num_points_per_voxel, voxel_num=voxel_num)
    if voxel_num.numel() != 1:
        raise ValueError(f"voxel_num must hold one number, got shape {tuple(voxel_num.shape)}")
    _check_values("voxel_num", voxel_num)
    if voxels.shape[1] < max_points:
        raise ValueError(
            f"voxels must have room for max_points={max_points}, got shape {tuple(voxels.shape)}"
        )
    for name, out in (("voxels", voxels), ("coors", coors), ("num_points_per_voxel", num_points_per_voxel)):
        if out.shape[0] < max_voxels:
            raise ValueError(
                f"{name} must have room for max_voxels={max_voxels}, got shape {tuple(out.shape)}"
            )
        # Otherwise it would silently get its rows in a copy.
        if not out.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is written in place")


def check_rulebook(
    features: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor, num_act_out: int, subm: int = 0
) -> None:
    """Raise unless `features` (N, C), pairs (K, 2, P) and counts (K,) fit one another; no value is looked at."""
    check_shape("features", features, None, None)
    check_floating(features=features)
    check_shape("indice_pairs", indice_pairs, None, 2, None)
    check_shape("indice_pair_num", indice_pair_num, indice_pairs.shape[0])
    check_integer(indice_pairs=indice_pairs, indice_pair_num=indice_pair_num)
    check_same_device(features=features, indice_pairs=indice_pairs, indice_pair_num=indice_pair_num)
    for name, tensor in (("features", features), ("indice_pairs", indice_pairs)):
        _check_values(name, tensor)
    if num_act_out < 0:
        raise ValueError(f"num_act_out must be at least 0, got {num_act_out}")
    if subm and features.shape[0] != num_act_out:
        raise ValueError(
            f"features must have as many rows as come out of a submanifold convolution (num_act_out), "
            f"got {features.shape[0]} and {num_act_out}"
        )


def check_rulebook_rows(
    indice_pairs: Tensor, indice_pair_num: Tensor, inputs: int, outputs: int, inverse: bool = False
) -> None:
    """Raise IndexError unless the pairs that count name rows of `inputs` and `outputs`; one transfer."""
    pairs, room = indice_pairs, indice_pairs.shape[2]
    if pairs.shape[0] == 0:
        return
    taken = torch.arange(room, device=pairs.device) < indice_pair_num[:, None]
    rows = torch.where(taken[:, None], pairs, torch.zeros_like(pairs)).transpose(0, 1).flatten(1)
    # A row to look at where there are none.
    rows = torch.cat((rows, rows.new_zeros((2, 1))), dim=1)
    bounds = torch.cat(
        (
            torch.stack((rows.amin(dim=1), rows.amax(dim=1))).flatten().long(),
            torch.stack(torch.aminmax(indice_pair_num)).long(),
        )
    ).tolist()
    if bounds[4] < 0 or bounds[5] > room:
        raise IndexError(f"indice_pair_num must lie in 0..{room}, got {bounds[4]}..{bounds[5]}")
    if bounds[5] == 0:
        return
    for place, what in ((0, "input"), (1, "output")):
        limit = outputs if (what == "output") != inverse else inputs
        if bounds[place] < 0 or bounds[2 + place] >= limit:
            raise IndexError(
                f"indice_pairs[:, {place}] must name {what} rows in [0, {limit}), "
                f"got {bounds[place]} to {bounds[2 + place]}"
            )


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds numbers, got {tensor.device}")
