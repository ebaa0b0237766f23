"""Rulebooks of sparse convolution: pairs of input and output voxels for each kernel offset.

For stride s, padding p, dilation d and kernel offset k a convolution pairs input i with output o where
``i = o * s - p + k * d``; a transposed one if ``o = i * s - p + k * d``. A submanifold convolution
keeps the input's voxels and has s = 1, p = kernel // 2 (mmcv 2.1.0 `csrc/pytorch/cuda/spconv_ops_cuda.cu`,
`getValidOutPos` in its `spconv/geometry.h`). Output voxels are in the order of their linear index.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_integer, check_rank, uses_numba
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for

__all__ = [
    "get_indice_pairs_2d_backward",
    "get_indice_pairs_2d_forward",
    "get_indice_pairs_3d_backward",
    "get_indice_pairs_3d_forward",
    "get_indice_pairs_4d_forward",
]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Rulebook = list[Tensor]
MAX_KERNEL_VOLUME = 4096


def rulebook(
    indices: Tensor,
    batch_size: int,
    out_shape: Sequence[int],
    spatial_shape: Sequence[int],
    ksize: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_padding: Sequence[int],
    subm: int,
    transpose: int,
) -> Rulebook:
    """Build a rulebook.

    Args:
        indices: (N, 1 + D) int32: batch index, then D coordinates, each voxel once.
        batch_size: clouds in the batch.
        out_shape: D output extents; equal to `spatial_shape` when `subm`.
        spatial_shape: D input extents.
        ksize: D kernel extents.
        stride: D strides.
        padding: D paddings.
        dilation: D dilations.
        out_padding: unused; contained in `out_shape`.
        subm: 1 for a submanifold convolution.
        transpose: 1 for a transposed convolution.

    Returns:
        Output indices (M, 1 + D) int32; pairs (K, 2, N) int32, padded with -1, [k, 0] input rows and [k, 1] output
        rows; counts (K,) int32.
    """
    ndim = len(ksize)
    check_rank("indices", indices, 2)
    check_integer(indices=indices)
    if indices.device.type == "meta":
        raise ValueError(f"indices must have values, got a tensor on {indices.device}")
    if indices.shape[1] != ndim + 1:
        raise ValueError(f"indices must be (N, {ndim + 1}) for a {ndim}-d kernel, got {tuple(indices.shape)}")
    volume = prod(ksize)
    if not 0 < volume <= MAX_KERNEL_VOLUME:
        raise ValueError(f"kernel volume must be in 1..{MAX_KERNEL_VOLUME}, got {volume} from {list(ksize)}")
    if min(out_shape) <= 0:
        raise ValueError(f"output shape {list(out_shape)} is empty: the kernel is larger than its input")
    batch_size = int(batch_size)  # a tensor in mmdet3d's dynamic voxel networks
    if batch_size * prod(out_shape) >= 2**62 or batch_size * prod(spatial_shape) >= 2**62:
        raise ValueError(f"spatial shape {list(spatial_shape)} x batch {batch_size} does not fit 62 bits")
    if subm:
        stride, padding, transpose = [1] * ndim, [k // 2 for k in ksize], 0
    geometry = np.array([ksize, stride, padding, dilation, out_shape, spatial_shape], dtype=np.int64)
    check_bounds(indices, batch_size, spatial_shape)
    build = _rulebook_cpu if uses_numba(indices) else _rulebook_torch
    return build(indices.to(torch.int32), geometry, bool(subm), bool(transpose))


def check_bounds(indices: Tensor, batch_size: int, spatial_shape: Sequence[int]) -> None:
    """Raise IndexError unless every voxel (batch index, coordinates) lies in the batch and the shape."""
    if indices.shape[0] == 0:
        return
    low, high = torch.aminmax(indices, dim=0)
    # One transfer, also on a GPU.
    bounds = torch.stack((low, high)).tolist()
    limits = [batch_size, *spatial_shape]
    if min(bounds[0]) < 0 or any(h >= limit for h, limit in zip(bounds[1], limits, strict=True)):
        raise IndexError(
            f"indices run from {bounds[0]} to {bounds[1]} but must lie in [0, (batch {batch_size}, "
            f"spatial shape {list(spatial_shape)}))"
        )


get_indice_pairs_2d_forward = rulebook
get_indice_pairs_3d_forward = rulebook
get_indice_pairs_4d_forward = rulebook


def _with_grid(indices: Tensor, grid: Tensor, *arguments: object) -> Rulebook:
    """Build a rulebook, ignoring the caller's dense grid (scratch memory of mmcv's kernel)."""
    del grid
    return rulebook(indices, *arguments)  # type: ignore[arg-type]


get_indice_pairs_2d_backward = _with_grid
get_indice_pairs_3d_backward = _with_grid


def _rulebook_cpu(indices: Tensor, geometry: I64, subm: bool, transpose: bool) -> Rulebook:
    rows = as_numpy(indices)
    volume = int(np.prod(geometry[0]))
    pairs = np.full((volume, 2, rows.shape[0]), -1, dtype=np.int32)
    counts = np.zeros(volume, dtype=np.int32)
    if subm:
        _submanifold_pairs(rows, geometry, pairs, counts)
        return [indices, torch.from_numpy(pairs), torch.from_numpy(counts)]
    out = _strided_pairs(rows, geometry, transpose, pairs, counts)
    return [torch.from_numpy(out), torch.from_numpy(pairs), torch.from_numpy(counts)]


def kernel_offsets(ksize: I64) -> I64:
    """Return (K, D) kernel positions in row-major order, the order of a flattened weight."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(ksize))), tuple(ksize)), axis=1).astype(np.int64)


