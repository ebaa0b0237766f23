"""Sparse convolution and max pooling over a rulebook: gather, multiply, add.

A rulebook (`serve.ops.sparse_index`) lists for each kernel offset which input row meets which output
row; within one offset an output row occurs at most once, so additions never race and every device
gives the same sum order. The reference is mmcv 2.1.0 `csrc/pytorch/cuda/spconv_ops_cuda.cu`. Knows
nothing about coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.ops.checks import check_rank, check_same_device

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
