"""Sparse convolution and max pooling over a rulebook: gather, multiply, add.

A rulebook (`serve.ops.sparse.rulebook`) lists the pairs of input and output rows of each kernel offset; within one
offset an output row occurs at most once, so additions never race and the order of sums is the same on any device. In
float32 on the CPU one compiled pass does everything, by tiles of output rows (docs/decisions/0005). The reference is
mmcv 2.1.0 `csrc/pytorch/cuda/spconv_ops_cuda.cu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_rulebook,
    check_rulebook_rows,
    check_same_device,
    check_shape,
    check_tensor,
    uses_numba,
)
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

__all__ = [
    "fused_indice_conv_forward",
    "indice_conv_backward",
    "indice_conv_forward",
    "indice_maxpool_backward",
    "indice_maxpool_forward",
]


# Output rows per tile: their sums stay in the L1 or L2 cache for the weights of one offset.
_TILE = 256


def indice_conv_forward(
    features: Tensor,
    filters: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_act_out: int,
    inverse: int = 0,
    subm: int = 0,
) -> Tensor:
    """Convolve sparse features over a rulebook.

    Args:
        features: (N, Cin) float.
        filters: (k1, …, kD, Cin, Cout), same dtype and device.
        indice_pairs: (K, 2, >=N) int32.
        indice_pair_num: (K,) int32.
        num_act_out: output rows M.
        inverse: 1 swaps input and output of the rulebook.
        subm: 1 for a submanifold rulebook (its centre offset is the identity).

    Returns:
        (M, Cout) features.
    """
    return convolve(features, filters, None, indice_pairs, indice_pair_num, num_act_out, inverse, subm)


def fused_indice_conv_forward(
    features: Tensor,
    filters: Tensor,
    bias: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_act_out: int,
    inverse: int = 0,
    subm: int = 0,
) -> Tensor:
    """Run `indice_conv_forward` and add `bias` (Cout,)."""
    return convolve(features, filters, bias, indice_pairs, indice_pair_num, num_act_out, inverse, subm)


def convolve(
    features: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_act_out: int,
    inverse: int = 0,
    subm: int = 0,
    relu: bool = False,
) -> Tensor:
    """Run `indice_conv_forward`, add `bias` (Cout,) if given, and apply a ReLU if `relu`."""
    check_rulebook(features, indice_pairs, indice_pair_num, num_act_out, subm)
    weight = _weight(features, filters, indice_pairs)
    if bias is not None:
        check_tensor(("features", features), "bias", bias, weight.shape[2])
    if uses_numba(features) and features.dtype == torch.float32:
        neighbours = to_neighbour_table(
            indice_pairs, indice_pair_num, features.shape[0], num_act_out, inverse=bool(inverse)
        )
        if neighbours is not None:
            return convolve_table(features, pack_filters(weight, bias), neighbours, relu=relu)
    check_rulebook_rows(indice_pairs, indice_pair_num, features.shape[0], num_act_out, bool(inverse))
    counts: list[int] = indice_pair_num.tolist()  # the only transfer
    centre = _identity_offset(counts, num_act_out, bool(subm))
    # Autocast would round the products but not their sum to half precision; compiled kernels are outside it too.
    with torch.autocast(features.device.type, enabled=False):
        if centre is None:
            output = features.new_zeros((num_act_out, weight.shape[2]))
        else:
            output = torch.mm(features, weight[centre])
        for k, source, target in _offsets(indice_pairs, counts, bool(inverse), centre):
            output.index_add_(0, target, torch.mm(features.index_select(0, source), weight[k]))
    if bias is not None:
        output += bias
    return output.relu_() if relu else output


def indice_conv_backward(
    features: Tensor,
    filters: Tensor,
    out_bp: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    inverse: int = 0,
    subm: int = 0,
) -> list[Tensor]:
    """Compute the gradients of `indice_conv_forward` by `features` and `filters`, given `out_bp` (M, Cout)."""
    check_rulebook(features, indice_pairs, indice_pair_num, out_bp.shape[0], subm)
    weight = _weight(features, filters, indice_pairs)
    check_tensor(("features", features), "out_bp", out_bp, None, weight.shape[2])
    if out_bp.dtype != features.dtype:
        raise TypeError(f"out_bp must be {features.dtype} as features are, got {out_bp.dtype}")
    check_rulebook_rows(indice_pairs, indice_pair_num, features.shape[0], out_bp.shape[0], bool(inverse))
    counts: list[int] = indice_pair_num.tolist()
    centre = _identity_offset(counts, out_bp.shape[0], bool(subm))
    # All of the filters: those past the end of a shorter rulebook have no effect.
    grad_weight = torch.zeros(filters.shape, dtype=filters.dtype, device=filters.device)
    grad_weight = grad_weight.view(-1, *weight.shape[1:])
    out_bp = out_bp.contiguous()
    if centre is None:
        grad_features = torch.zeros_like(features)
    else:
        grad_features = torch.mm(out_bp, weight[centre].t())
        torch.mm(features.t(), out_bp, out=grad_weight[centre])
    for k, source, target in _offsets(indice_pairs, counts, bool(inverse), centre):
        grad = out_bp.index_select(0, target)
        torch.mm(features.index_select(0, source).t(), grad, out=grad_weight[k])
        grad_features.index_add_(0, source, torch.mm(grad, weight[k].t()))
    return [grad_features, grad_weight.view_as(filters)]


def indice_maxpool_forward(
    features: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor, num_act_out: int
) -> Tensor:
    """Compute the maximum over the inputs of each output row; as in the reference it starts from zero."""
    check_rulebook(features, indice_pairs, indice_pair_num, num_act_out)
    check_rulebook_rows(indice_pairs, indice_pair_num, features.shape[0], num_act_out)
    output = features.new_zeros((num_act_out, features.shape[1]))
    for _, source, target in _offsets(indice_pairs, indice_pair_num.tolist(), False, None):
        rows = target.long()
        best, value = output[rows], features.index_select(0, source)
        # NaN is above nothing.
        output[rows] = torch.where(value > best, value, best)
    return output


def indice_maxpool_backward(
    features: Tensor, out_features: Tensor, out_bp: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor
) -> Tensor:
    """Pass each output's gradient to every input equal to its maximum, as in the reference."""
    check_rulebook(features, indice_pairs, indice_pair_num, out_features.shape[0])
    for name, tensor in (("out_features", out_features), ("out_bp", out_bp)):
        check_tensor(("features", features), name, tensor, out_features.shape[0], features.shape[1])
        if tensor.dtype != features.dtype:
            raise TypeError(f"{name} must be {features.dtype} as features are, got {tensor.dtype}")
    check_rulebook_rows(indice_pairs, indice_pair_num, features.shape[0], out_features.shape[0])
    grad_features = torch.zeros_like(features)
    for _, source, target in _offsets(indice_pairs, indice_pair_num.tolist(), False, None):
        hit = features.index_select(0, source) == out_features.index_select(0, target)
        grad = out_bp.index_select(0, target)
        grad_features.index_add_(0, source, torch.where(hit, grad, torch.zeros_like(grad)))
    return grad_features