def _submanifold_pairs(rows: I32, geometry: I64, pairs: I32, counts: I32) -> None:
    """Fill `pairs` and `counts` by merging two copies of the sorted voxels.

    Linear indices are those of a grid padded by the kernel: a neighbour under offset k is at a constant distance, and
    one outside the grid has an index that no voxel has.
    """
    ksize, _, padding, dilation, _, shape = geometry
    reach = np.maximum(0, (ksize - 1) * dilation - padding)
    widths = np.cumprod([1, *(shape + padding + reach)[::-1]])[::-1].astype(np.int64)
    key = (rows[:, 0] * widths[0]) + (rows[:, 1:] + padding) @ widths[1:]
    distances = (kernel_offsets(ksize) * dilation - padding) @ widths[1:]
    order = np.argsort(key)
    known = key[order]
    # If i is the neighbour of o under one offset, o is that of i under the opposite one, so half of the merges
    # suffice for odd kernels without dilation; others need one per offset.
    volume = len(distances)
    mirrored = bool((ksize % 2 == 1).all() and (dilation == 1).all())
    walks = (volume + 1) // 2 if mirrored else volume

    def work(first: int, last: int) -> None:
        _walk(known, order, distances, mirrored, pairs, counts, first, last)

    parallel_for(work, walks)


@jit
def _walk(
    known: I64,
    order: I64,
    distances: I64,
    mirrored: bool,
    pairs: I32,
    counts: I32,
    first: int,
    last: int,
) -> None:  # pragma: no cover - compiled
    rows = known.shape[0]
    for k in range(first, last):
        opposite = distances.shape[0] - 1 - k
        n, j = 0, 0
        for i in range(rows):
            wanted = known[i] + distances[k]
            while j < rows and known[j] < wanted:
                j += 1
            if j == rows:
                break
            if known[j] == wanted:
                pairs[k, 0, n] = order[j]
                pairs[k, 1, n] = order[i]
                if mirrored and opposite != k:
                    pairs[opposite, 0, n] = order[i]
                    pairs[opposite, 1, n] = order[j]
                n += 1
        counts[k] = n
        if mirrored:
            counts[opposite] = n


