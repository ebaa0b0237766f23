"""Convolutions on a CPU that compute only the cells that differ from a known background.

A bird's-eye-view map holds a few cells that points reach, and an answer to "no points" everywhere else. That answer,
the background of a layer, depends on the map's size alone. Where all inputs of an output equal the background of the
input, bit for bit, the output is the background of the output, so it need not be computed. (Computing by tiles is from
M. Ren et al., "SBNet: Sparse Blocks Network for Fast Inference", CVPR 2018; comparing bits makes it exact.) Cells that
are computed have the same bits for any set of computed cells, any batch and any number of threads.

Maps are (B, H, W, C) float32 arrays, C-contiguous. A map of a layer inside of a sequence is valid only where
its mask is true; elsewhere the background is read in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.cpu import cell_masks, masked_loops, winograd
from serve.ops.cpu.gemm import CHANNELS, LANES, pack_panels
from serve.ops.cpu.threads import parallel_for

__all__ = [
    "Background",
    "ConvLayer",
    "add_upsampled",
    "compress",
    "convolve",
    "fill",
    "find_changed",
    "inputs_of",
    "pack_layer",
]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Cells that justify waking up a thread.
_MIN_CELLS = 512


@dataclass(frozen=True)
class Background:
    """Map without points, (H, W, C), as its distinct cells: most are equal but for those near the border.

    Attributes:
        rows: (U, C) float32, distinct cells.
        index: (H, W) int32, row of each cell.
    """

    rows: F32
    index: I32

    def expand(self) -> F32:
        """Return the map, (H, W, C)."""
        return self.rows[self.index]


@dataclass(frozen=True)
class ConvLayer:
    """Packed weights of a convolution with fused bias and ReLU.

    Attributes:
        kind: ``winograd`` (3 x 3, stride 1, padding 1); ``direct``; ``narrow`` (few outputs: the products of an input
            cell with all places of the kernel fit a panel); ``cellwise``, of which an input cell alone determines
            its outputs: 1 x 1 without padding, or transposed with a kernel of its stride.
        weight: panels of `serve.ops.cpu.gemm.pack_panels` by place of the kernel, (K, P, Cin, C); all places in one
            panel, (1, 1, Cin, C), if narrow.
        bias: (Cout,) float32.
        outputs: Cout.
        kernel: extent of the kernel, cells.
        stride: stride, cells.
        padding: padding with zeros, cells.
        relu: whether a ReLU follows.
        tile: extent of a tile of outputs if winograd, else 0.
        origin: first channel of the input that is read; 0 unless narrow or direct.
    """

    kind: str
    weight: F32
    bias: F32
    outputs: int
    kernel: int
    stride: int
    padding: int
    relu: bool
    tile: int = 0
    origin: int = 0

    @property
    def step(self) -> int:
        """Cells of the input from one of which outputs depend to the next, if cellwise."""
        return self.stride if self.kernel == 1 else 1

    @property
    def growth(self) -> int:
        """Extent in the output of such a cell of the input, if cellwise."""
        return self.kernel

    def out_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the extents of the output for an input of `height` x `width` cells."""
        if self.kind == "cellwise" and self.kernel > 1:
            return height * self.kernel, width * self.kernel
        grown = 2 * self.padding - self.kernel
        return (height + grown) // self.stride + 1, (width + grown) // self.stride + 1


