"""Sparse convolution and max pooling over a rulebook: gather, multiply, add.

A rulebook (`serve.ops.sparse_index`) lists for each kernel offset which input row meets which output
row; within one offset an output row occurs at most once, so additions never race and every device
gives the same sum order. In float32 on the CPU one compiled pass does it all, tile by tile of output
rows (docs/decisions/0005). The reference is mmcv 2.1.0 `csrc/pytorch/cuda/spconv_ops_cuda.cu`. Knows
nothing about coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_rank, check_same_device
from serve.ops.jit import jit, jit_contracted
from serve.ops.threads import in_parts

__all__ = [
    "fused_indice_conv_forward",
    "indice_conv_backward",
    "indice_conv_forward",
    "indice_maxpool_backward",
    "indice_maxpool_forward",
]


# Output rows done together: their sums stay in the innermost cache while the weights of one offset pass by.
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
    """Convolve.

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
    weight = _weight(features, filters, indice_pairs)
    if features.device.type == "cpu" and features.dtype == torch.float32:
        neighbours = _neighbours_cpu(indice_pairs, indice_pair_num, num_act_out, bool(inverse))
        if neighbours is not None:
            return _convolve_cpu(features, weight, neighbours)
    counts: list[int] = indice_pair_num.tolist()  # the one transfer
    centre = _identity_offset(counts, num_act_out, bool(subm))
    # Autocast would halve the products but not the sum they are added to; a compiled kernel is outside it too.
    with torch.autocast(features.device.type, enabled=False):
        if centre is None:
            output = features.new_zeros((num_act_out, weight.shape[2]))
        else:
            output = torch.mm(features, weight[centre])
        for k, source, target in _offsets(indice_pairs, counts, bool(inverse), centre):
            output.index_add_(0, target, torch.mm(features.index_select(0, source), weight[k]))
    return output


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
    """`indice_conv_forward` plus `bias` (Cout,)."""
    return (
        indice_conv_forward(features, filters, indice_pairs, indice_pair_num, num_act_out, inverse, subm)
        + bias
    )


def indice_conv_backward(
    features: Tensor,
    filters: Tensor,
    out_bp: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    inverse: int = 0,
    subm: int = 0,
) -> list[Tensor]:
    """Gradients of `indice_conv_forward` for `features` (N, Cin) and `filters`, given `out_bp` (M, Cout)."""
    weight = _weight(features, filters, indice_pairs)
    counts: list[int] = indice_pair_num.tolist()
    centre = _identity_offset(counts, out_bp.shape[0], bool(subm))
    grad_weight = torch.zeros_like(weight)
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
    """Maximum over the inputs of each output row; as in the reference it starts from zero."""
    check_rank("features", features, 2)
    output = features.new_zeros((num_act_out, features.shape[1]))
    for _, source, target in _offsets(indice_pairs, indice_pair_num.tolist(), False, None):
        rows = target.long()
        output[rows] = torch.maximum(output[rows], features.index_select(0, source))
    return output


def indice_maxpool_backward(
    features: Tensor, out_features: Tensor, out_bp: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor
) -> Tensor:
    """Every input equal to its output's maximum gets that output's gradient, as in the reference."""
    grad_features = torch.zeros_like(features)
    for _, source, target in _offsets(indice_pairs, indice_pair_num.tolist(), False, None):
        hit = features.index_select(0, source) == out_features.index_select(0, target)
        grad = out_bp.index_select(0, target)
        grad_features.index_add_(0, source, torch.where(hit, grad, torch.zeros_like(grad)))
    return grad_features


def _weight(features: Tensor, filters: Tensor, indice_pairs: Tensor) -> Tensor:
    check_rank("features", features, 2)
    check_rank("indice_pairs", indice_pairs, 3)
    check_same_device(features=features, filters=filters, indice_pairs=indice_pairs)
    if filters.shape[-2] != features.shape[1]:
        raise ValueError(
            f"filters {tuple(filters.shape)} take {filters.shape[-2]} channels, features have {features.shape[1]}"
        )
    if features.dtype != filters.dtype:
        raise TypeError(f"features are {features.dtype} but filters {filters.dtype}")
    weight = filters.reshape(-1, filters.shape[-2], filters.shape[-1])
    if weight.shape[0] != indice_pairs.shape[0]:
        raise ValueError(
            f"{weight.shape[0]} kernel offsets in filters but {indice_pairs.shape[0]} in indice_pairs"
        )
    return weight


def _neighbours_cpu(
    pairs: Tensor, pair_num: Tensor, num_act_out: int, inverse: bool
) -> npt.NDArray[np.int32] | None:
    """(M, K) input row of every output row and offset, -1 for none; None if an offset names an output twice.

    Raises:
        IndexError: a pair names an output row that is not there.
    """
    table = np.full((num_act_out, pairs.shape[0]), -1, dtype=np.int32)
    state = _fill_neighbours(as_numpy(pairs), as_numpy(pair_num), inverse, table)
    if state == _OUT_OF_RANGE:
        raise IndexError(f"indice_pairs name output rows beyond the {num_act_out} there are")
    return None if state == _NOT_UNIQUE else table


