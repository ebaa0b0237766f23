"""Overlaps of axis-aligned boxes (x1, y1, x2, y2), all pairs or row by row.

The reference is mmcv 2.1.0 `csrc/pytorch/cpu/bbox_overlaps_cpu.cpp`: two boxes without area give NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import check_floating, check_same_device, check_width

__all__ = ["bbox_overlaps"]

PAIRS_PER_BLOCK = 1 << 18
IOU, IOF = 0, 1


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Write IoU, or the intersection over the first area, into `ious`.

    Args:
        bboxes1: (N, 4).
        bboxes2: (M, 4); M = N when `aligned`.
        ious: (N, M), or (N,) when `aligned`; written in place.
        mode: 0 for IoU, 1 for IoF.
        aligned: pair row by row instead of all with all.
        offset: 1 if x2 and y2 are the last pixel inside, else 0.

    Raises:
        ValueError: a shape, `mode` or `offset` does not fit.
    """
    check_width("bboxes1", bboxes1, 4)
    check_width("bboxes2", bboxes2, 4)
    check_floating(ious=ious)
    check_same_device(bboxes1=bboxes1, bboxes2=bboxes2, ious=ious)
    if mode not in (IOU, IOF):
        raise ValueError(f"mode must be 0 (IoU) or 1 (IoF), got {mode}")
    if offset not in (0, 1):
        raise ValueError(f"offset must be 0 or 1, got {offset}")
    n, m = bboxes1.shape[0], bboxes2.shape[0]
    if aligned and n != m:
        raise ValueError(f"aligned boxes must be as many on both sides, got {n} and {m}")
    expected = (n,) if aligned else (n, m)
    if tuple(ious.shape) != expected:
        raise ValueError(f"ious must be {expected}, got {tuple(ious.shape)}")
    dtype = torch.float64 if torch.float64 in (bboxes1.dtype, bboxes2.dtype) else torch.float32
    first = bboxes1[:, :4].to(dtype).t().contiguous()
    second = bboxes2[:, :4].to(dtype).t().contiguous()
    if aligned:
        ious.copy_(_overlaps(first, second, mode, offset))
        return
    # Blocks fit a core's cache.
    rows = max(1, PAIRS_PER_BLOCK // max(1, m))
    for start in range(0, n, rows):
        block = first[:, start : start + rows, None]
        ious[start : start + rows] = _overlaps(block, second[:, None], mode, offset).to(ious.dtype)


def _overlaps(first: Tensor, second: Tensor, mode: int, offset: int) -> Tensor:
    """Compute overlaps of boxes given as four planes each, which broadcast."""
    width = (torch.minimum(first[2], second[2]) - torch.maximum(first[0], second[0])).add_(offset)
    height = (torch.minimum(first[3], second[3]) - torch.maximum(first[1], second[1])).add_(offset)
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))
    area = (first[2] - first[0] + offset) * (first[3] - first[1] + offset)
    if mode == IOF:
        base = area
    else:
        other = (second[2] - second[0] + offset) * (second[3] - second[1] + offset)
        base = area + other - shared
    # mmcv's CUDA kernel divides by no less than the offset, its CPU kernel by what comes.
    return shared / (base if base.device.type == "cpu" else base.clamp(min=offset))
