"""Which input voxel meets which output voxel under which kernel offset: rulebooks of sparse convolution.

For stride s, padding p, dilation d and kernel offset k a convolution pairs input i with output o where
``i = o * s - p + k * d``; a transposed one where ``o = i * s - p + k * d``. A submanifold convolution
keeps the input's voxels and takes s = 1, p = kernel // 2 (mmcv 2.1.0 `csrc/pytorch/cuda/spconv_ops_cuda.cu`,
`getValidOutPos` in its `spconv/geometry.h`). Knows nothing about features or weights.

Output voxels come in the order of their first input (CPU) or by linear index (other devices); layers do
not depend on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_rank
from serve.ops.hashing import find_or_insert, table_size
from serve.ops.jit import jit

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


def _forward(
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
        out_padding: already contained in `out_shape`; not used.
        subm: 1 for a submanifold convolution.
        transpose: 1 for a transposed convolution.

    Returns:
        Output indices (M, 1 + D) int32; pairs (K, 2, N) int32, filled with -1 beyond the count, [k, 0]
        input rows and [k, 1] output rows; counts (K,) int32.
    """
    ndim = len(ksize)
    check_rank("indices", indices, 2)
    if indices.shape[1] != ndim + 1:
        raise ValueError(f"indices must be (N, {ndim + 1}) for a {ndim}-d kernel, got {tuple(indices.shape)}")
    volume = prod(ksize)
    if not 0 < volume <= MAX_KERNEL_VOLUME:
        raise ValueError(f"kernel volume must be in 1..{MAX_KERNEL_VOLUME}, got {volume} from {list(ksize)}")
    if min(out_shape) <= 0:
        raise ValueError(f"output shape {list(out_shape)} is empty: the kernel is larger than its input")
    if batch_size * prod(out_shape) >= 2**62 or batch_size * prod(spatial_shape) >= 2**62:
        raise ValueError(f"spatial shape {list(spatial_shape)} x batch {batch_size} does not fit 62 bits")
    if subm:
        stride, padding, transpose = [1] * ndim, [k // 2 for k in ksize], 0
    geometry = np.array([ksize, stride, padding, dilation, out_shape, spatial_shape], dtype=np.int64)
    _check_bounds(indices, batch_size, spatial_shape)
    build = _rulebook_cpu if indices.device.type == "cpu" else _rulebook_torch
    return build(indices.to(torch.int32), geometry, bool(subm), bool(transpose))


def _check_bounds(indices: Tensor, batch_size: int, spatial_shape: Sequence[int]) -> None:
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


get_indice_pairs_2d_forward = _forward
get_indice_pairs_3d_forward = _forward
get_indice_pairs_4d_forward = _forward


def _with_grid(indices: Tensor, grid: Tensor, *arguments: object) -> Rulebook:
    """The variant that reuses a caller's dense grid as scratch memory; ours needs none."""
    del grid
    return _forward(indices, *arguments)  # type: ignore[arg-type]


get_indice_pairs_2d_backward = _with_grid
get_indice_pairs_3d_backward = _with_grid


def _rulebook_cpu(indices: Tensor, geometry: I64, subm: bool, transpose: bool) -> Rulebook:
    rows = as_numpy(indices)
    n, volume = rows.shape[0], int(np.prod(geometry[0]))
    offsets = _kernel_offsets(geometry[0])
    pairs = np.full((volume, 2, n), -1, dtype=np.int32)
    counts = np.zeros(volume, dtype=np.int32)
    if subm:
        keys = np.full(table_size(n), -1, dtype=np.int64)
        slots = np.empty(keys.shape[0], dtype=np.int32)
        _submanifold_pairs(rows, geometry, offsets, pairs, counts, keys, slots)
        out = indices
    else:
        out_rows = np.empty((max(1, 2 * n), rows.shape[1]), dtype=np.int32)
        keys = np.full(table_size(2 * n), -1, dtype=np.int64)
        slots = np.empty(keys.shape[0], dtype=np.int32)
        out_rows, made = _strided_pairs(
            rows, geometry, offsets, transpose, pairs, counts, keys, slots, out_rows
        )
        out = torch.from_numpy(out_rows[:made])
    return [out, torch.from_numpy(pairs), torch.from_numpy(counts)]


def _kernel_offsets(ksize: I64) -> I64:
    """(K, D) kernel positions in row-major order, the order of a flattened weight."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(ksize))), tuple(ksize)), axis=1).astype(np.int64)


@jit
def _submanifold_pairs(
    rows: I32, geometry: I64, offsets: I64, pairs: I32, counts: I32, keys: I64, slots: I32
) -> None:  # pragma: no cover - compiled
    ndim = rows.shape[1] - 1
    padding, dilation, shape = geometry[2], geometry[3], geometry[5]
    for i in range(rows.shape[0]):
        key = np.int64(rows[i, 0])
        for d in range(ndim):
            key = key * shape[d] + rows[i, d + 1]
        at = find_or_insert(keys, key, True)
        keys[at] = key
        slots[at] = i
    # Where o sees i under one offset, i sees o under the opposite one: half the look-ups do. That holds for odd
    # kernels without dilation; the others look up every offset.
    volume = offsets.shape[0]
    mirrored = volume % 2 == 1
    for d in range(ndim):
        mirrored = mirrored and dilation[d] == 1 and geometry[0, d] % 2 == 1
    for k in range((volume + 1) // 2 if mirrored else volume):
        n = 0
        for o in range(rows.shape[0]):
            key = np.int64(rows[o, 0])
            inside = True
            for d in range(ndim):
                c = rows[o, d + 1] - padding[d] + offsets[k, d] * dilation[d]
                if c < 0 or c >= shape[d]:
                    inside = False
                    break
                key = key * shape[d] + c
            if not inside:
                continue
            at = find_or_insert(keys, key, False)
            if at >= 0:
                pairs[k, 0, n] = slots[at]
                pairs[k, 1, n] = o
                n += 1
        counts[k] = n
        opposite = volume - 1 - k
        if mirrored and opposite != k:
            for j in range(n):
                pairs[opposite, 0, j] = pairs[k, 1, j]
                pairs[opposite, 1, j] = pairs[k, 0, j]
            counts[opposite] = n


@jit
def _strided_pairs(
    rows: I32,
    geometry: I64,
    offsets: I64,
    transpose: bool,
    pairs: I32,
    counts: I32,
    keys: I64,
    slots: I32,
    out_rows: I32,
) -> tuple[I32, int]:  # pragma: no cover - compiled
    ndim = rows.shape[1] - 1
    stride, padding, dilation, shape = geometry[1], geometry[2], geometry[3], geometry[4]
    place = np.empty(ndim, dtype=np.int64)
    made = 0
    for i in range(rows.shape[0]):
        for k in range(offsets.shape[0]):
            key = np.int64(rows[i, 0])
            inside = True
            for d in range(ndim):
                if transpose:
                    c = rows[i, d + 1] * stride[d] - padding[d] + offsets[k, d] * dilation[d]
                else:
                    c = rows[i, d + 1] + padding[d] - offsets[k, d] * dilation[d]
                    if c < 0 or c % stride[d] != 0:
                        inside = False
                        break
                    c = c // stride[d]
                if c < 0 or c >= shape[d]:
                    inside = False
                    break
                place[d] = c
                key = key * shape[d] + c
            if not inside:
                continue
            at = find_or_insert(keys, key, True)
            if keys[at] != key:
                if 2 * (made + 1) > keys.shape[0]:
                    keys, slots = _grown(keys, slots)
                    at = find_or_insert(keys, key, True)
                if made == out_rows.shape[0]:
                    larger = np.empty((2 * made, ndim + 1), dtype=np.int32)
                    larger[:made] = out_rows
                    out_rows = larger
                keys[at] = key
                slots[at] = made
                out_rows[made, 0] = rows[i, 0]
                for d in range(ndim):
                    out_rows[made, d + 1] = place[d]
                made += 1
            n = counts[k]
            pairs[k, 0, n] = i
            pairs[k, 1, n] = slots[at]
            counts[k] = n + 1
    return out_rows, made


@jit
def _grown(keys: I64, slots: I32) -> tuple[I64, I32]:  # pragma: no cover - compiled
    larger = np.full(2 * keys.shape[0], -1, dtype=np.int64)
    moved = np.empty(2 * keys.shape[0], dtype=np.int32)
    for i in range(keys.shape[0]):
        if keys[i] != -1:
            at = find_or_insert(larger, keys[i], True)
            larger[at] = keys[i]
            moved[at] = slots[i]
    return larger, moved


def _rulebook_torch(indices: Tensor, geometry: I64, subm: bool, transpose: bool) -> Rulebook:
    """The same with sorts and searches only, for any device."""
    device = indices.device
    _, stride, padding, dilation, out_shape, in_shape = torch.from_numpy(geometry).to(device)
    offsets = torch.from_numpy(_kernel_offsets(geometry[0])).to(device)
    n, volume = indices.shape[0], offsets.shape[0]
    batch, coords = indices[:, :1].long(), indices[:, 1:].long()
    pairs = torch.full((volume, 2, n), -1, dtype=torch.int32, device=device)
    # 1. For each kernel offset the place each input row contributes to, and whether there is one.
    if transpose:
        place = coords[None] * stride - padding + offsets[:, None] * dilation
        valid = torch.ones((volume, n), dtype=torch.bool, device=device)
    else:
        shifted = coords[None] + padding - offsets[:, None] * dilation
        valid = (shifted % stride == 0).all(dim=2)
        place = torch.div(shifted, stride, rounding_mode="floor")
    valid &= ((place >= 0) & (place < out_shape)).all(dim=2)
    key = _linear(batch[None].expand(volume, n, 1), place, out_shape)
    # 2. The output rows: those of the input, or every place that was hit.
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
