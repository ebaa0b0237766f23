"""Hard voxelization of several clouds: keys of cells, one sort, and voxels written in one pass.

The result is that of `serve.ops.points.grouped_voxels`, bit for bit. After a stable sort a point finds the first point
of its voxel by binary search, hence its place in the voxel and the voxel's number; the first point writes the count.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import ceil_div, kernel, operator, power_of_two
from serve.ops.triton.search import first_not_below

__all__ = ["cell_keys", "mark_first_points", "write_voxels"]

BLOCK = 256


@kernel
def _cell_keys(
    points,
    ends,
    keys,
    count: int,
    width: int,
    clouds: int,
    low_x: float,
    low_y: float,
    low_z: float,
    size_x: float,
    size_y: float,
    size_z: float,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    BLOCK: tl.constexpr,
):  # pragma: no cover - compiled
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    at = points + place * width
    x = tl.load(at, mask=inside, other=float("nan")).to(tl.float32)
    y = tl.load(at + 1, mask=inside, other=float("nan")).to(tl.float32)
    z = tl.load(at + 2, mask=inside, other=float("nan")).to(tl.float32)
    # Divisions are rounded as IEEE says, or points on a border would change their cell.
    x = tl.floor(tl.div_rn(x - low_x, tl.full((BLOCK,), size_x, tl.float32)))
    y = tl.floor(tl.div_rn(y - low_y, tl.full((BLOCK,), size_y, tl.float32)))
    z = tl.floor(tl.div_rn(z - low_z, tl.full((BLOCK,), size_z, tl.float32)))
    # Comparisons are false for NaN too.
    found = (x >= 0) & (x < grid_x) & (y >= 0) & (y < grid_y) & (z >= 0) & (z < grid_z)
    x, y, z = tl.where(found, x, 0.0), tl.where(found, y, 0.0), tl.where(found, z, 0.0)
    cloud = tl.zeros((BLOCK,), dtype=tl.int64)
    for c in range(clouds - 1):
        cloud += (place >= tl.load(ends + c)).to(tl.int64)
    plane = tl.cast(grid_x, tl.int64) * grid_y
    volume = plane * grid_z
    key = z.to(tl.int64) * plane + y.to(tl.int64) * grid_x + x.to(tl.int64) + cloud * volume
    tl.store(keys + place, tl.where(found, key, volume * clouds), mask=inside)


@kernel
def _mark_first_points(
    ordered, order, marks, count: int, outside: int, BLOCK: tl.constexpr
):  # pragma: no cover - compiled
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = tl.load(ordered + place, mask=inside, other=0)
    before = tl.load(ordered + place - 1, mask=inside & (place > 0), other=-1)
    first = (key != before) & (key < outside)
    row = tl.load(order + place, mask=inside, other=0)
    tl.store(marks + row, first.to(tl.int32), mask=inside)


@kernel
def _write_voxels(
    points,
    ordered,
    order,
    numbers,
    ends,
    voxels,
    coordinates,
    counts,
    made,
    count: int,
    width: int,
    clouds: int,
    steps: int,
    max_points: int,
    max_voxels: int,
    grid_x: int,
    grid_y: int,
    volume: int,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # pragma: no cover - compiled
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = tl.load(ordered + place, mask=inside, other=0)
    cells = tl.cast(volume, tl.int64)
    taken = inside & (key < cells * clouds)
    start = first_not_below(ordered, key, count, steps, False)
    rank = place - start
    first = tl.load(order + start, mask=taken, other=0)
    number = tl.load(numbers + first, mask=taken, other=1).to(tl.int64) - 1
    # Voxels of a cloud are numbered from `before`, and written behind the kept ones of the clouds before it.
    cloud = key // cells
    before, home, kept, through = (
        tl.zeros_like(key),
        tl.zeros_like(key),
        tl.cast(0, tl.int64),
        tl.cast(0, tl.int64),
    )
    for c in range(clouds):
        end = tl.load(ends + c)
        upto = tl.load(numbers + end - 1, mask=end > 0, other=0).to(tl.int64)
        before = tl.where(cloud == c, through, before)
        home = tl.where(cloud == c, kept, home)
        kept += tl.minimum(upto - through, max_voxels)
        through = upto
    if tl.program_id(0) == 0:
        tl.store(made, kept)
    number -= before
    keep = taken & (number < max_voxels) & (rank < max_points)
    row = home + number
    columns = tl.arange(0, WIDTH)
    source = tl.load(order + place, mask=keep, other=0)
    wide = keep[:, None] & (columns < width)[None, :]
    values = tl.load(points + source[:, None] * width + columns[None, :], mask=wide, other=0.0)
    tl.store(voxels + (row * max_points + rank)[:, None] * width + columns[None, :], values, mask=wide)
    # The first point of a voxel writes what the voxel is.
    heads = keep & (rank == 0)
    end_of_voxel = first_not_below(ordered, key, count, steps, True)
    tl.store(counts + row, tl.minimum(end_of_voxel - start, max_points).to(tl.int32), mask=heads)
    cell = key - cloud * cells
    at = coordinates + row * 4
    tl.store(at, cloud.to(tl.int32), mask=heads)
    tl.store(at + 1, (cell // (tl.cast(grid_x, tl.int64) * grid_y)).to(tl.int32), mask=heads)
    tl.store(at + 2, (cell // grid_x % grid_y).to(tl.int32), mask=heads)
    tl.store(at + 3, (cell % grid_x).to(tl.int32), mask=heads)


@operator(
    "cell_keys(Tensor points, Tensor ends, int clouds, float[] size, float[] low, int[] grid) -> Tensor"
)
def cell_keys(
    points: Tensor, ends: Tensor, clouds: int, size: list[float], low: list[float], grid: list[int]
) -> Tensor:
    """Find the number of each point's cell; ``clouds * volume`` for points outside, NaN and inf.

    Args:
        points: (N, C) float32, float16 or bfloat16; x, y, z in metres come first.
        ends: (clouds,) int64, rows at which the clouds end.
        clouds: number of clouds.
        size: of a voxel, metres, x y z.
        low: minimum corner, metres, x y z.
        grid: voxels along x y z.

    Returns:
        (N,) int64: cell in the order z, y, x, plus cloud * volume.
    """
    keys = torch.empty(len(points), dtype=torch.int64, device=points.device)
    if len(points):
        _cell_keys[(ceil_div(len(points), BLOCK),)](
            points.contiguous(), ends, keys, len(points), points.shape[1], clouds, *low, *size, *grid,
            BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return keys


@operator("mark_first_points(Tensor ordered, Tensor order, int outside) -> Tensor")
def mark_first_points(ordered: Tensor, order: Tensor, outside: int) -> Tensor:
    """Mark each voxel's first point, (N,) int32 in the order of the points, given sorted keys and their order."""
    marks = torch.empty(len(ordered), dtype=torch.int32, device=ordered.device)
    if len(ordered):
        _mark_first_points[(ceil_div(len(ordered), BLOCK),)](
            ordered, order, marks, len(ordered), outside, BLOCK=BLOCK
        )
    return marks