def _strided_pairs(rows: I32, geometry: I64, transpose: bool, pairs: I32, counts: I32) -> I32:
    """Fill `pairs` and `counts`: sort the output cells of all pairs and number them in that order.

    Returns:
        The output voxels, (M, 1 + D).
    """
    ksize, stride, _, dilation, shape, _ = geometry
    # Along a dimension only one of `stride` kernel positions meets the output grid.
    steps = np.ones_like(stride) if transpose else stride // np.gcd(stride, dilation)
    most = rows.shape[0] * int(np.prod(-(-ksize // steps)))
    places, meetings = np.empty(most, dtype=np.int64), np.empty((most, 2), dtype=np.int32)
    total = _reached(rows, geometry, transpose, places, meetings)
    places = places[:total]
    order = np.argsort(places)
    out = np.empty((total, rows.shape[1]), dtype=np.int32)
    return out[: _number(places, order, meetings, shape, out, pairs, counts)].copy()


@jit
def _reached(
    rows: I32, geometry: I64, transpose: bool, places: I64, meetings: I32
) -> int:  # pragma: no cover - compiled
    """List the linear output cell of every pair in `places` and its (offset, input row) in `meetings`."""
    ndim = rows.shape[1] - 1
    ksize, stride, padding, dilation, shape = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    # Dimension by dimension; the first two rows alternate.
    offsets = np.empty((2, ksize.prod()), dtype=np.int64)
    keys = np.empty((2, ksize.prod()), dtype=np.int64)
    total = 0
    for i in range(rows.shape[0]):
        now, count = 0, 1
        offsets[0, 0], keys[0, 0] = 0, rows[i, 0]
        for d in range(ndim):
            n = 0
            for e in range(count):
                for position in range(ksize[d]):
                    if transpose:
                        c = rows[i, d + 1] * stride[d] - padding[d] + position * dilation[d]
                    else:
                        c = rows[i, d + 1] + padding[d] - position * dilation[d]
                        if c % stride[d] != 0:
                            continue
                        c = c // stride[d]
                    if c >= 0 and c < shape[d]:
                        offsets[1 - now, n] = offsets[now, e] * ksize[d] + position
                        keys[1 - now, n] = keys[now, e] * shape[d] + c
                        n += 1
            now, count = 1 - now, n
        for e in range(count):
            places[total] = keys[now, e]
            meetings[total, 0], meetings[total, 1] = offsets[now, e], i
            total += 1
    return total


@jit
def _number(
    places: I64, order: I64, meetings: I32, shape: I64, out: I32, pairs: I32, counts: I32
) -> int:  # pragma: no cover - compiled
    """Assign numbers to `places` in their `order`; write coordinates to `out` and pairs in input order."""
    numbers = np.empty(places.shape[0], dtype=np.int32)
    made = 0
    for e in range(order.shape[0]):
        place = places[order[e]]
        if e == 0 or place != places[order[e - 1]]:
            for d in range(shape.shape[0] - 1, -1, -1):
                out[made, d + 1] = place % shape[d]
                place //= shape[d]
            out[made, 0] = place
            made += 1
        numbers[order[e]] = made - 1
    for e in range(places.shape[0]):
        k = meetings[e, 0]
        pairs[k, 0, counts[k]] = meetings[e, 1]
        pairs[k, 1, counts[k]] = numbers[e]
        counts[k] += 1
    return made


def _rulebook_torch(indices: Tensor, geometry: I64, subm: bool, transpose: bool) -> Rulebook:
    """Build a rulebook by sorts and searches, on any device."""
    device = indices.device
    _, stride, padding, dilation, out_shape, in_shape = torch.from_numpy(geometry).to(device)
    offsets = torch.from_numpy(kernel_offsets(geometry[0])).to(device)
    n, volume = indices.shape[0], offsets.shape[0]
    batch, coords = indices[:, :1].long(), indices[:, 1:].long()
    pairs = torch.full((volume, 2, n), -1, dtype=torch.int32, device=device)
    # 1. For each kernel offset, the output cell of each input row, if any.
    if transpose:
        place = coords[None] * stride - padding + offsets[:, None] * dilation
        valid = torch.ones((volume, n), dtype=torch.bool, device=device)
    else:
        shifted = coords[None] + padding - offsets[:, None] * dilation
        valid = (shifted % stride == 0).all(dim=2)
        place = torch.div(shifted, stride, rounding_mode="floor")
    valid &= ((place >= 0) & (place < out_shape)).all(dim=2)
    key = _linear(batch[None].expand(volume, n, 1), place, out_shape)
    # 2. The output rows: those of the input, or all occupied cells.
    if subm:
        out = indices
        known, order = torch.sort(_linear(batch, coords, in_shape))
        if n:
            found = torch.searchsorted(known, key).clamp_(max=n - 1)
            valid &= known[found] == key
            row = order[found]
        else:
            row = key
    else:
        known, inverse = torch.unique(key[valid], return_inverse=True)
        row = torch.full_like(key, -1)
        row[valid] = inverse
        out = _unlinear(known, out_shape, indices.shape[1])
    # 3. Pack the pairs of each offset to the front, in input order.
    counts = valid.sum(dim=1, dtype=torch.int32)
    column = torch.cumsum(valid, dim=1) - 1
    k, i = valid.nonzero(as_tuple=True)
    pairs[k, 0, column[k, i]] = i.to(torch.int32)
    pairs[k, 1, column[k, i]] = row[k, i].to(torch.int32)
    return [out, pairs, counts]


def _linear(batch: Tensor, coords: Tensor, shape: Tensor) -> Tensor:
    key = batch[..., 0]
    for d in range(coords.shape[-1]):
        key = key * shape[d] + coords[..., d]
    return key


def _unlinear(key: Tensor, shape: Tensor, width: int) -> Tensor:
    columns = []
    for d in range(width - 2, -1, -1):
        columns.append(key % shape[d])
        key = torch.div(key, shape[d], rounding_mode="floor")
    columns.append(key)
    return torch.stack(columns[::-1], dim=1).to(torch.int32)
