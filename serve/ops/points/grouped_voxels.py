"""Hard voxelization of several clouds: on the CPU cloud by cloud, on a device by one sort, with one synchronisation.

The result is that of `serve.ops.points.voxelize`, cloud by cloud: voxels are numbered by their first point, points keep
their order, and both caps drop the later ones. Nothing is written by atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from serve.ops.checks import as_compute_dtype, uses_numba
from serve.ops.constants import constant
from serve.ops.device_kernels import uses_triton
from serve.ops.points.numbered_voxels import voxelize_cloud

__all__ = ["cells_of", "voxelize_clouds"]


def cells_of(
    points: Tensor, size: tuple[float, ...], low: tuple[float, ...], grid: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return (N, 3) int32 cells in x y z, and (N,) bool inside. NaN and inf are outside.

    Args:
        points: (N, at least 3) float; x, y, z in metres.
        size: of a voxel, metres, x y z.
        low: minimum corner, metres, x y z.
        grid: voxels along x y z.
    """
    xyz = as_compute_dtype(points[:, :3])
    device = points.device
    scaled = (xyz - constant(low, xyz.dtype, device)) / constant(size, xyz.dtype, device)
    # Of float64 mmcv takes the floor in float64 on the CPU, in float32 on CUDA.
    scaled = torch.floor(scaled if device.type == "cpu" else scaled.float())
    inside = ((scaled >= 0) & (scaled < constant(grid, torch.int64, device))).all(dim=1)
    return torch.where(inside[:, None], scaled, 0.0).to(torch.int32), inside


def voxelize_clouds(
    clouds: Sequence[Tensor],
    size: tuple[float, ...],
    low: tuple[float, ...],
    grid: tuple[int, ...],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group the points of each cloud into at most `max_voxels` voxels of at most `max_points` points.

    Args:
        clouds: (N, C) float each, on one device; x, y, z in metres come first.
        size: of a voxel, metres, x y z.
        low: minimum corner, metres, x y z.
        grid: voxels along x y z.
        max_points: most points per voxel.
        max_voxels: most voxels per cloud.

    Returns:
        Points by voxel (V, max_points, C), zeros where there are fewer; (V, 4) int32 cloud, z, y, x; points per voxel
        (V,) int32. Voxels of one cloud follow those of the one before.
    """
    if all(uses_numba(cloud) and cloud.dtype == torch.float32 for cloud in clouds):
        return _voxelize_one_by_one(clouds, size, low, grid, max_points, max_voxels)
    points = clouds[0] if len(clouds) == 1 else torch.cat(tuple(clouds))
    device, total = points.device, len(points)
    if total == 0 or max_points == 0 or max_voxels == 0:
        none = points.new_zeros((0, 4), dtype=torch.int32)
        return points.new_zeros((0, max_points, points.shape[1])), none, none[:, 0]
    ends = tuple(accumulate(len(cloud) for cloud in clouds))
    if uses_triton(points):
        return _voxelize_by_kernels(points, ends, size, low, grid, max_points, max_voxels)
    volume = grid[0] * grid[1] * grid[2]
    cell, inside = cells_of(points, size, low, grid)
    key = (cell * constant((1, grid[0], grid[0] * grid[1]), torch.int64, device)).sum(dim=1)
    place = torch.arange(total, device=device)
    cloud: Tensor | None = None
    if len(clouds) > 1:
        bounds = torch.tensor(ends, device=device)
        cloud = torch.bucketize(place, bounds, right=True)
        key += cloud * volume
    outside = volume * len(clouds)
    # 1. A stable sort brings the points of a voxel together, in order.
    ordered, order = torch.sort(torch.where(inside, key, outside), stable=True)
    first = torch.cat((ordered[:1] < outside, (ordered[1:] != ordered[:-1]) & (ordered[1:] < outside)))
    start = torch.cummax(torch.where(first, place, 0), dim=0).values
    rank = place - start
    # 2. Number the voxels by their first point.
    is_first = torch.zeros_like(first).scatter_(0, order, first)
    numbers = torch.cumsum(is_first, dim=0)
    number = numbers[order[start]] - 1
    keep = (rank < max_points) & (ordered < outside)
    if cloud is None:
        count = numbers[-1].clamp(max=max_voxels)
        keep &= number < max_voxels
    else:
        through = torch.cat((numbers.new_zeros(1), numbers))[bounds]
        before = torch.cat((through.new_zeros(1), through[:-1]))
        kept = (through - before).clamp(max=max_voxels)
        count = kept.sum()
        home = cloud[order]
        number -= before[home]
        keep &= number < max_voxels
        number += (kept.cumsum(dim=0) - kept)[home]
    made = int(count)  # the only synchronisation
    # 3. Write; what is dropped goes to a spare row.
    voxels = points.new_zeros((made * max_points + 1, points.shape[1]))
    voxels[torch.where(keep, number * max_points + rank, made * max_points)] = points[order]
    row = torch.where(keep, number, made)
    counts = torch.zeros(made + 1, dtype=torch.int32, device=device).index_add_(0, row, keep.to(torch.int32))
    coordinates = torch.zeros((made + 1, 4), dtype=torch.int32, device=device)
    where = cell.flip(1)[order]
    home = torch.zeros_like(where[:, 0]) if cloud is None else home.to(torch.int32)
    coordinates[torch.where(rank == 0, row, made)] = torch.cat((home[:, None], where), dim=1)
    shape = (made, max_points, points.shape[1])
    return voxels[:-1].view(shape), coordinates[:-1], counts[:-1]


def _voxelize_by_kernels(
    points: Tensor,
    ends: tuple[int, ...],
    size: tuple[float, ...],
    low: tuple[float, ...],
    grid: tuple[int, ...],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `voxelize_clouds` for points (N, C), N > 0, of clouds that end at the rows `ends`."""
    from serve.ops.triton.voxels import cell_keys, mark_first_points, write_voxels

    device, clouds = points.device, len(ends)
    bounds = torch.tensor(ends, device=device)
    keys = cell_keys(points, bounds, clouds, list(size), list(low), list(grid))
    ordered, order = torch.sort(keys, stable=True)
    numbers = torch.cumsum(mark_first_points(ordered, order, clouds * grid[0] * grid[1] * grid[2]), dim=0)
    room = min(len(points), clouds * max_voxels)
    voxels = points.new_zeros((room, max_points, points.shape[1]))
    coordinates = torch.empty((room, 4), dtype=torch.int32, device=device)
    counts = torch.empty(room, dtype=torch.int32, device=device)
    number = write_voxels(
        points,
        ordered,
        order,
        numbers,
        bounds,
        clouds,
        list(grid),
        max_points,
        max_voxels,
        voxels,
        coordinates,
        counts,
    )
    made = int(number)  # the only synchronisation
    return voxels[:made], coordinates[:made], counts[:made]


def _voxelize_one_by_one(clouds: Sequence[Tensor], *grid: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = [voxelize_cloud(cloud, *grid) for cloud in clouds]
    voxels, where, counts = (
        torch.cat(parts) if len(made) > 1 else parts[0] for parts in zip(*made, strict=True)
    )
    frames = torch.arange(len(made), dtype=torch.int32)
    home = frames.repeat_interleave(torch.tensor([len(one[2]) for one in made]))
    return voxels, torch.cat((home[:, None], where), dim=1), counts