def pack_layer(
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: int,
    relu: bool,
    transposed: bool = False,
    tile: int = 4,
) -> ConvLayer:
    """Pack a convolution with a square kernel, one group and no dilation.

    Args:
        weight: (Cout, Cin, k, k) float32, or (Cin, Cout, k, k) if `transposed`.
        bias: (Cout,) or None.
        stride: stride of both axes.
        padding: padding of both axes.
        relu: whether to fuse a ReLU.
        transposed: whether it is a transposed convolution, whose stride must be k and whose padding 0.
        tile: extent of Winograd's tiles, 4 or 2. Larger ones take fewer products; with a mask, a changed cell reaches
            more cells of them, if only by a rounding.

    Raises:
        ValueError: the kernel is not square, or a transposed convolution overlaps itself.
    """
    weight = weight.detach().float().cpu()
    kernel = int(weight.shape[-1])
    if weight.dim() != 4 or weight.shape[2] != kernel:
        raise ValueError(f"weight must be (Cout, Cin, k, k), got {tuple(weight.shape)}")
    if transposed and (stride != kernel or padding):
        raise ValueError(f"a transposed kernel of {kernel} cells must have stride {kernel} and no padding")
    outputs = int(weight.shape[1] if transposed else weight.shape[0])
    offset = np.zeros(outputs, np.float32) if bias is None else bias.detach().float().cpu().numpy().copy()
    inputs = int(weight.shape[0] if transposed else weight.shape[1])
    fits = not inputs % LANES and 2 * outputs >= CHANNELS
    if not transposed and (kernel, stride, padding) == (3, 1, 1) and fits:
        kind, packed = "winograd", winograd.transform_weight(weight, tile)
    elif not transposed and kernel > 1 and stride == 1 and kernel * kernel * outputs <= CHANNELS:
        kind = "narrow"
        packed = pack_panels(weight.permute(1, 2, 3, 0).reshape(1, inputs, kernel * kernel * outputs))
    else:
        cellwise = transposed or (kernel, padding) == (1, 0)
        kind = "cellwise" if cellwise else "direct"
        order = (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
        packed = pack_panels(weight.permute(order).reshape(kernel * kernel, inputs, outputs))
    return ConvLayer(
        kind,
        packed.numpy(),
        offset,
        outputs,
        kernel,
        stride,
        padding,
        relu,
        tile if kind == "winograd" else 0,
    )


def compress(cells: F32) -> Background:
    """Compress a map (H, W, C) to its distinct cells."""
    height, width, channels = cells.shape
    flat = np.ascontiguousarray(cells).reshape(height * width, channels)
    keys = flat.view(np.dtype((np.void, 4 * channels))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return Background(flat[first].copy(), inverse.reshape(height, width).astype(np.int32))


def find_changed(x: F32, background: Background) -> Mask:
    """Return the mask (B, H, W) of the cells whose bits are not those of the background."""
    changed = np.zeros(x.shape[:3], np.bool_)
    rows, bits = background.rows.view(np.int32), x.view(np.int32)

    def work(first: int, last: int) -> None:
        cell_masks.compare_cells(bits, rows, background.index, changed, first, last)

    parallel_for(work, x.shape[0] * x.shape[1])
    return changed


def fill(out: F32, changed: Mask, background: Background, channel: int, count: int) -> None:
    """Write the background's `count` channels from `channel` on into the cells of `out` that are not `changed`."""

    def work(first: int, last: int) -> None:
        cell_masks.fill_cells(out, changed, background.rows, background.index, channel, count, first, last)

    parallel_for(work, out.shape[0] * out.shape[1])


def convolve(
    x: F32,
    layer: ConvLayer,
    out: F32,
    channel: int = 0,
    *,
    changed: Mask | None = None,
    before: Background | None = None,
    after: Background | None = None,
    addend: F32 | None = None,
    wanted: Mask | None = None,
) -> Mask | None:
    """Convolve `x` into channels of `out`; with a mask, only where an input has changed.

    Args:
        x: (B, H, W, Cin).
        layer: weights.
        out: (B, H', W', >= channel + Cout), written.
        channel: first channel to write.
        changed: (B, H, W), cells of `x` that differ from `before`; None to compute all cells.
        before: background of `x`; needed with `changed`.
        after: background of `out`; needed with `changed`.
        addend: (B, H'', W'', Cout), added before the ReLU; resampled to the nearest cell, as
            `torch.nn.functional.interpolate` does it, if of another size. Not with `changed`, of whose backgrounds it
            is no part, nor for a ``narrow`` layer.
        wanted: (B, H', W'), cells of `out` to compute; only the cells of `x` that `inputs_of` names are read.

    Returns:
        Mask (B, H', W') of the cells that differ from `after` in these channels, of the computed ones; `out` is written
        there (and at some other cells), and not elsewhere. None without `changed`.
    """
    batch, height, width, _ = x.shape
    masked = changed is not None
    if addend is not None and (masked or layer.kind == "narrow"):
        raise ValueError(f"an addend is not supported with a mask, nor by a layer of kind {layer.kind}")
    if changed is None:
        changed = _NO_MASK
    rows, index = (before.rows, before.index) if masked and before else (_NO_ROWS, _NO_INDEX)
    after_rows, after_index = (after.rows, after.index) if masked and after else (_NO_ROWS, _NO_INDEX)
    marks = np.zeros(out.shape[:3], np.bool_) if masked else _NO_MASK
    out_bits, after_bits = out.view(np.int32), after_rows.view(np.int32)
    rows_out, columns_out, size, window = _tiling(layer, height, width)
    if masked:
        tiles = cell_masks.active_tiles(changed, rows_out, columns_out, *window)
    else:
        tiles = np.arange(batch * rows_out * columns_out, dtype=np.int64)
    if wanted is not None:
        tiles = np.intersect1d(tiles, _tiles_with(layer, wanted, rows_out, columns_out), assume_unique=True)

    if layer.kind == "narrow":
        products = _narrow_products(x, layer, tiles, changed, before if masked else None, out.shape[1:3])

        def add(first: int, last: int) -> None:
            masked_loops.add_narrow(
                products, tiles, layer.bias, layer.relu, layer.kernel, layer.padding, height, width, out, channel,
                masked, out_bits, marks, after_bits, after_index, first, last,
            )  # fmt: skip

        parallel_for(add, len(tiles), min_per_thread=_MIN_CELLS)
        return marks if masked else None

    if addend is None:
        added: Any = (False, _NO_CELLS, _NO_SOURCES, _NO_SOURCES)
    else:
        added = (True, addend, *(_nearest(out.shape[axis], addend.shape[axis]) for axis in (1, 2)))

    def work(first: int, last: int) -> None:
        weights = (tiles, layer.weight, layer.bias, layer.relu, out, channel)
        result = (*added, out_bits, marks, after_bits, after_index, first, last)
        arguments: Any
        if layer.kind == "cellwise":  # the cells of its tiles have changed, so none is of the background
            arguments = (x, *weights, layer.step, layer.growth, masked, *result)
            masked_loops.convolve_cellwise(*arguments)
        elif layer.kind == "winograd":
            arguments = (x, masked, changed, rows, index, *weights, layer.tile, *result)
            masked_loops.convolve_winograd(*arguments)
        else:
            geometry = (layer.kernel, layer.stride, layer.padding, layer.origin)
            arguments = (x, masked, changed, rows, index, *weights, *geometry, *result)
            masked_loops.convolve_directly(*arguments)

    parallel_for(work, len(tiles), min_per_thread=max(1, _MIN_CELLS // size))
    return marks if masked else None


def inputs_of(layer: ConvLayer, wanted: Mask, height: int, width: int) -> Mask:
    """Return the cells (B, H, W) of an input of `height` x `width` that `convolve` reads to compute `wanted` ones."""
    rows_out, columns_out, _, window = _tiling(layer, height, width)
    cells = np.zeros((len(wanted), height, width), np.bool_)
    tiles = _tiles_with(layer, wanted, rows_out, columns_out)
    cell_masks.mark_windows(tiles, rows_out, columns_out, *window, cells)
    return cells


def _tiles_with(layer: ConvLayer, wanted: Mask, rows_out: int, columns_out: int) -> I64:
    """Return the numbers of the tiles that hold a wanted cell of the output, ascending."""
    extent = layer.growth if layer.kind == "cellwise" else layer.tile or 1
    return cell_masks.active_tiles(wanted, rows_out, columns_out, extent, 0, extent)


def add_upsampled(
    fine: F32,
    coarse: F32,
    changed: tuple[Mask, Mask] | None = None,
    before: tuple[Background, Background] | None = None,
    after: Background | None = None,
) -> Mask | None:
    """Add `coarse`, upsampled to the nearest cell as `torch.nn.functional.interpolate` does it, to `fine` in place.

    Args:
        fine: (B, H, W, C), written.
        coarse: (B, H', W', C).
        changed: cells of `fine` and `coarse` that differ from their backgrounds; None to compute all cells.
        before: backgrounds of `fine` and `coarse`; needed with `changed`.
        after: background of the sum; needed with `changed`.

    Returns:
        Mask (B, H, W) of the cells of the sum that differ from `after`; `fine` is valid there. None without `changed`.
    """
    masked = changed is not None and before is not None and after is not None
    masks = changed if masked and changed else (_NO_MASK, _NO_MASK)
    (rows, index), (coarse_rows, coarse_index) = (
        [(one.rows, one.index) for one in before] if masked and before else [(_NO_ROWS, _NO_INDEX)] * 2
    )
    after_rows, after_index = (after.rows, after.index) if masked and after else (_NO_ROWS, _NO_INDEX)
    marks = np.zeros(fine.shape[:3], np.bool_) if masked else _NO_MASK
    sources_y, sources_x = (_nearest(fine.shape[axis], coarse.shape[axis]) for axis in (1, 2))

    def work(first: int, last: int) -> None:
        masked_loops.add_nearest(
            fine, masked, masks[0], rows, index, coarse, masks[1], coarse_rows, coarse_index, sources_y, sources_x,
            fine.view(np.int32), marks, after_rows.view(np.int32), after_index, first, last,
        )  # fmt: skip

    parallel_for(work, fine.shape[0] * fine.shape[1])
    return marks if masked else None


@lru_cache(maxsize=256)
def _nearest(count: int, sources: int) -> I64:
    """Return which of `sources` cells each of `count` cells along an axis is closest to, by torch's own rounding."""
    cells = torch.arange(sources, dtype=torch.float32)[None, None]
    return functional.interpolate(cells, size=count, mode="nearest")[0, 0].numpy().astype(np.int64)


def _narrow_products(
    x: F32, layer: ConvLayer, tiles: I64, changed: Mask, before: Background | None, out_size: tuple[int, ...]
) -> F32:
    """Multiply every input cell in a window of `tiles` with all places of the kernel: (B, H, W, places x Cout)."""
    batch, height, width, _ = x.shape
    masked = before is not None
    rows, index = (before.rows, before.index) if before else (_NO_ROWS, _NO_INDEX)
    if masked:
        wanted = np.zeros((batch, *out_size), np.bool_)
        wanted.ravel()[tiles] = True
        sources = cell_masks.active_tiles(
            wanted, height, width, 1, layer.padding - layer.kernel + 1, layer.kernel
        )
    else:
        sources = np.arange(batch * height * width, dtype=np.int64)
    products = np.empty((batch, height, width, layer.weight.shape[3]), np.float32)

    def work(first: int, last: int) -> None:
        masked_loops.multiply_cells(
            x, layer.origin, masked, changed, rows, index, sources, layer.weight, products, first, last
        )

    parallel_for(work, len(sources), min_per_thread=_MIN_CELLS)
    return products


_NO_CELLS: F32 = np.zeros((1, 1, 1, 1), np.float32)
_NO_SOURCES: I64 = np.zeros(1, np.int64)
_NO_MASK: Mask = np.zeros((1, 1, 1), np.bool_)
_NO_ROWS: F32 = np.zeros((1, 1), np.float32)
_NO_INDEX: I32 = np.zeros((1, 1), np.int32)


def _tiling(layer: ConvLayer, height: int, width: int) -> tuple[int, int, int, tuple[int, int, int]]:
    """Return rows and columns of tiles, cells per tile, and (step, offset, extent) of a tile's window of inputs."""
    if layer.kind == "cellwise":
        step = layer.step
        return -(-height // step), -(-width // step), layer.growth**2, (step, 0, 1)
    rows, columns = layer.out_shape(height, width)
    if layer.kind == "winograd":
        tile = layer.tile
        return -(-rows // tile), -(-columns // tile), tile * tile, (tile, -1, tile + 2)
    return rows, columns, 1, (layer.stride, -layer.padding, layer.kernel)
