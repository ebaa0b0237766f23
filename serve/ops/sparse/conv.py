"""Sparse convolution and max pooling over a rulebook: gather, multiply, add.

A rulebook (`serve.ops.sparse.rulebook`) lists the pairs of input and output rows of each kernel offset; within one
offset an output row occurs at most once, so additions never race and the order of sums is the same on any device. In
float32 on the CPU one compiled pass does everything (`serve.ops.sparse.table_conv`). The reference is mmcv 2.1.0
`csrc/pytorch/cuda/spconv_ops_cuda.cu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.ops.checks import check_rulebook, check_rulebook_rows, check_same_device, check_tensor, uses_numba
from serve.ops.sparse.neighbour_table import to_neighbour_table
from serve.ops.sparse.table_conv import convolve_table, pack_filters

__all__ = [
    "fused_indice_conv_forward",
    "indice_conv_backward",
    "indice_conv_forward",
    "indice_maxpool_backward",
    "indice_maxpool_forward",
]


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
