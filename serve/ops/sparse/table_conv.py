"""Sparse convolution over a neighbour table: the compiled float32 pass on the CPU.

It goes by tiles of output rows whose sums stay in the cache (docs/decisions/0005). The table has the input row of each
kernel offset and output row (`serve.ops.sparse.neighbour_table`, `serve.ops.sparse.strided_table`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_shape, check_tensor
from serve.ops.cpu.gemm import (
    HAS_AVX512,
    LANES,
    ROWS,
    add_products,
    aligned_zeros,
    compress_neighbours,
    pack_panels,
)
from serve.ops.cpu.jit import jit, jit_contracted
from serve.ops.cpu.threads import parallel_for

__all__ = ["PackedFilters", "convolve_table", "pack_filters"]

# Output rows per tile: their sums stay in the L1 or L2 cache for the weights of one offset.
_TILE = 256
_NO_ADDEND = np.zeros((1, 1), np.float32)


@dataclass(frozen=True)
class PackedFilters:
    """Weights and bias in the layout of the compiled convolution.

    Attributes:
        panels: (K, P, Cin, width of a panel) float32, see `serve.ops.cpu.gemm.pack_panels`.
        start: (P * width of a panel,) float32: the bias, padded with zeros.
        channels: Cout.
    """

    panels: npt.NDArray[np.float32]
    start: npt.NDArray[np.float32]
    channels: int


def pack_filters(weight: Tensor, bias: Tensor | None) -> PackedFilters:
    """Pack `weight` (K, Cin, Cout) and `bias` (Cout,), float32 on the CPU, once for many calls."""
    kernel = as_numpy(pack_panels(weight))
    start = np.zeros(kernel.shape[1] * kernel.shape[3], dtype=np.float32)
    if bias is not None:
        start[: weight.shape[2]] = as_numpy(bias)
    return PackedFilters(kernel, start, weight.shape[2])


def convolve_table(
    features: Tensor,
    kernel: PackedFilters,
    neighbours: npt.NDArray[np.int32],
    *,
    relu: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """Convolve `features` over a neighbour table on the CPU.

    Args:
        features: (N, Cin) float32 features of the input voxels.
        kernel: weights and bias.
        neighbours: (K, M) int32: input row of each offset and output row, -1 for none. Values are not checked.
        relu: apply a ReLU.
        addend: (M, Cout) float32, added before the ReLU.

    Returns:
        (M, Cout).
    """
    check_shape("features", features, None, kernel.panels.shape[2])
    if addend is not None:
        check_tensor(("features", features), "addend", addend, neighbours.shape[1], kernel.channels)
    added = _NO_ADDEND if addend is None else as_numpy(addend)
    if len(neighbours) > len(kernel.panels):
        raise ValueError(
            f"neighbours has {len(neighbours)} kernel offsets, the weights have {len(kernel.panels)}"
        )
    rows = as_numpy(features)
    output = np.empty((neighbours.shape[1], kernel.channels), dtype=np.float32)

    def work(first: int, last: int) -> None:
        _convolve_tiles(
            rows,
            kernel.panels,
            kernel.start,
            neighbours,
            addend is not None,
            added,
            relu,
            output,
            first,
            last,
        )

    # Threads get whole tiles, so the grouping of rows does not depend on the number of threads.
    parallel_for(work, -(-len(output) // _TILE))
    return torch.from_numpy(output)


@jit_contracted
def _convolve_tiles(
    features: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    start: npt.NDArray[np.float32],
    neighbours: npt.NDArray[np.int32],
    adds: bool,
    addend: npt.NDArray[np.float32],
    relu: bool,
    output: npt.NDArray[np.float32],
    first_tile: int,
    last_tile: int,
) -> None:  # pragma: no cover - compiled
    """Compute the output rows of some tiles; `weight` is in panels, `start` as wide as those together."""
    # Unused rows behind the sums of a tile pad the groups of rows. So all rows take the same code path, and the
    # other rows of a tile, hence of a batch, never change a row's bits.
    sums = aligned_zeros((_TILE + ROWS) * start.shape[0]).reshape(_TILE + ROWS, start.shape[0])
    targets = np.empty(_TILE + LANES, dtype=np.int32)
    sources = np.empty(_TILE + LANES, dtype=np.int32)
    for tile in range(first_tile, last_tile):
        begin = tile * _TILE
        rows = min(_TILE, output.shape[0] - begin)
        for o in range(rows):
            for c in range(start.shape[0]):
                sums[o, c] = start[c]
        for k in range(neighbours.shape[0]):
            n = _pack(neighbours[k, begin : begin + rows], sources, targets)
            if n == 0:
                continue
            for extra in range(-n % ROWS):
                targets[n + extra] = _TILE + extra
                sources[n + extra] = sources[0]
            for p in range(weight.shape[1]):
                panel = weight[k, p]
                for r in range(0, n, ROWS):
                    add_products(features, panel, sums, sources, targets, r, p * panel.shape[1])
        for o in range(rows):
            for c in range(output.shape[1]):
                total = sums[o, c] + addend[begin + o, c] if adds else sums[o, c]
                output[begin + o, c] = np.float32(0) if relu and total < 0 else total


@jit
def _pack(
    partners: npt.NDArray[np.int32], sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
) -> int:  # pragma: no cover - compiled
    """List the rows of a tile with a neighbour in `targets` and the neighbours in `sources`; return their number."""
    n, done = 0, 0
    if HAS_AVX512:
        while done + LANES <= partners.shape[0]:
            n = compress_neighbours(partners, sources, targets, n, done)
            done += LANES
    for o in range(done, partners.shape[0]):
        # Always write, count only neighbours: no branch to mispredict.
        targets[n], sources[n] = o, partners[o]
        n += partners[o] >= 0
    return n
