"""Hard (capped) and dynamic (uncapped) voxelization of point clouds.

Voxel coordinates are (z, y, x), int32, as in mmcv. Hard voxelization is deterministic on any device: voxels are
numbered by their first point, points keep their order, and both caps drop the later ones. The reference is mmcv 2.1.0
`csrc/pytorch/cpu/voxelization.cpp`; instead of its dense grid (370 MB for SECOND's 41 x 1600 x 1408) a hash table has
only the occupied voxels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_grid,
    check_integer,
    check_same_device,
    check_shape,
    check_voxel_buffers,
    uses_numba,
)
from serve.ops.cpu.hashing import find_or_insert, table_size
from serve.ops.cpu.jit import jit
from serve.ops.points.grouped_voxels import cells_of, voxelize_clouds

__all__ = ["dynamic_voxelize_forward", "hard_voxelize_forward"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def hard_voxelize_forward(
    points: Tensor,
    voxel_size: Tensor,
    coors_range: Tensor,
    voxels: Tensor,
    coors: Tensor,
    num_points_per_voxel: Tensor,
    voxel_num: Tensor,
    max_points: int,
    max_voxels: int,
    NDim: int = 3,
    deterministic: bool = True,
) -> None:
    """Group points into at most `max_voxels` voxels of at most `max_points` points.

    Args:
        points: (N, C) float; the first three columns are x, y, z in metres.
        voxel_size: (3,) float32 on CPU, metres, x y z.
        coors_range: (6,) float32 on CPU, metres, minima then maxima.
        voxels: (max_voxels, max_points, C) zeros, filled in place.
        coors: (max_voxels, 3) int32, filled in place with (z, y, x).
        num_points_per_voxel: (max_voxels,) int32 zeros, filled in place.
        voxel_num: scalar int64 on CPU, set to the number of voxels.
        max_points: most points per voxel.
        max_voxels: most voxels.
        NDim: must be 3.
        deterministic: ignored; the result is always deterministic.
    """
    _check(points, voxel_size, coors_range, NDim)
    check_voxel_buffers(points, voxels, coors, num_points_per_voxel, voxel_num, max_points, max_voxels)
    num_points_per_voxel.zero_()
    size, low, grid = _grid(voxel_size, coors_range)
    if uses_numba(points) and points.dtype == torch.float32:
        capacity = min(points.shape[0], max_voxels)
        keys = np.full(table_size(capacity), -1, dtype=np.int64)
        slots = np.empty(keys.shape[0], dtype=np.int32)
        count = _hard_voxelize_cpu(
            as_numpy(points), size, low, grid, voxels.numpy(), coors.numpy(),
            num_points_per_voxel.numpy(), max_points, max_voxels, keys, slots,
        )  # fmt: skip
    else:
        grouped, where, counts = voxelize_clouds(
            [points], *_as_tuples(size, low, grid), max_points, max_voxels
        )
        count = len(grouped)
        voxels[:count, :max_points], coors[:count] = grouped, where[:, 1:].to(coors.dtype)
        num_points_per_voxel[:count] = counts.to(num_points_per_voxel.dtype)
    voxel_num.fill_(int(count))


def dynamic_voxelize_forward(
    points: Tensor, voxel_size: Tensor, coors_range: Tensor, coors: Tensor, NDim: int = 3
) -> None:
    """Write each point's voxel coordinate (z, y, x) into `coors` (N, 3) int32, -1 outside the range."""
    _check(points, voxel_size, coors_range, NDim)
    check_shape("coors", coors, points.shape[0], 3)
    check_integer(coors=coors)
    check_same_device(points=points, coors=coors)
    cell, inside = cells_of(points, *_as_tuples(*_grid(voxel_size, coors_range)))
    coors.copy_(torch.where(inside[:, None], cell.flip(1), torch.full_like(cell, -1)))


def _check(points: Tensor, voxel_size: Tensor, coors_range: Tensor, ndim: int) -> None:
    check_grid(points, voxel_size, coors_range)
    if ndim != 3:
        raise ValueError(f"NDim must be 3, got {ndim}")


def _grid(voxel_size: Tensor, coors_range: Tensor) -> tuple[F32, F32, I64]:
    """Return voxel size, minimum corner (float32 as in the reference) and grid shape, all x y z."""
    size = voxel_size.detach().cpu().numpy().astype(np.float32)
    bounds = coors_range.detach().cpu().numpy().astype(np.float32)
    if np.any(size <= 0) or np.any(bounds[3:] <= bounds[:3]):
        raise ValueError(f"voxel_size {size.tolist()} and coors_range {bounds.tolist()} leave no voxel")
    # Halves are rounded up, as C's round does; numpy's would round them to even.
    grid = np.floor(((bounds[3:] - bounds[:3]) / size).astype(np.float64) + 0.5).astype(np.int64)
    return size, bounds[:3].copy(), grid


def _as_tuples(
    size: F32, low: F32, grid: I64
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    return tuple(size.tolist()), tuple(low.tolist()), tuple(grid.tolist())


@jit
def _hard_voxelize_cpu(
    points: F32,
    size: F32,
    low: F32,
    grid: I64,
    voxels: F32,
    coors: I32,
    counts: I32,
    max_points: int,
    max_voxels: int,
    keys: I64,
    slots: I32,
) -> int:  # pragma: no cover - compiled
    made = 0
    features = points.shape[1]
    for i in range(points.shape[0]):
        fx = np.floor((points[i, 0] - low[0]) / size[0])
        fy = np.floor((points[i, 1] - low[1]) / size[1])
        fz = np.floor((points[i, 2] - low[2]) / size[2])
        # The comparison is false for NaN too.
        if not (fx >= 0 and fx < grid[0] and fy >= 0 and fy < grid[1] and fz >= 0 and fz < grid[2]):
            continue
        x, y, z = np.int64(fx), np.int64(fy), np.int64(fz)
        key = (z * grid[1] + y) * grid[0] + x
        # At max_voxels, only existing voxels are searched.
        at = find_or_insert(keys, key, made < max_voxels)
        if at < 0:
            continue
        if keys[at] != key:
            keys[at] = key
            slots[at] = made
            coors[made, 0] = z
            coors[made, 1] = y
            coors[made, 2] = x
            made += 1
        voxel = slots[at]
        n = counts[voxel]
        if n < max_points:
            for f in range(features):
                voxels[voxel, n, f] = points[i, f]
            counts[voxel] = n + 1
    return made