@operator(
    "write_voxels(Tensor points, Tensor ordered, Tensor order, Tensor numbers, Tensor ends, int clouds, int[] grid, "
    "int max_points, int max_voxels, Tensor(a!) voxels, Tensor(b!) coordinates, Tensor(c!) counts) -> Tensor"
)
def write_voxels(
    points: Tensor,
    ordered: Tensor,
    order: Tensor,
    numbers: Tensor,
    ends: Tensor,
    clouds: int,
    grid: list[int],
    max_points: int,
    max_voxels: int,
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
) -> Tensor:
    """Write points, coordinates (cloud, z, y, x) and counts of all voxels; return their number, (1,) int64.

    Args:
        points: (N, C) float, N > 0.
        ordered: (N,) int64 keys, sorted.
        order: (N,) int64 rows of `points` in that order; equal keys in the points' own.
        numbers: (N,) running sum of the marks of `mark_first_points`.
        ends: (clouds,) int64.
        clouds: number of clouds.
        grid: voxels along x y z.
        max_points: most points per voxel.
        max_voxels: most voxels per cloud.
        voxels: (V, max_points, C) zeros with room for all voxels, written in place.
        coordinates: (V, 4) int32, written in place.
        counts: (V,) int32, written in place.
    """
    made = torch.empty(1, dtype=torch.int64, device=points.device)
    volume = grid[0] * grid[1] * grid[2]
    _write_voxels[(ceil_div(len(points), BLOCK),)](
        points.contiguous(), ordered, order, numbers, ends, voxels, coordinates, counts, made,
        len(points), points.shape[1], clouds, len(points).bit_length(), max_points, max_voxels,
        grid[0], grid[1], volume, BLOCK=BLOCK, WIDTH=power_of_two(points.shape[1], 4),
    )  # fmt: skip
    return made
