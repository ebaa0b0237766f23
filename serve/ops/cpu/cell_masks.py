"""Compiled loops over masks of cells: which tiles they reach, what they read, where a map differs from a background.

Maps are (B, H, W, C) float32, masks (B, H, W).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["active_tiles", "compare_cells", "fill_cells", "mark_windows"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@jit
def active_tiles(
    changed: Mask, rows: int, columns: int, step: int, offset: int, extent: int
) -> I64:  # pragma: no cover - compiled
    """Return the numbers of the tiles with a changed cell in their window of inputs, ascending."""
    batch, height, width = changed.shape
    tiles = np.empty(batch * rows * columns, np.int64)
    # The rows of a window are merged for all columns, by vectors; the places beyond the border stay false.
    room = max(0, -offset)
    merged = np.zeros(room + max(width, (columns - 1) * step + offset + extent), np.bool_)
    count = 0
    for image in range(batch):
        for i in range(rows):
            top, bottom = max(0, i * step + offset), min(height, i * step + offset + extent)
            merged[room : room + width] = False
            for y in range(top, bottom):
                for x in range(width):
                    merged[room + x] |= changed[image, y, x]
            for j in range(columns):
                found = False
                for x in range(extent):
                    found |= merged[room + offset + j * step + x]
                # Always write, count only what is found: no branch to mispredict.
                tiles[count] = (image * rows + i) * columns + j
                count += found
    return tiles[:count]


@jit
def mark_windows(
    tiles: I64, rows: int, columns: int, step: int, offset: int, extent: int, marks: Mask
) -> None:  # pragma: no cover - compiled
    """Mark the cells in the windows of inputs of `tiles`."""
    _, height, width = marks.shape
    for t in range(tiles.shape[0]):
        image, i, j = tiles[t] // (rows * columns), tiles[t] // columns % rows, tiles[t] % columns
        for y in range(max(0, i * step + offset), min(height, i * step + offset + extent)):
            for x in range(max(0, j * step + offset), min(width, j * step + offset + extent)):
                marks[image, y, x] = True


@jit
def compare_cells(
    bits: I32, rows: I32, index: I32, changed: Mask, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Mark the cells of rows `first` to `last` whose bits differ from the background's."""
    _, height, width, channels = bits.shape
    for strip in range(first, last):
        image, y = strip // height, strip % height
        for x in range(width):
            row = index[y, x]
            found = np.int32(0)
            for c in range(channels):
                found |= bits[image, y, x, c] ^ rows[row, c]
            changed[image, y, x] = found != 0


@jit
def fill_cells(
    out: F32, changed: Mask, rows: F32, index: I32, channel: int, count: int, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Write the background's channels into the cells of rows `first` to `last` that have not changed."""
    _, height, width, _ = out.shape
    for strip in range(first, last):
        image, y = strip // height, strip % height
        for x in range(width):
            if not changed[image, y, x]:
                row = index[y, x]
                for c in range(channel, channel + count):
                    out[image, y, x, c] = rows[row, c]