def _convolve_cpu(features: Tensor, weight: Tensor, neighbours: npt.NDArray[np.int32]) -> Tensor:
    if neighbours.size and int(neighbours.max()) >= features.shape[0]:
        raise IndexError(f"indice_pairs name input row {int(neighbours.max())} of {features.shape[0]}")
    rows, kernel = as_numpy(features), as_numpy(weight)
    output = np.zeros((neighbours.shape[0], weight.shape[2]), dtype=np.float32)

    def work(first: int, last: int) -> None:
        some = slice(first * _TILE, last * _TILE)
        _convolve_rows(rows, kernel, neighbours[some], output[some])

    # Shared out by whole tiles: which rows are done together does not depend on the number of threads.
    in_parts(work, -(-len(output) // _TILE))
    return torch.from_numpy(output)


_OUT_OF_RANGE, _NOT_UNIQUE = 1, 2


@jit
def _fill_neighbours(
    pairs: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int32],
    inverse: bool,
    table: npt.NDArray[np.int32],
) -> int:  # pragma: no cover - compiled
    source, target = (1, 0) if inverse else (0, 1)
    for k in range(pairs.shape[0]):
        for j in range(counts[k]):
            row = pairs[k, target, j]
            if row < 0 or row >= table.shape[0]:
                return _OUT_OF_RANGE
            if table[row, k] != -1:
                return _NOT_UNIQUE
            table[row, k] = pairs[k, source, j]
    return 0


@jit_contracted
def _convolve_rows(
    features: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    neighbours: npt.NDArray[np.int32],
    output: npt.NDArray[np.float32],
) -> None:  # pragma: no cover - compiled
    offsets, channels, _ = weight.shape
    rows = np.empty(_TILE, dtype=np.int64)
    sources = np.empty(_TILE, dtype=np.int64)
    spare = np.zeros((3, output.shape[1]), dtype=np.float32)
    for first in range(0, output.shape[0], _TILE):
        last = min(first + _TILE, output.shape[0])
        for k in range(offsets):
            n = 0
            for o in range(first, last):
                if neighbours[o, k] >= 0:
                    rows[n], sources[n] = o, neighbours[o, k]
                    n += 1
            for r in range(0, n, 4):
                # The last group is filled up with rows nobody reads, so that every row goes the same way:
                # which rows are its neighbours in a tile, and so in a batch, never changes its bits.
                p, out_p = features[sources[r]], output[rows[r]]
                q, out_q = (features[sources[r + 1]], output[rows[r + 1]]) if r + 1 < n else (p, spare[0])
                s, out_s = (features[sources[r + 2]], output[rows[r + 2]]) if r + 2 < n else (p, spare[1])
                t, out_t = (features[sources[r + 3]], output[rows[r + 3]]) if r + 3 < n else (p, spare[2])
                _add_four_rows(weight[k], channels, p, q, s, t, out_p, out_q, out_s, out_t)


Row = npt.NDArray[np.float32]


@jit_contracted
def _add_four_rows(
    w: npt.NDArray[np.float32],
    channels: int,
    p: Row,
    q: Row,
    s: Row,
    t: Row,
    out_p: Row,
    out_q: Row,
    out_s: Row,
    out_t: Row,
) -> None:  # pragma: no cover - compiled
    """Four rows and four input channels at a time: every weight loaded serves four products, every sum four."""
    by_four = channels - channels % 4
    for a in range(0, by_four, 4):
        p0, p1, p2, p3 = p[a], p[a + 1], p[a + 2], p[a + 3]
        q0, q1, q2, q3 = q[a], q[a + 1], q[a + 2], q[a + 3]
        s0, s1, s2, s3 = s[a], s[a + 1], s[a + 2], s[a + 3]
        t0, t1, t2, t3 = t[a], t[a + 1], t[a + 2], t[a + 3]
        w0, w1, w2, w3 = w[a], w[a + 1], w[a + 2], w[a + 3]
        for c in range(w.shape[1]):
            b0, b1, b2, b3 = w0[c], w1[c], w2[c], w3[c]
            out_p[c] += p0 * b0 + p1 * b1 + p2 * b2 + p3 * b3
            out_q[c] += q0 * b0 + q1 * b1 + q2 * b2 + q3 * b3
            out_s[c] += s0 * b0 + s1 * b1 + s2 * b2 + s3 * b3
            out_t[c] += t0 * b0 + t1 * b1 + t2 * b2 + t3 * b3
    for a in range(by_four, channels):
        for c in range(w.shape[1]):
            out_p[c] += p[a] * w[a, c]
            out_q[c] += q[a] * w[a, c]
            out_s[c] += s[a] * w[a, c]
            out_t[c] += t[a] * w[a, c]


def _identity_offset(counts: list[int], num_act_out: int, subm: bool) -> int | None:
    """The offset of a submanifold rulebook that maps every row to itself, if there is one.

    It is the middle one of an odd kernel without dilation; only then every output row has a partner there
    (a shifted finite set never covers itself), so the count tells.
    """
    centre = len(counts) // 2
    return centre if subm and counts[centre] == num_act_out else None


def _offsets(
    pairs: Tensor, counts: list[int], inverse: bool, skip: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(offset, source rows, target rows) of each offset that has pairs."""
    for k, count in enumerate(counts):
        if count > 0 and k != skip:
            yield k, pairs[k, int(inverse), :count], pairs[k, int(not inverse), :count]
