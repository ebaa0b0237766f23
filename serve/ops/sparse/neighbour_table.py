"""Neighbour tables of submanifold convolutions and of rulebooks, on the CPU.

A neighbour table has the input row of each kernel offset and output voxel, -1 for none; the compiled convolution
(`serve.ops.sparse.table_conv`) reads it. `serve.ops.sparse.strided_table` builds those of other convolutions.
mmcv's layers exchange lists of pairs instead (`serve.ops.sparse.rulebook`), with the same geometry and order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from serve.ops.checks import as_numpy
from serve.ops.cpu.jit import jit
from serve.ops.cpu.rank_bitmap import popcount, prefix_popcounts
from serve.ops.cpu.threads import parallel_for
from serve.ops.sparse import rulebook

__all__ = ["ROWS_PER_THREAD", "WORDS_PER_ROW", "invert_table", "submanifold_table", "to_neighbour_table"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
# Words of a bitmap that can be cleared and counted in the time of sorting one voxel.
WORDS_PER_ROW = 32
# Voxels that keep a thread busy for longer than its wake-up time.
ROWS_PER_THREAD = 1 << 14
# States of an offset whose pairs make no table.
_OUT_OF_RANGE, _NOT_UNIQUE = 1, 2


def submanifold_table(
    indices: Tensor, batch_size: int, shape: Sequence[int], ksize: Sequence[int], dilation: Sequence[int]
) -> I32:
    """Build the table (K, N) of a submanifold convolution, whose output voxels are its input voxels.

    Neighbours are found in a bitmap, or, in large sparse grids, by merging two copies of the sorted voxels as in
    `serve.ops.sparse.rulebook`.

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
    rows = as_numpy(indices)
    keys = np.empty(len(rows), np.int64)
    inside, ascending = _keys(rows, np.array([batch_size, *shape], np.int64), padding, widths, keys)
    if not inside:
        rulebook.check_bounds(indices, batch_size, shape)
    # Kernel positions that differ only in the last dimension are adjacent and are found together.
    lines = rulebook.kernel_offsets(np.array([*kernel[:-1], 1]))
    starts, step = (lines * steps - padding) @ widths[1:], steps[-1]
    words = -(-batch_size * int(widths[0]) // 64)
    if ascending and step == 1 and words <= WORDS_PER_ROW * len(rows):
        marks, before = np.zeros(words, np.uint64), np.empty(words, np.int32)
        _mark_keys(keys, marks)
        prefix_popcounts(marks, before)
        table = np.empty((len(lines) * kernel[-1], len(rows)), np.int32)
        parallel_for(
            lambda first, last: _look_up(keys, starts, kernel[-1], marks, before, table, first, last),
            len(rows),
            min_per_thread=ROWS_PER_THREAD,
        )
        return table
    order = np.argsort(keys)
    known = keys[order]
    mirrored = bool((kernel % 2 == 1).all() and (steps == 1).all())
    table = np.full((len(lines) * kernel[-1], len(rows)), -1, np.int32)
    parallel_for(
        lambda first, last: _walk(known, order, starts, kernel[-1], step, mirrored, table, first, last),
        len(rows),
        min_per_thread=ROWS_PER_THREAD,
    )
    return table


@jit
def _keys(
    rows: I32, limits: I64, padding: I64, widths: I64, keys: I64
) -> tuple[bool, bool]:  # pragma: no cover - compiled
    """Compute linear indices in a grid padded by the kernel; return whether all are inside and ascending."""
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
    known: I64,
    order: I64,
    starts: I64,
    across: int,
    step: int,
    mirrored: bool,
    table: I32,
    first: int,
    last: int,
) -> None:  # pragma: no cover - compiled
    """Find the neighbours of the sorted voxels `first` to `last` along each line of the kernel.

    A line starts `starts` away from a voxel and has `across` positions, `step` apart. If i is the neighbour of o under
    one offset of a `mirrored` kernel, o is that of i under the opposite one, so half of the lines suffice.
    """
    rows, lines = known.shape[0], starts.shape[0]
    for line in range((lines + 1) // 2 if mirrored else lines):
        j = np.searchsorted(known, known[first] + starts[line])
        for i in range(first, last):
            begin = known[i] + starts[line]
            end = begin + across * step
            while j < rows and known[j] < begin:
                j += 1
            at = j
            while at < rows and known[at] < end:
                position = known[at] - begin
                if step != 1:  # rare; a division costs more than the rest of the loop
                    if position % step != 0:
                        at += 1
                        continue
                    position //= step
                k = line * across + position
                table[k, order[i]] = order[at]
                if mirrored:
                    table[lines * across - 1 - k, order[at]] = order[i]
                at += 1


@jit
def _mark_keys(keys: I64, marks: U64) -> None:  # pragma: no cover - compiled
    for i in range(keys.shape[0]):
        marks[keys[i] >> 6] |= np.uint64(1) << np.uint64(keys[i] & 63)


@jit
def _look_up(
    keys: I64, starts: I64, across: int, marks: U64, before: I32, table: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Find the neighbours of the ascending voxels `first` to `last`: a voxel's row is its rank in the bitmap.

    Branch-free, because the presence of a neighbour is unpredictable.
    """
    # Unsigned: an index that may be negative costs a comparison.
    one, low = np.uint64(1), np.uint64(63)
    for line in range(starts.shape[0]):
        for i in range(np.uint64(first), np.uint64(last)):
            key = np.uint64(keys[i] + starts[line])
            word = key >> np.uint64(6)
            row = before[word] + popcount(marks[word] & ((one << (key & low)) - one))
            for position in range(across):
                at = key + np.uint64(position)
                marked = np.int64((marks[at >> np.uint64(6)] >> (at & low)) & one)
                table[line * across + position, i] = row if marked else -1
                row += marked


def invert_table(table: I32, inputs: int) -> I32:
    """Invert `table` (K, M) to the table (K, `inputs`) of the inverse convolution."""
    turned = np.full((len(table), inputs), -1, np.int32)
    parallel_for(lambda first, last: _invert(table, turned, first, last), len(table))
    return turned


@jit
def _invert(table: I32, turned: I32, first: int, last: int) -> None:  # pragma: no cover - compiled
    for k in range(first, last):
        for o in range(table.shape[1]):
            if table[k, o] >= 0:
                turned[k, table[k, o]] = o


def to_neighbour_table(
    pairs: Tensor, pair_num: Tensor, num_act_in: int, num_act_out: int, *, inverse: bool
) -> I32 | None:
    """Convert a rulebook to the (K, M) input row of each offset and output row, -1 for none.

    Returns:
        The table, or None if an offset has an output twice.

    Raises:
        IndexError: a row of a pair is out of range.
    """
    lists, counts = as_numpy(pairs), as_numpy(pair_num)
    table = np.empty((len(lists), num_act_out), dtype=np.int32)
    states = np.zeros(len(lists), dtype=np.int32)
    parallel_for(
        lambda first, last: _fill_neighbours(lists, counts, num_act_in, inverse, table, states, first, last),
        len(lists),
    )
    if (states == _OUT_OF_RANGE).any():
        raise IndexError(
            f"indice_pairs must have input rows in [0, {num_act_in}), output rows in [0, {num_act_out}), and "
            f"indice_pair_num counts of at most {pairs.shape[2]}"
        )
    return None if (states == _NOT_UNIQUE).any() else table


@jit
def _fill_neighbours(
    pairs: I32,
    counts: I32,
    inputs: int,
    inverse: bool,
    table: I32,
    states: I32,
    first: int,
    last: int,
) -> None:  # pragma: no cover - compiled
    source, target = (1, 0) if inverse else (0, 1)
    for k in range(first, last):
        table[k] = -1
        if counts[k] < 0 or counts[k] > pairs.shape[2]:
            states[k] = _OUT_OF_RANGE
            continue
        for j in range(counts[k]):
            row = pairs[k, target, j]
            if not (0 <= row < table.shape[1] and 0 <= pairs[k, source, j] < inputs):
                states[k] = _OUT_OF_RANGE
                break
            if table[k, row] != -1:
                states[k] = _NOT_UNIQUE
                break
            table[k, row] = pairs[k, source, j]
