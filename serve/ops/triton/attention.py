"""Multi-scale deformable attention: all samples of a query and head in registers, in one launch.

Plain torch makes a table of all samples and their weights before it sums. The sizes of levels are read on the device,
so nothing is waited for.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import ceil_div, kernel, operator, power_of_two

__all__ = ["attend_samples"]

BLOCK_QUERIES = 32


@kernel
def _corner(
    value, base, row, column, height, width, start, keys, step,
    inside, in_channels,
):  # fmt: skip  # pragma: no cover - compiled
    """Load the channels of pixels (Q, C), zero outside of the level."""
    key = start + row * width + column
    there = (
        inside & (row >= 0) & (row < height) & (column >= 0) & (column < width) & (key >= 0) & (key < keys)
    )
    found = tl.load(
        value + key[:, None] * step + base[None, :], mask=there[:, None] & in_channels[None, :], other=0.0
    )
    return found.to(tl.float32)


@kernel
def _attend(
    value,
    shapes,
    starts,
    places,
    shares,
    output,
    queries: int,
    keys: int,
    levels: int,
    points: int,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # pragma: no cover - compiled
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_queries = query < queries
    channel = tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    step: tl.constexpr = HEADS * CHANNELS
    base = image * keys * step + head * CHANNELS + channel
    row_of_query = (image * queries + query) * HEADS + head
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    for level in range(levels):
        height = tl.load(shapes + 2 * level).to(tl.int64)
        width = tl.load(shapes + 2 * level + 1).to(tl.int64)
        start = tl.load(starts + level).to(tl.int64)
        for point in range(points):
            at = (row_of_query * levels + level) * points + point
            share = tl.load(shares + at, mask=in_queries, other=0.0).to(tl.float32)
            x = (
                tl.load(places + 2 * at, mask=in_queries, other=0.0).to(tl.float32) * width.to(tl.float32)
                - 0.5
            )
            y = (
                tl.load(places + 2 * at + 1, mask=in_queries, other=0.0).to(tl.float32)
                * height.to(tl.float32)
                - 0.5
            )
            # Comparisons are false for NaN too.
            inside = (
                in_queries & (y > -1) & (x > -1) & (y < height.to(tl.float32)) & (x < width.to(tl.float32))
            )
            x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
            left, top = tl.floor(x), tl.floor(y)
            right, down = x - left, y - top
            column, row = left.to(tl.int64), top.to(tl.int64)
            a = _corner(value, base, row, column, height, width, start, keys, step, inside, in_channels)
            b = _corner(value, base, row, column + 1, height, width, start, keys, step, inside, in_channels)
            c = _corner(value, base, row + 1, column, height, width, start, keys, step, inside, in_channels)
            d = _corner(
                value, base, row + 1, column + 1, height, width, start, keys, step, inside, in_channels
            )
            up, near = (1.0 - down) * share, 1.0 - right
            down = down * share
            total += (up * near)[:, None] * a + (up * right)[:, None] * b
            total += (down * near)[:, None] * c + (down * right)[:, None] * d
    place = output + row_of_query[:, None] * CHANNELS + channel[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=in_queries[:, None] & in_channels[None, :])


@operator(
    "attend_samples(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights) -> Tensor"
)
def attend_samples(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Attend as `serve.ops.deform.attention.ms_deform_attn_forward`; sums are in float32 whatever the dtype.

    The numbers of `shapes` and `starts` are not checked: a sample outside of `value` is zero.

    Args:
        value: (B, keys, heads, channels) float32, float16 or bfloat16.
        shapes: (levels, 2) int, height and width.
        starts: (levels,) int, first key of each level.
        locations: (B, queries, heads, levels, points, 2) float.
        weights: (B, queries, heads, levels, points) float.

    Returns:
        (B, queries, heads * channels) in the dtype of `value`.
    """
    batch, keys, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    output = value.new_empty((batch, queries, heads * channels))
    if output.numel():
        _attend[(ceil_div(queries, BLOCK_QUERIES), heads, batch)](
            value.contiguous(), shapes.contiguous(), starts.contiguous(), locations.contiguous(), weights.contiguous(),
            output, queries, keys, levels, points,
            HEADS=heads, CHANNELS=channels, BLOCK_Q=BLOCK_QUERIES, BLOCK_C=power_of_two(channels), num_warps=4,
        )  # fmt: skip
    return output
