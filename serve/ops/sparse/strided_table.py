"""Neighbour tables and output voxels of strided and transposed sparse convolutions, on the CPU.

See `serve.ops.sparse.neighbour_table`. Output cells are marked in a bitmap of the output grid and numbered by their
rank; grids too large for a bitmap use sorted lists (`serve.ops.sparse.rulebook`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy
from serve.ops.cpu.jit import jit
from serve.ops.cpu.rank_bitmap import popcount, prefix_popcounts
from serve.ops.cpu.threads import parallel_for
from serve.ops.sparse import rulebook
from serve.ops.sparse.neighbour_table import ROWS_PER_THREAD, WORDS_PER_ROW, to_neighbour_table

__all__ = ["strided_table"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
# Largest output grid for a bitmap, cells: 16 MiB of bitmap and 8 MiB of counts.
MAX_MARKED_CELLS = 1 << 27
# Largest extent for the lists of `_reach`.
MAX_LISTED_EXTENT = 1 << 16
# The sum of three fits 32 bits, and stays below zero with offsets.
_NOWHERE = -(1 << 29)
# Input voxels per block of listed pairs.
_BLOCK = 1024


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
    *,
    max_marked_cells: int = MAX_MARKED_CELLS,
) -> tuple[Tensor, I32]:
    """Compute the output voxels (M, 1 + D) of a strided or transposed convolution and its table (K, M).

    Args:
        indices: (N, 1 + D) int32: batch index, then D coordinates, each voxel once.
        batch_size: clouds in the batch.
        in_shape: D input extents.
        out_shape: D output extents.
        ksize: D kernel extents.
        stride: D strides.
        padding: D paddings.
        dilation: D dilations.
        transpose: whether the convolution is transposed.
        max_marked_cells: largest output grid for a bitmap, cells; larger ones use sorted lists.

    Raises:
        IndexError: a voxel lies outside.
    """
    cells, missing = batch_size * prod(out_shape), 3 - len(ksize)
    if cells > max_marked_cells or max(in_shape) > MAX_LISTED_EXTENT or missing < 0 or not len(indices):
        rows, pairs, counts = rulebook.rulebook(
            indices, batch_size, out_shape, in_shape, ksize, stride, padding, dilation, [0] * len(ksize),
            0, int(transpose),
        )  # fmt: skip
        table = to_neighbour_table(pairs, counts, len(indices), len(rows), inverse=False)
        assert table is not None  # an offset of a convolution has an output once
        return rows, table
    if not _inside(as_numpy(indices), np.array([batch_size, *in_shape], np.int64)):
        rulebook.check_bounds(indices, batch_size, in_shape)
    # Pad fewer dimensions to three with extents of one.
    geometry = np.ones((6, 3), np.int64)
    geometry[2] = 0
    geometry[:, missing:] = [ksize, stride, padding, dilation, out_shape, in_shape]
    inputs = np.zeros((len(indices), 4), np.int32) if missing else as_numpy(indices)
    if missing:
        inputs[:, 0], inputs[:, 1 + missing :] = as_numpy(indices[:, 0]), as_numpy(indices[:, 1:])
    out, table = _marked_table(inputs, batch_size, geometry, transpose)
    return torch.from_numpy(np.delete(out, range(1, 1 + missing), axis=1) if missing else out), table


def _marked_table(inputs: I32, batch_size: int, geometry: I64, transpose: bool) -> tuple[I32, I32]:
    """Compute output voxels (M, 4) and table of three-dimensional voxels (N, 4), all inside."""
    reached, ways = _reach(geometry, transpose)
    frame = int(geometry[4].prod())
    blocks, words = -(-len(inputs) // _BLOCK), -(-batch_size * frame // 64)
    # One spare row: the listing writes past the pairs it counts.
    listed = np.empty((blocks, _BLOCK * int(ways.prod()) + 1, 3), np.int32)
    pairs = np.empty(blocks, np.int64)
    parallel_for(
        lambda first, last: _list(inputs, reached, ways, frame, listed, pairs, first, last),
        blocks,
        min_per_thread=ROWS_PER_THREAD // _BLOCK,
    )
    marks, before = np.zeros(words, np.uint64), np.empty(words, np.int32)
    _mark(listed, pairs, marks)
    count = prefix_popcounts(marks, before)
    out, table = np.empty((count, 4), np.int32), np.full((int(geometry[0].prod()), count), -1, np.int32)
    parallel_for(
        lambda first, last: _coordinates(marks, before, geometry[4], out, first, last),
        words,
        min_per_thread=WORDS_PER_ROW * ROWS_PER_THREAD // 2,
    )
    parallel_for(
        lambda first, last: _fill(listed, pairs, marks, before, table, first, last),
        blocks,
        min_per_thread=ROWS_PER_THREAD // _BLOCK,
    )
    return out, table


@jit
def _inside(rows: I32, limits: I64) -> bool:  # pragma: no cover - compiled
    """Check that all voxels lie in [0, `limits`); torch would wake up threads that then spin beside ours."""
    inside = True
    for i in range(rows.shape[0]):
        for d in range(rows.shape[1]):
            inside &= 0 <= rows[i, d] < limits[d]
    return inside


@jit
def _reach(geometry: I64, transpose: bool) -> tuple[I32, I64]:  # pragma: no cover - compiled
    """List the outputs of each input coordinate along each dimension.

    Returns:
        (3, C, n, 2): for each input coordinate below the largest extent C, the kernel positions that take it to an
        output, and that output, both as linear offsets (of the kernel, and of the cells of a frame), padded with
        `_NOWHERE`. And (3,): how many of n each dimension uses.
    """
    ksize, stride, padding, dilation, out_shape, in_shape = geometry
    ways = np.zeros(3, np.int64)
    reached = np.zeros((3, in_shape.max(), ksize.max(), 2), np.int32)
    reached[..., 0] = _NOWHERE
    offset_unit, place_unit = 1, 1
    for d in range(2, -1, -1):
        for coordinate in range(in_shape[d]):
            n = 0
            for position in range(ksize[d]):
                if transpose:
                    c = coordinate * stride[d] - padding[d] + position * dilation[d]
                else:
                    c = coordinate + padding[d] - position * dilation[d]
                    if c % stride[d] != 0:
                        continue
                    c //= stride[d]
                if 0 <= c < out_shape[d]:
                    reached[d, coordinate, n, 0] = position * offset_unit
                    reached[d, coordinate, n:, 1] = c * place_unit
                    n += 1
            ways[d] = max(ways[d], n)
        offset_unit *= ksize[d]
        place_unit *= out_shape[d]
    return reached, ways


@jit
def _list(
    rows: I32,
    reached: I32,
    ways: I64,
    frame: int,
    listed: I32,
    pairs: I64,
    first: int,
    last: int,
) -> None:  # pragma: no cover - compiled
    """List the (output cell, offset, input row) of every pair of some blocks, and count them in `pairs`.

    All `ways` of all dimensions are combined, invalid ones too: that costs less than mispredicted branches. `frame` is
    the number of cells of a frame.
    """
    for block in range(first, last):
        total = 0
        entries = listed[block]
        for i in range(block * _BLOCK, min(rows.shape[0], (block + 1) * _BLOCK)):
            zs, ys, xs = reached[0, rows[i, 1]], reached[1, rows[i, 2]], reached[2, rows[i, 3]]
            start = rows[i, 0] * frame
            for z in range(ways[0]):
                for y in range(ways[1]):
                    offset, place = zs[z, 0] + ys[y, 0], start + zs[z, 1] + ys[y, 1]
                    for x in range(ways[2]):
                        # Always write, count only valid pairs.
                        entries[total, 0], entries[total, 1] = place + xs[x, 1], offset + xs[x, 0]
                        entries[total, 2] = i
                        total += offset + xs[x, 0] >= 0
        pairs[block] = total


@jit
def _mark(listed: I32, pairs: I64, marks: U64) -> None:  # pragma: no cover - compiled
    for block in range(pairs.shape[0]):
        for e in range(pairs[block]):
            place = listed[block, e, 0]
            marks[place >> 6] |= np.uint64(1) << np.uint64(place & 63)


@jit
def _coordinates(
    marks: U64, before: I32, shape: I64, out: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Write the coordinates of the cells marked in the words `first` to `last` to `out`."""
    width, height, line_end = shape[2], shape[1], np.int64(-1)
    frame = z = y = np.int64(0)
    for w in range(first, last):
        word, number = marks[w], np.uint64(before[w])
        while word != np.uint64(0):
            others = word & (word - np.uint64(1))
            place = np.int64(w * 64 + popcount((word ^ others) - np.uint64(1)))
            word = others
            if place >= line_end:  # divide only at the first cell of a line
                line = place // width
                line_end = (line + 1) * width
                plane, y = line // height, line % height
                frame, z = plane // shape[0], plane % shape[0]
            out[number, 0], out[number, 1], out[number, 2] = frame, z, y
            out[number, 3] = place - (line_end - width)
            number += np.uint64(1)


@jit
def _fill(
    listed: I32, pairs: I64, marks: U64, before: I32, table: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Write the input rows of the pairs of some blocks to the `table`, at the ranks of their cells."""
    for block in range(first, last):
        for e in range(pairs[block]):
            place = listed[block, e, 0]
            below = (np.uint64(1) << np.uint64(place & 63)) - np.uint64(1)
            number = before[place >> 6] + popcount(marks[place >> 6] & below)
            table[listed[block, e, 1], number] = listed[block, e, 2]
