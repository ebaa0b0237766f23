"""Overlaps of axis-aligned boxes as bits, for greedy suppression.

Plain torch computes (N, N) overlaps in a dozen passes over memory, 16 million floats each for 4,096 boxes. Here a
program has 32 columns of some rows in registers and writes their bits. The greedy choice over the bits is the
processor's (`serve.ops.boxes.nms.scan_bits`), which waits for the result anyway.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import ceil_div, kernel, operator

__all__ = ["overlap_bits", "words_for"]

BLOCK_ROWS = 32


@kernel
def _overlap_bits(
    boxes, bits, count: int, words: int, threshold: float, extra: float, BLOCK: tl.constexpr
):  # pragma: no cover - compiled
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.program_id(1)
    lanes = tl.arange(0, 32)
    columns = word * 32 + lanes
    in_rows, in_columns = rows < count, columns < count
    packed = tl.zeros((BLOCK,), dtype=tl.int64)
    # Only later boxes are dropped: words left of the diagonal stay zero.
    if word * 32 + 31 > tl.program_id(0) * BLOCK:
        a, b = boxes + rows.to(tl.int64) * 4, boxes + columns.to(tl.int64) * 4
        left_a, top_a = tl.load(a, mask=in_rows, other=0.0), tl.load(a + 1, mask=in_rows, other=0.0)
        right_a, bottom_a = tl.load(a + 2, mask=in_rows, other=0.0), tl.load(a + 3, mask=in_rows, other=0.0)
        left_b, top_b = tl.load(b, mask=in_columns, other=0.0), tl.load(b + 1, mask=in_columns, other=0.0)
        right_b = tl.load(b + 2, mask=in_columns, other=0.0)
        bottom_b = tl.load(b + 3, mask=in_columns, other=0.0)
        area_a = (right_a - left_a + extra) * (bottom_a - top_a + extra)
        area_b = (right_b - left_b + extra) * (bottom_b - top_b + extra)
        wide = (
            tl.minimum(right_a[:, None], right_b[None, :])
            - tl.maximum(left_a[:, None], left_b[None, :])
            + extra
        )
        high = (
            tl.minimum(bottom_a[:, None], bottom_b[None, :])
            - tl.maximum(top_a[:, None], top_b[None, :])
            + extra
        )
        overlap = tl.maximum(wide, 0.0) * tl.maximum(high, 0.0)
        union = area_a[:, None] + area_b[None, :] - overlap
        hits = (overlap > threshold * union) & (columns[None, :] > rows[:, None])
        hits = hits & in_rows[:, None] & in_columns[None, :]
        packed = tl.sum(hits.to(tl.int64) << lanes[None, :].to(tl.int64), axis=1)
    tl.store(bits + rows.to(tl.int64) * words + word, packed.to(tl.int32), mask=in_rows)


def words_for(count: int) -> int:
    """Return the 32-bit words of a row of bits; rows are whole numbers of 64-bit words."""
    return 2 * ceil_div(count, 64)


@operator("overlap_bits(Tensor boxes, float offset, float threshold) -> Tensor")
def overlap_bits(boxes: Tensor, offset: float, threshold: float) -> Tensor:
    """Find which boxes a box drops if it is kept, as `pack_bits` of the upper triangle of `hits_above`.

    Args:
        boxes: (N, 4) float32 corners, best first.
        offset: 1 if a box includes its last pixel, else 0.
        threshold: IoU above which the later box is dropped.

    Returns:
        (N, W) uint8 with W a multiple of 8: bit j of byte i is box 8 i + j.
    """
    count = len(boxes)
    words = words_for(count)
    bits = torch.empty((count, words), dtype=torch.int32, device=boxes.device)
    if count:
        # Without fusing of products and sums, which would round overlaps at the threshold otherwise than torch.
        _overlap_bits[(ceil_div(count, BLOCK_ROWS), words)](
            boxes.contiguous(), bits, count, words, float(threshold), float(offset),
            BLOCK=BLOCK_ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return bits.view(torch.uint8)
