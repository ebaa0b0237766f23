"""Compiled loops of `serve.ops.cpu.masked_conv`.

Maps are (B, H, W, C) float32, masks (B, H, W). `tiles` numbers output tiles (2 x 2 or 4 x 4 cells for Winograd's
filtering, else one cell, of the input if cellwise) through all images of a batch, and a call computes those from
`first` to `last`. With `masked`, cells of `x` that have not `changed` are read from the background (`rows`, `index`),
and the computed cells that differ from the output's background (`after`, `after_index`, compared as integers) are
marked.

With `adds`, cell (y, x) gets the cell (`source_rows`[y], `source_columns`[x]) of the map `addend` before its ReLU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu import winograd
from serve.ops.cpu.gemm import (
    FROM_ADDEND,
    FROM_BIAS,
    FROM_OUT,
    FROM_ZERO,
    LANES,
    ROWS,
    add_products,
    aligned_zeros,
    set_products,
)
from serve.ops.cpu.jit import jit, jit_contracted

__all__ = [
    "add_narrow",
    "add_nearest",
    "convolve_cellwise",
    "convolve_directly",
    "convolve_winograd",
    "multiply_cells",
]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Cells per block, a multiple of ROWS.
_BLOCK = 192
# Input channels that are multiplied at a time, so that a panel stays in the L2 cache.
_DEPTH = 256


@jit
def _gather(
    x: F32, origin: int, masked: bool, changed: Mask, rows: F32, index: I32, image: int, y: int, z: int, into: F32
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Copy channels from `origin` of cell (y, z) of a map: zero beyond the border, of the background if unchanged."""
    if y < 0 or z < 0 or y >= x.shape[1] or z >= x.shape[2]:
        for c in range(into.shape[0]):
            into[c] = 0
    elif masked and not changed[image, y, z]:
        row = rows[index[y, z]]
        for c in range(into.shape[0]):
            into[c] = row[origin + c]
    else:
        cell = x[image, y, z]
        for c in range(into.shape[0]):
            into[c] = cell[origin + c]


@jit
def _mark(
    bits: I32, rows: I32, index: I32, marks: Mask, image: int, y: int, x: int, channel: int, count: int
) -> None:  # pragma: no cover - compiled
    """Mark a cell whose bits, in `count` channels from `channel`, differ from the background's."""
    row = index[y, x]
    found = np.int32(0)
    for c in range(channel, channel + count):
        found |= bits[image, y, x, c] ^ rows[row, c]
    marks[image, y, x] = found != 0


@jit
def _finish(sums: F32, bias: F32, relu: bool, out: F32, channel: int) -> None:  # pragma: no cover - compiled
    """Write sums plus bias, cut at zero if `relu`; NaN stays NaN."""
    for c in range(bias.shape[0]):
        total = sums[c] + bias[c]
        out[channel + c] = np.float32(0) if relu and total < 0 else total


@jit
def _add(addend: F32, relu: bool, out: F32, channel: int) -> None:  # pragma: no cover - compiled
    """Add a cell to an output, cut at zero if `relu`; NaN stays NaN."""
    for c in range(addend.shape[0]):
        total = out[channel + c] + addend[c]
        out[channel + c] = np.float32(0) if relu and total < 0 else total


