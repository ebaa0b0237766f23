"""The geometry of a sparse convolution as a table: the input row of every kernel offset and output voxel, -1 for none.

What the compiled convolution (`serve.ops.sparse_conv.convolve_table`) reads. mmcv's layers exchange lists of pairs
(`serve.ops.sparse_index`, with the same geometry and the same order of output voxels); who needs none of those
finds the table without them. On the CPU only. Knows nothing about features or weights.

Places reached by a strided convolution are marked in a bitmap of the output grid, and a place's number is the
count of marks before it (rank by population counts: G. Jacobson, "Space-efficient static trees and graphs", FOCS
1989); grids too large for a bitmap take the way of sorted lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops import sparse_index
from serve.ops.checks import as_numpy
from serve.ops.jit import jit
from serve.ops.sparse_conv import neighbours_of_pairs
from serve.ops.threads import in_parts

__all__ = ["inverted", "strided_table", "submanifold_table"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
# Cells of an output grid that are marked in a bitmap: 16 MiB of it, and 8 MiB of counts.
MAX_MARKED_CELLS = 1 << 27


def submanifold_table(
    indices: Tensor, batch_size: int, shape: Sequence[int], ksize: Sequence[int], dilation: Sequence[int]
) -> I32:
    """The table (K, N) of a submanifold convolution, whose output voxels are its input voxels.

    A neighbour is found as in `sparse_index`, by walking two copies of the sorted voxels in step.

    Args:
        indices: (N, 1 + D) int32: batch index, then D coordinates, each voxel once.
        batch_size: clouds in the batch.
        shape: D extents.
        ksize: D kernel extents.
        dilation: D dilations.

    Raises:
        IndexError: a voxel lies outside.
    """
    kernel, steps = np.array(ksize, np.int64), np.array(dilation, np.int64)
    padding = kernel // 2
    reach = np.maximum(0, (kernel - 1) * steps - padding)
    widths = np.cumprod([1, *(np.array(shape, np.int64) + padding + reach)[::-1]])[::-1].astype(np.int64)
    offsets = sparse_index.kernel_offsets(kernel)
    distances = (offsets * steps - padding) @ widths[1:]
    rows = as_numpy(indices)
    keys = np.empty(len(rows), np.int64)
    inside, ascending = _keys(rows, np.array([batch_size, *shape], np.int64), padding, widths, keys)
    if not inside:
        sparse_index.check_bounds(indices, batch_size, shape)
    if ascending:  # as the output voxels of a strided convolution are
        order, known = np.arange(len(rows)), keys
    else:
        order = np.argsort(keys)
        known = keys[order]
    volume = len(distances)
    mirrored = bool((kernel % 2 == 1).all() and (steps == 1).all())
    table = np.empty((volume, len(rows)), np.int32)
    walks = (volume + 1) // 2 if mirrored else volume

    def work(first: int, last: int) -> None:
        _walk(known, order, distances, mirrored, table, first, last)

    in_parts(work, walks)
    return table


@jit
def _keys(
    rows: I32, limits: I64, padding: I64, widths: I64, keys: I64
) -> tuple[bool, bool]:  # pragma: no cover - compiled
    """Number the voxels within a grid that has room for the kernel around it; whether all lie inside and ascend."""
    inside = ascending = True
    for i in range(rows.shape[0]):
        key = rows[i, 0] * widths[0]
        inside &= 0 <= rows[i, 0] < limits[0]
        for d in range(padding.shape[0]):
            inside &= 0 <= rows[i, d + 1] < limits[d + 1]
            key += (rows[i, d + 1] + padding[d]) * widths[d + 1]
        keys[i] = key
        ascending &= i == 0 or keys[i - 1] < key
    return inside, ascending


@jit
def _walk(
    known: I64, order: I64, distances: I64, mirrored: bool, table: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    rows = known.shape[0]
    for k in range(first, last):
        opposite = distances.shape[0] - 1 - k
        table[k] = -1
        if mirrored:
            if k == opposite:
                for i in range(rows):
                    table[k, i] = i
                continue
            table[opposite] = -1
        j = 0
        for i in range(rows):
            wanted = known[i] + distances[k]
            while j < rows and known[j] < wanted:
                j += 1
            if j == rows:
                break
            if known[j] == wanted:
                table[k, order[i]] = order[j]
                if mirrored:
                    table[opposite, order[j]] = order[i]


def strided_table(
    indices: Tensor,
    batch_size: int,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    ksize: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transpose: bool,
) -> tuple[Tensor, I32]:
    """The output voxels (M, 1 + D) of a strided or transposed convolution and its table (K, M).

    Args:
        indices: (N, 1 + D) int32: batch index, then D coordinates, each voxel once.
        batch_size: clouds in the batch.
        in_shape: D input extents.
        out_shape: D output extents.
        ksize: D kernel extents.
        stride: D strides.
        padding: D paddings.
        dilation: D dilations.
        transpose: whether the convolution is a transposed one.

    Raises:
        IndexError: a voxel lies outside.
    """
    cells = batch_size * prod(out_shape)
    if cells > MAX_MARKED_CELLS or not len(indices):
        rows, pairs, counts = sparse_index.rulebook(
            indices, batch_size, out_shape, in_shape, ksize, stride, padding, dilation, [0] * len(ksize),
            0, int(transpose),
        )  # fmt: skip
        table = neighbours_of_pairs(pairs, counts, len(indices), len(rows), inverse=False)
        assert table is not None  # an offset of a convolution names an output once
        return rows, table
    geometry = np.array([ksize, stride, padding, dilation, out_shape], dtype=np.int64)
    steps = geometry[1] if not transpose else np.ones_like(geometry[1])
    # Of the kernel positions along a dimension only every so-maniest meets the output grid.
    most = len(indices) * int(np.prod(-(-geometry[0] // (steps // np.gcd(steps, geometry[3])))))
    places, meetings = np.empty(most, np.int64), np.empty((most, 2), np.int32)
    marks, before = np.zeros(-(-cells // 64), np.uint64), np.empty(-(-cells // 64), np.int32)
    limits = np.array([batch_size, *in_shape], np.int64)
    total = _mark(as_numpy(indices), limits, geometry, transpose, places, meetings, marks)
    if total < 0:
        sparse_index.check_bounds(indices, batch_size, in_shape)
    count = _count(marks, before)
    out = np.empty((count, indices.shape[1]), np.int32)
    table = np.full((int(np.prod(geometry[0])), count), -1, np.int32)
    _fill(places[:total], meetings, marks, before, geometry[4], out, table)
    return torch.from_numpy(out), table


@jit
def _mark(
    rows: I32, limits: I64, geometry: I64, transpose: bool, places: I64, meetings: I32, marks: U64
) -> int:  # pragma: no cover - compiled
    """List every pair's output place in `places` and its (offset, input row) in `meetings`, and mark the places.

    Returns how many pairs there are; -1 where a row lies outside the `limits`.
    """
    ksize, stride, padding, dilation, shape = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    ndim = rows.shape[1] - 1
    most = ksize.max()
    # Along each dimension the kernel positions that meet the grid, and where.
    positions, met = np.empty((ndim, most), np.int64), np.empty((ndim, most), np.int64)
    counts, turn = np.empty(ndim, np.int64), np.empty(ndim, np.int64)
    total = 0
    for i in range(rows.shape[0]):
        for d in range(ndim + 1):
            if rows[i, d] < 0 or rows[i, d] >= limits[d]:
                return -1
        combinations = 1
        for d in range(ndim):
            n = 0
            for position in range(ksize[d]):
                if transpose:
                    c = rows[i, d + 1] * stride[d] - padding[d] + position * dilation[d]
                else:
                    c = rows[i, d + 1] + padding[d] - position * dilation[d]
                    if stride[d] == 2:  # most are; a division costs as much as all the rest
                        if c & 1:
                            continue
                        c >>= 1
                    elif stride[d] != 1:
                        if c % stride[d] != 0:
                            continue
                        c //= stride[d]
                if 0 <= c < shape[d]:
                    positions[d, n], met[d, n] = position, c
                    n += 1
            counts[d], turn[d] = n, 0
            combinations *= n
        for _ in range(combinations):
            offset, place = 0, np.int64(rows[i, 0])
            for d in range(ndim):
                offset = offset * ksize[d] + positions[d, turn[d]]
                place = place * shape[d] + met[d, turn[d]]
            places[total] = place
            meetings[total, 0], meetings[total, 1] = offset, i
            marks[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
            total += 1
            for d in range(ndim - 1, -1, -1):
                turn[d] += 1
                if turn[d] < counts[d]:
                    break
                turn[d] = 0
    return total


@jit
def _ones(word: np.uint64) -> int:  # pragma: no cover - compiled
    """Bits that are set (population count by adding within ever wider fields)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@jit