def _weight(features: Tensor, filters: Tensor, indice_pairs: Tensor) -> Tensor:
    check_same_device(features=features, filters=filters)
    if filters.dim() < 3 or 0 in filters.shape:
        raise ValueError(
            f"filters must be (k1, …, kD, Cin, Cout), none of them 0, got {tuple(filters.shape)}"
        )
    if filters.shape[-2] != features.shape[1]:
        raise ValueError(
            f"filters {tuple(filters.shape)} take {filters.shape[-2]} channels, features have {features.shape[1]}"
        )
    if features.dtype != filters.dtype:
        raise TypeError(f"features are {features.dtype} but filters {filters.dtype}")
    weight = filters.reshape(-1, filters.shape[-2], filters.shape[-1])
    if weight.shape[0] < indice_pairs.shape[0]:
        raise ValueError(
            f"{weight.shape[0]} kernel offsets in filters but {indice_pairs.shape[0]} in indice_pairs"
        )
    # In Cylinder3D a 3 x 3 x 3 layer shares the rulebook of a 1 x 3 x 3 one by its key; the reference loops over
    # the rulebook with the first filters, and published weights were trained that way.
    return weight[: indice_pairs.shape[0]]


def to_neighbour_table(
    pairs: Tensor, pair_num: Tensor, num_act_in: int, num_act_out: int, *, inverse: bool
) -> npt.NDArray[np.int32] | None:
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


_OUT_OF_RANGE, _NOT_UNIQUE = 1, 2
_NO_ADDEND = np.zeros((1, 1), np.float32)


@jit
def _fill_neighbours(
    pairs: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int32],
    inputs: int,
    inverse: bool,
    table: npt.NDArray[np.int32],
    states: npt.NDArray[np.int32],
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


def _identity_offset(counts: list[int], num_act_out: int, subm: bool) -> int | None:
    """Find the offset of a submanifold rulebook that maps every row to itself, if there is one.

    It is the middle one of an odd kernel. Only there each output row has a neighbour (a shifted finite set never covers
    itself), so the count identifies it.
    """
    centre = len(counts) // 2
    return centre if subm and counts[centre] == num_act_out else None


def _offsets(
    pairs: Tensor, counts: list[int], inverse: bool, skip: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (offset, source rows, target rows) of each offset with pairs."""
    for k, count in enumerate(counts):
        if count > 0 and k != skip:
            yield k, pairs[k, int(inverse), :count], pairs[k, int(not inverse), :count]
