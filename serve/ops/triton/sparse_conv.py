"""Sparse convolution by a neighbour table as an implicit matrix product.

Plain torch writes the features of all neighbours, 27 times its input, and multiplies them by the weights. Here a
program has a tile of output voxels and channels, gathers the neighbours under one kernel offset at a time, and adds
their product in registers: no intermediate is written, and an offset without any neighbour in the tile costs a look at
the table.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import ceil_div, kernel, operator, power_of_two

__all__ = ["convolve_rows"]


@kernel
def _convolve(
    features,
    weight,
    bias,
    table,
    output,
    inputs: int,
    outputs: int,
    offsets: int,
    row_step: int,
    offset_step: int,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # pragma: no cover - compiled
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = rows < outputs, columns < OUT
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for offset in range(offsets):
        partner = tl.load(table + rows * row_step + offset * offset_step, mask=in_rows, other=inputs).to(
            tl.int64
        )
        there = (partner >= 0) & (partner < inputs)
        # One branch for the whole tile: voxels of a tile are near each other, and so are their gaps.
        if tl.max(there.to(tl.int32), axis=0) > 0:
            for first in range(0, IN, BLOCK_K):
                channels = first + tl.arange(0, BLOCK_K)
                in_k = channels < IN
                x = tl.load(
                    features + partner[:, None] * IN + channels[None, :],
                    mask=there[:, None] & in_k[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + (offset * IN + channels)[:, None] * OUT + columns[None, :],
                    mask=in_k[:, None] & in_columns[None, :],
                    other=0.0,
                )
                total = tl.dot(x, w, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN, as in torch
    place = output + rows[:, None] * OUT + columns[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def blocks_for(in_channels: int, out_channels: int, itemsize: int) -> dict[str, int]:
    """Choose blocks and warps by the channels alone, never by the number of voxels."""
    wide = min(power_of_two(out_channels), 64 if itemsize > 2 else 128)
    deep = min(power_of_two(in_channels), 16 if itemsize > 2 else 64)
    return {
        "BLOCK_M": 64,
        "BLOCK_N": wide,
        "BLOCK_K": deep,
        "num_warps": 8 if wide >= 128 else 4,
        "num_stages": 2 if itemsize > 2 else 3,
    }


@operator("convolve_rows(Tensor features, Tensor weight, Tensor? bias, Tensor table, bool relu) -> Tensor")
def convolve_rows(features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, relu: bool) -> Tensor:
    """Convolve by a neighbour table; sums are in float32 whatever the dtype.

    Args:
        features: (N, Cin) float32, float16 or bfloat16.
        weight: (K, Cin, Cout), same dtype.
        bias: (Cout,), same dtype.
        table: (M, at most K) int32 or int64 rows of `features`; any other number is no neighbour.
        relu: apply a ReLU.

    Returns:
        (M, Cout) in the dtype of `features`.
    """
    features, weight = features.contiguous(), weight.contiguous()
    outputs, offsets = table.shape
    in_channels, out_channels = weight.shape[1:]
    output = features.new_empty((outputs, out_channels))
    if output.numel() == 0:
        return output
    blocks = blocks_for(in_channels, out_channels, features.element_size())
    grid = (ceil_div(outputs, blocks["BLOCK_M"]), ceil_div(out_channels, blocks["BLOCK_N"]))
    # As torch's own matrix products: TF32 only if it was asked for.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    _convolve[grid](
        features, weight, features if bias is None else bias.contiguous(), table, output,
        len(features), outputs, offsets, table.stride(0), table.stride(1),
        # Constants, so that rows of many channels are read in wide words.
        IN=in_channels, OUT=out_channels, HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision, **blocks,
    )  # fmt: skip
    return output
