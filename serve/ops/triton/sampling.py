"""Furthest-point sampling of a cloud in one launch; plain torch takes thirty operators per sample."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import kernel, operator

__all__ = ["sample_furthest"]

BLOCK = 4096


@kernel
def _sample(
    points, nearest, ranks, rows, count: int, samples: int, turns: int, threads: int, BLOCK: tl.constexpr
):  # pragma: no cover - compiled
    cloud = tl.program_id(0).to(tl.int64)
    points += cloud * count * 3
    nearest += cloud * count
    rows += cloud * samples
    lanes = tl.arange(0, BLOCK)
    last = tl.cast(0, tl.int64)
    tl.store(rows, last)
    for sample in range(1, samples):
        from_x, from_y = tl.load(points + last * 3), tl.load(points + last * 3 + 1)
        from_z = tl.load(points + last * 3 + 2)
        # Of equal distances the lowest rank wins, as among the threads of the reference.
        largest = tl.full((BLOCK,), -1.0, tl.float32)
        best = tl.full((BLOCK,), 1 << 62, tl.int64)
        for first in range(0, count, BLOCK):
            row = first + lanes
            inside = row < count
            dx = tl.load(points + row * 3, mask=inside, other=0.0) - from_x
            dy = tl.load(points + row * 3 + 1, mask=inside, other=0.0) - from_y
            dz = tl.load(points + row * 3 + 2, mask=inside, other=0.0) - from_z
            distance = dx * dx + dy * dy + dz * dz
            # A lane reads and writes the same places in every round. A distance that is NaN lowers nothing.
            known = tl.load(nearest + row, mask=inside, other=-1.0)
            known = tl.where(distance < known, distance, known)
            tl.store(nearest + row, known, mask=inside)
            rank = tl.load(ranks + row % threads, mask=inside, other=0) * turns + row // threads
            key = rank * count + row
            better = inside & ((known > largest) | ((known == largest) & (known > -1.0) & (key < best)))
            largest = tl.where(better, known, largest)
            best = tl.where(better, key, best)
        tl.debug_barrier()  # what a lane wrote is there for any that reads it
        top = tl.max(largest, axis=0)
        key = tl.min(tl.where(largest == top, best, 1 << 62), axis=0)
        # Below -1 no thread finds any.
        last = tl.where(top > -1.0, key % count, 0)
        tl.store(rows + sample, last)


@operator("sample_furthest(Tensor points, Tensor(a!) nearest, Tensor ranks, int samples) -> Tensor")
def sample_furthest(points: Tensor, nearest: Tensor, ranks: Tensor, samples: int) -> Tensor:
    """Sample the rows (B, samples) int64 of points, each the furthest from those before.

    Args:
        points: (B, N, 3) float32, N > 0.
        nearest: (B, N) float32 contiguous, square metres: upper bounds on entry, distances to the nearest sample after.
        ranks: (threads,) int64 by which equal distances are ordered, as of the reference's threads.
        samples: at least 1.
    """
    batch, count = nearest.shape
    rows = torch.empty((batch, samples), dtype=torch.int64, device=points.device)
    if batch:
        _sample[(batch,)](
            points.contiguous(), nearest, ranks, rows, count, samples, count // len(ranks) + 1, len(ranks),
            BLOCK=BLOCK, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return rows