def _count(marks: U64, before: I32) -> int:  # pragma: no cover - compiled
    """Fill in how many marks lie before each word; returns how many there are."""
    total = 0
    for w in range(marks.shape[0]):
        before[w] = total
        if marks[w] != np.uint64(0):
            total += _ones(marks[w])
    return total


@jit
def _fill(
    places: I64, meetings: I32, marks: U64, before: I32, shape: I64, out: I32, table: I32
) -> None:  # pragma: no cover - compiled
    """Write the coordinates of the marked places to `out` and the input rows to `table`."""
    for e in range(places.shape[0]):
        w = places[e] >> 6
        below = (np.uint64(1) << np.uint64(places[e] & 63)) - np.uint64(1)
        number = before[w] + _ones(marks[w] & below)
        table[meetings[e, 0], number] = meetings[e, 1]
        # Several inputs reach a place; each writes the same.
        place = places[e]
        for d in range(shape.shape[0] - 1, -1, -1):
            rest = place // shape[d]
            out[number, d + 1] = place - rest * shape[d]
            place = rest
        out[number, 0] = place


def inverted(table: I32, inputs: int) -> I32:
    """The table (K, `inputs`) of the inverse convolution: outputs of `table` (K, M) become inputs."""
    turned = np.full((len(table), inputs), -1, np.int32)
    in_parts(lambda first, last: _invert(table, turned, first, last), len(table))
    return turned


@jit
def _invert(table: I32, turned: I32, first: int, last: int) -> None:  # pragma: no cover - compiled
    for k in range(first, last):
        for o in range(table.shape[1]):
            if table[k, o] >= 0:
                turned[k, table[k, o]] = o
