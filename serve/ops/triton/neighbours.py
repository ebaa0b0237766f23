"""Neighbour tables by binary search in sorted linear indices, in one launch per table."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import ceil_div, kernel, operator
from serve.ops.triton.search import first_not_below

__all__ = ["find_rows"]

BLOCK = 256


@kernel
def _find_rows(
    known,
    order,
    base,
    distances,
    table,
    count: int,
    outputs: int,
    offsets: int,
    steps: int,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.program_id(1)
    inside = row < outputs
    wanted = tl.load(base + row, mask=inside, other=0) + tl.load(distances + offset)
    place = first_not_below(known, wanted, count, steps, False)
    there = inside & (place < count)
    found = there & (tl.load(known + place, mask=there, other=-1) == wanted)
    if HAS_ORDER:
        place = tl.load(order + place, mask=found, other=0)
    tl.store(table + row * offsets + offset, tl.where(found, place, count).to(tl.int32), mask=inside)


@operator("find_rows(Tensor known, Tensor? order, Tensor base, Tensor distances) -> Tensor")
def find_rows(known: Tensor, order: Tensor | None, base: Tensor, distances: Tensor) -> Tensor:
    """Find where each of ``base[i] + distances[k]`` is among `known`.

    Args:
        known: (N,) int64, sorted, each once.
        order: (N,) int64 rows of `known` before it was sorted; None if it was.
        base: (M,) int64.
        distances: (K,) int64.

    Returns:
        (M, K) int32 rows, N for none.
    """
    outputs, offsets, count = len(base), len(distances), len(known)
    table = torch.empty((outputs, offsets), dtype=torch.int32, device=known.device)
    if table.numel():
        _find_rows[(ceil_div(outputs, BLOCK), offsets)](
            known, known if order is None else order, base, distances, table,
            count, outputs, offsets, count.bit_length(), HAS_ORDER=order is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return table
