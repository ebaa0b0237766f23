"""Hard voxelization of a cloud on a CPU in two passes: number the voxel of each point, then write the points.

The first pass knows the number of voxels, so that the second writes into arrays of just that size. mmcv's kernel fills
arrays for the most voxels that there may be. Voxels of a large cloud are found in a bitmap of the grid: a table of a
million voxels does not fit the cache, a bitmap of CenterPoint's grid (42 million cells) takes 5 MB.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy
from serve.ops.cpu.hashing import find_or_insert, table_size
from serve.ops.cpu.jit import jit
from serve.ops.cpu.rank_bitmap import popcount, prefix_popcounts

__all__ = ["voxelize_cloud"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# Words of a bitmap that can be cleared and counted in the time that it saves for one point.
_WORDS_PER_POINT = 8


def voxelize_cloud(
    points: Tensor,
    size: tuple[float, ...],
    low: tuple[float, ...],
    grid: tuple[int, ...],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group points into at most `max_voxels` voxels of at most `max_points` points, as mmcv's CPU kernel does.

    Args:
        points: (N, C) float32 on the CPU; x, y, z in metres come first.
        size: of a voxel, metres, x y z.
        low: minimum corner, metres, x y z.
        grid: voxels along x y z.
        max_points: most points per voxel.
        max_voxels: most voxels.

    Returns:
        Points by voxel (V, max_points, C), zeros where there are fewer; (V, 3) int32 z, y, x; points per voxel (V,)
        int32. Voxels are numbered by their first point, points keep their order, and both caps drop the later ones.
    """
    rows = as_numpy(points)
    keys = np.empty(len(rows), np.int64)
    extents = np.array(grid, np.int64)
    _find_keys(rows, np.array(size, np.float32), np.array(low, np.float32), extents, keys)
    most = min(len(rows), max_voxels) if max_points else 0
    numbers, firsts = np.empty(len(rows), np.int32), np.empty(most, np.int64)
    words = -(-int(np.prod(extents)) // 64)
    if words <= _WORDS_PER_POINT * len(rows):
        marks, before = np.zeros(words, np.uint64), np.empty(words, np.int32)
        _mark(keys, marks)
        slots = np.full(prefix_popcounts(marks, before), -1, np.int32)
        made = _number_by_rank(keys, marks, before, slots, most, numbers, firsts)
    else:
        table = np.full(table_size(most), -1, np.int64)
        slots = np.empty(len(table), np.int32)
        made = _number_by_hash(keys, table, slots, most, numbers, firsts)
    counts, coordinates = torch.zeros(made, dtype=torch.int32), torch.empty((made, 3), dtype=torch.int32)
    voxels = torch.empty((made, max_points, points.shape[1]))
    _write(rows, keys, extents, numbers, firsts, voxels.numpy(), coordinates.numpy(), counts.numpy())
    return voxels, coordinates, counts


@jit
def _find_keys(points: F32, size: F32, low: F32, grid: I64, keys: I64) -> None:  # pragma: no cover - compiled
    """Compute the number of each point's cell in the grid, -1 outside."""
    for i in range(points.shape[0]):
        fx = np.floor((points[i, 0] - low[0]) / size[0])
        fy = np.floor((points[i, 1] - low[1]) / size[1])
        fz = np.floor((points[i, 2] - low[2]) / size[2])
        keys[i] = -1
        # The comparison is false for NaN too.
        if fx >= 0 and fx < grid[0] and fy >= 0 and fy < grid[1] and fz >= 0 and fz < grid[2]:
            keys[i] = (np.int64(fz) * grid[1] + np.int64(fy)) * grid[0] + np.int64(fx)


@jit
def _mark(keys: I64, marks: U64) -> None:  # pragma: no cover - compiled
    for i in range(keys.shape[0]):
        if keys[i] >= 0:
            marks[keys[i] >> 6] |= np.uint64(1) << np.uint64(keys[i] & 63)


@jit
def _number_by_rank(
    keys: I64, marks: U64, before: I32, slots: I32, most: int, numbers: I32, firsts: I64
) -> int:  # pragma: no cover - compiled
    """Write the number of each point's voxel, -1 for none, and the first point of each; return the number of voxels."""
    made = 0
    for i in range(keys.shape[0]):
        numbers[i] = -1
        if keys[i] < 0:
            continue
        word = keys[i] >> 6
        below = (np.uint64(1) << np.uint64(keys[i] & 63)) - np.uint64(1)
        at = before[word] + popcount(marks[word] & below)
        if slots[at] < 0:
            if made == most:
                continue
            firsts[made] = i
            slots[at] = made
            made += 1
        numbers[i] = slots[at]
    return made


@jit
def _number_by_hash(
    keys: I64, table: I64, slots: I32, most: int, numbers: I32, firsts: I64
) -> int:  # pragma: no cover - compiled
    """Do what `_number_by_rank` does, with a hash table."""
    made = 0
    for i in range(keys.shape[0]):
        numbers[i] = -1
        if keys[i] < 0:
            continue
        # At the most, only existing voxels are searched.
        at = find_or_insert(table, keys[i], made < most)
        if at < 0:
            continue
        if table[at] != keys[i]:
            table[at] = keys[i]
            slots[at] = made
            firsts[made] = i
            made += 1
        numbers[i] = slots[at]
    return made


@jit
def _write(
    points: F32, keys: I64, grid: I64, numbers: I32, firsts: I64, voxels: F32, coordinates: I32, counts: I32
) -> None:  # pragma: no cover - compiled
    """Write the points of each voxel in their order, and zeros behind them."""
    _, most, features = voxels.shape
    for i in range(points.shape[0]):
        voxel = numbers[i]
        if voxel < 0:
            continue
        if firsts[voxel] == i:
            line = keys[i] // grid[0]
            coordinates[voxel, 0], coordinates[voxel, 1] = line // grid[1], line % grid[1]
            coordinates[voxel, 2] = keys[i] - line * grid[0]
            for n in range(1, most):
                for f in range(features):
                    voxels[voxel, n, f] = 0
        n = counts[voxel]
        if n < most:
            for f in range(features):
                voxels[voxel, n, f] = points[i, f]
            counts[voxel] = n + 1