@jit_contracted
def convolve_directly(
    x: F32, masked: bool, changed: Mask, rows: F32, index: I32, tiles: I64, weight: F32, bias: F32, relu: bool,
    out: F32, channel: int, kernel: int, stride: int, padding: int, origin: int,
    adds: bool, addend: F32, source_rows: I64, source_columns: I64,
    bits: I32, marks: Mask, after: I32, after_index: I32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Compute output cells `first` to `last` of `tiles`, one place of the kernel after the other."""
    _, height, width, _ = out.shape
    block = np.zeros((_BLOCK, weight.shape[2]), np.float32)
    wide = weight.shape[1] * weight.shape[3]
    sums = aligned_zeros(_BLOCK * wide).reshape(_BLOCK, wide)
    order = np.arange(_BLOCK).astype(np.int32)
    corners = np.empty((_BLOCK, 3), np.int64)
    for begin in range(first, last, _BLOCK):
        count = min(_BLOCK, last - begin)
        sums[:] = 0
        for t in range(count):  # divisions once per cell, not once per place
            tile = tiles[begin + t]
            corners[t, 0] = tile // (width * height)
            corners[t, 1] = tile // width % height * stride - padding
            corners[t, 2] = tile % width * stride - padding
        for place in range(kernel * kernel):
            down, right = place // kernel, place % kernel
            for t in range(count):
                y, z = corners[t, 1] + down, corners[t, 2] + right
                _gather(x, origin, masked, changed, rows, index, corners[t, 0], y, z, block[t])
            for p in range(weight.shape[1]):
                panel = weight[place, p]
                for r in range(0, count, ROWS):
                    add_products(block, panel, sums, order, order, r, p * panel.shape[1])
        for t in range(count):
            image = corners[t, 0]
            y, z = (corners[t, 1] + padding) // stride, (corners[t, 2] + padding) // stride
            _finish(sums[t], bias, relu and not adds, out[image, y, z], channel)
            if adds:
                _add(addend[image, source_rows[y], source_columns[z]], relu, out[image, y, z], channel)
            if masked:
                _mark(bits, after, after_index, marks, image, y, z, channel, bias.shape[0])


@jit_contracted
def multiply_cells(
    x: F32, origin: int, masked: bool, changed: Mask, rows: F32, index: I32, sources: I64, weight: F32,
    products: F32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Multiply channels from `origin` of the cells `first` to `last` of `sources` with one panel."""
    batch, height, width, channels = x.shape
    inputs, wide, panel = weight.shape[2], weight.shape[3], weight[0, 0]
    cells = x.reshape(batch * height * width, channels)[:, origin : origin + inputs]
    behind = rows[:, origin : origin + inputs]
    out = products.reshape(batch * height * width, wide)
    none = np.zeros(wide, np.float32)
    # Cells and, of those that have not changed, rows of the background: from, to, and how many.
    own, other = np.empty((2, _BLOCK + ROWS), np.int32), np.empty((2, _BLOCK + ROWS), np.int32)
    for begin in range(first, last, _BLOCK):
        own_count, other_count = 0, 0
        for t in range(min(_BLOCK, last - begin)):
            cell = sources[begin + t]
            image, y, z = cell // (width * height), cell // width % height, cell % width
            if masked and not changed[image, y, z]:
                other[0, other_count], other[1, other_count] = index[y, z], cell
                other_count += 1
            else:
                own[0, own_count], own[1, own_count] = cell, cell
                own_count += 1
        for extra in range(ROWS):  # a group that is not full repeats its last row
            own[:, own_count + extra] = own[:, max(own_count - 1, 0)]
            other[:, other_count + extra] = other[:, max(other_count - 1, 0)]
        for r in range(0, own_count, ROWS):
            set_products(cells, panel, out, own[0], own[1], r, 0, FROM_ZERO, none, out, own[1], 0, False)
        for r in range(0, other_count, ROWS):
            set_products(
                behind, panel, out, other[0], other[1], r, 0, FROM_ZERO, none, out, other[1], 0, False
            )


@jit
def add_narrow(
    products: F32, tiles: I64, bias: F32, relu: bool, kernel: int, padding: int, height: int, width: int, out: F32,
    channel: int, masked: bool, bits: I32, marks: Mask, after: I32, after_index: I32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Add the products of the window of each output cell, in the order of the kernel's places."""
    _, down, across, _ = out.shape
    outputs = bias.shape[0]
    sums = np.empty(outputs, np.float32)
    for t in range(first, last):
        tile = tiles[t]
        image, y, z = tile // (across * down), tile // across % down, tile % across
        sums[:] = 0
        for i in range(kernel):
            for j in range(kernel):
                top, left = y - padding + i, z - padding + j
                if 0 <= top < height and 0 <= left < width:
                    for c in range(outputs):
                        sums[c] += products[image, top, left, (i * kernel + j) * outputs + c]
        _finish(sums, bias, relu, out[image, y, z], channel)
        if masked:
            _mark(bits, after, after_index, marks, image, y, z, channel, outputs)


@jit
def add_nearest(
    fine: F32, masked: bool, changed: Mask, rows: F32, index: I32,
    coarse: F32, coarse_changed: Mask, coarse_rows: F32, coarse_index: I32, sources_y: I64, sources_x: I64,
    bits: I32, marks: Mask, after: I32, after_index: I32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Add to rows `first` to `last` of `fine` the cells of `coarse` that `sources_y` and `sources_x` name."""
    _, height, width, channels = fine.shape
    for strip in range(first, last):
        image, y = strip // height, strip % height
        for x in range(width):
            above, left = sources_y[y], sources_x[x]
            if masked and not (changed[image, y, x] or coarse_changed[image, above, left]):
                continue
            into, other = fine[image, y, x], coarse[image, above, left]
            if masked and not changed[image, y, x]:
                into[:] = rows[index[y, x]]
            if masked and not coarse_changed[image, above, left]:
                other = coarse_rows[coarse_index[above, left]]
            for c in range(channels):
                into[c] += other[c]
            if masked:
                _mark(bits, after, after_index, marks, image, y, x, 0, channels)


@jit_contracted
def convolve_cellwise(
    x: F32, tiles: I64, weight: F32, bias: F32, relu: bool, out: F32, channel: int, step: int, stride: int,
    masked: bool, adds: bool, addend: F32, source_rows: I64, source_columns: I64,
    bits: I32, marks: Mask, after: I32, after_index: I32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Compute the outputs of cells `first` to `last` of `tiles`, `stride` x `stride` each.

    Tiles are cells of every `step`-th row and column of the input.
    """
    batch, height, width, inputs = x.shape
    cells = x.reshape(batch * height * width, inputs)
    flat, added = out.reshape(-1, out.shape[3]), addend.reshape(-1, addend.shape[3])
    down, across, outputs = -(-height // step), -(-width // step), bias.shape[0]
    wide, depth = weight.shape[3], max(inputs, 1)
    offsets = np.zeros(weight.shape[1] * wide, np.float32)
    offsets[:outputs] = bias
    partial = aligned_zeros(_BLOCK * wide).reshape(_BLOCK, wide)
    order = np.arange(_BLOCK).astype(np.int32)
    sources, targets, origins = (
        np.zeros(_BLOCK, np.int32),
        np.zeros(_BLOCK, np.int32),
        np.zeros(_BLOCK, np.int32),
    )
    for begin in range(first, last, _BLOCK):
        count = min(_BLOCK, last - begin)
        for place in range(stride * stride):
            for t in range(_BLOCK):  # rows beyond `count` repeat the last one
                tile = tiles[begin + min(t, count - 1)]
                image, row, column = tile // (across * down), tile // across % down, tile % across
                sources[t] = (image * height + row * step) * width + column * step
                y, z = row * stride + place // stride, column * stride + place % stride
                targets[t] = (image * out.shape[1] + y) * out.shape[2] + z
                if adds:
                    origins[t] = (image * addend.shape[1] + source_rows[y]) * addend.shape[
                        2
                    ] + source_columns[z]
            for start in range(0, depth, _DEPTH):
                part = cells[:, start : start + _DEPTH]
                ends = start + _DEPTH >= inputs
                for p in range(weight.shape[1]):
                    panel = weight[place, p, start : start + _DEPTH]
                    if (p + 1) * wide <= outputs:
                        how = FROM_OUT if start else FROM_ADDEND if adds else FROM_BIAS
                        for r in range(0, count, ROWS):
                            set_products(
                                part, panel, flat, sources, targets, r, channel + p * wide,
                                how, offsets, added, origins, p * wide, relu and ends,
                            )  # fmt: skip
                        continue
                    how = FROM_OUT if start else FROM_BIAS
                    for r in range(0, count, ROWS):
                        set_products(
                            part, panel, partial, sources, order, r, 0,
                            how, offsets, partial, order, p * wide, relu and ends and not adds,
                        )  # fmt: skip
                    if ends:
                        for t in range(count):
                            cell = flat[targets[t], channel + p * wide : channel + outputs]
                            for c in range(cell.shape[0]):
                                cell[c] = partial[t, c]
                            if adds:
                                _add(added[origins[t], p * wide :], relu, cell, 0)
            if masked:
                for t in range(count):
                    image, cell = targets[t] // (out.shape[1] * out.shape[2]), targets[t]
                    y, z = cell // out.shape[2] % out.shape[1], cell % out.shape[2]
                    _mark(bits, after, after_index, marks, image, y, z, channel, outputs)


@jit_contracted
def convolve_winograd(
    x: F32, masked: bool, changed: Mask, rows: F32, index: I32, tiles: I64, weight: F32, bias: F32, relu: bool,
    out: F32, channel: int, extent: int,
    adds: bool, addend: F32, source_rows: I64, source_columns: I64,
    bits: I32, marks: Mask, after: I32, after_index: I32, first: int, last: int,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Compute tiles of `extent` x `extent` outputs, 2 or 4, by the transforms of `serve.ops.cpu.winograd`."""
    _, height, width, inputs = x.shape
    outputs, window = bias.shape[0], extent + 2
    places = window * window
    down, across = -(-height // extent), -(-width // extent)
    size, wide = winograd.BLOCK, weight.shape[1] * weight.shape[3]
    offsets = np.zeros(-(-outputs // LANES) * LANES, np.float32)
    offsets[:outputs] = bias
    patch = np.empty((window, window, inputs), np.float32)
    corner = np.empty((extent, extent, offsets.shape[0]), np.float32)
    # A line more per place, so that the places of a channel do not share a set of the cache.
    seen = aligned_zeros(places * (size * inputs + LANES)).reshape(places, size * inputs + LANES)
    sums = aligned_zeros(places * (size * wide + LANES)).reshape(places, size * wide + LANES)
    order = np.arange(size).astype(np.int32)
    for begin in range(first, last, size):
        count = min(size, last - begin)
        for t in range(count):
            tile = tiles[begin + t]
            image = tile // (down * across)
            top, left = tile // across % down * extent - 1, tile % across * extent - 1
            inside = top >= 0 and left >= 0 and top + window <= height and left + window <= width
            if inside and masked:
                for i in range(window):
                    for j in range(window):
                        inside &= changed[image, top + i, left + j]
            if inside:
                winograd.transform_inputs(x[image, top:, left:], extent, seen[:, t * inputs :])
            else:
                for i in range(window):
                    for j in range(window):
                        _gather(x, 0, masked, changed, rows, index, image, top + i, left + j, patch[i, j])
                winograd.transform_inputs(patch, extent, seen[:, t * inputs :])
        for place in range(places):
            here = seen[place][: size * inputs].reshape(size, inputs)
            there = sums[place][: size * wide].reshape(size, wide)
            for p in range(weight.shape[1]):
                panel = weight[place, p]
                for r in range(0, count, ROWS):
                    set_products(
                        here, panel, there, order, order, r, p * panel.shape[1],
                        FROM_ZERO, offsets, there, order, 0, False,
                    )  # fmt: skip
        for t in range(count):
            tile = tiles[begin + t]
            image = tile // (down * across)
            top, left = tile // across % down * extent, tile % across * extent
            inside = top + extent <= height and left + extent <= width and outputs == offsets.shape[0]
            into = out[image, top:, left:, channel:] if inside else corner
            winograd.transform_outputs(sums[:, t * wide :], extent, offsets, relu and not adds, into)
            for i in range(min(extent, height - top)):
                for j in range(min(extent, width - left)):
                    if not inside:
                        out[image, top + i, left + j, channel : channel + outputs] = corner[i, j, :outputs]
                    if adds:
                        row, column = source_rows[top + i], source_columns[left + j]
                        _add(addend[image, row, column], relu, out[image, top + i, left + j], channel)
                    if masked:
                        _mark(bits, after, after_index, marks, image, top + i, left + j, channel, outputs)
