"""Overlap areas, IoU and NMS of rotated rectangles.

A rectangle is (x, y, width, height, angle in radians); the direction of the angle does not matter if it is the same for
all. One rectangle is clipped by the four sides of the other (Sutherland and Hodgman, CACM 17(1), 1974) in float64, in
the axes of the first, where the clip lines are x = ±w/2 and y = ±h/2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_indices,
    check_same_device,
    check_shape,
    check_width,
    uses_numba,
)
from serve.ops.cpu.jit import jit

__all__ = ["box_iou_rotated", "nms_rotated"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
# A rectangle clipped by four half-planes has at most eight corners.
MAX_CORNERS = 8
PAIRS_PER_BLOCK = 1 << 20


def box_iou_rotated(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False
) -> None:
    """Write IoU (``mode_flag`` 0) or intersection over first area (1) into `ious`.

    Args:
        bboxes1: (N, 5).
        bboxes2: (M, 5); M = N when `aligned`.
        ious: (N * M,), or (N,) when `aligned`; written in place.
        mode_flag: 0 for IoU, 1 for IoF.
        aligned: pair row by row instead of all with all.
    """
    check_width("bboxes1", bboxes1, 5)
    check_width("bboxes2", bboxes2, 5)
    check_same_device(bboxes1=bboxes1, bboxes2=bboxes2, ious=ious)
    check_floating(bboxes1=bboxes1, bboxes2=bboxes2, ious=ious)
    n, m = bboxes1.shape[0], bboxes2.shape[0]
    if mode_flag not in (0, 1):
        raise ValueError(f"mode_flag must be 0 (iou) or 1 (iof), got {mode_flag!r}")
    if aligned and n != m:
        raise ValueError(f"bboxes1 and bboxes2 must be as many when aligned, got {n} and {m}")
    if ious.numel() != (n if aligned else n * m):
        raise ValueError(f"ious must hold {n if aligned else n * m} numbers, got {tuple(ious.shape)}")
    if n == 0 or m == 0:
        return
    first, second = bboxes1[:, :5].double(), bboxes2[:, :5].double()
    if aligned:
        overlap = overlap_areas_aligned(first, second)
        area1, area2 = _areas(first), _areas(second)
    else:
        overlap = overlap_areas(first, second)
        area1, area2 = _areas(first)[:, None], _areas(second)[None, :]
    base = area1 if mode_flag == 1 else area1 + area2 - overlap
    result = torch.where(base > 0, overlap / base, torch.zeros_like(overlap))
    ious.copy_(result.reshape(ious.shape).to(ious.dtype))


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> Tensor:
    """Suppress rotated boxes greedily; one is dropped if its IoU with a kept one is >= `iou_threshold`.

    Args:
        dets: (N, 5), or (N, 6) with the label last when `multi_label`.
        scores: (N,).
        order: (N,) int64, rows by descending score.
        dets_sorted: `dets` in that order.
        labels: unused; mmcv also appends them to `dets`.
        iou_threshold: IoU in [0, 1].
        multi_label: boxes of different labels do not suppress each other.

    Returns:
        int64 rows kept, by descending score.
    """
    check_sorted(dets, scores, order, dets_sorted, 6 if multi_label else 5)
    boxes = dets_sorted[:, :5].double()
    groups = dets_sorted[:, 5].double() if multi_label else torch.zeros_like(boxes[:, 0])
    return order[suppress_rotated(boxes, groups, float(iou_threshold), True)]


def check_sorted(dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, width: int) -> None:
    """Raise unless the arguments of an NMS of sorted boxes are consistent."""
    check_width("dets", dets, width)
    check_shape("scores", scores, dets.shape[0])
    check_shape("order", order, dets.shape[0])
    check_shape("dets_sorted", dets_sorted, *dets.shape)
    check_floating(dets=dets, scores=scores, dets_sorted=dets_sorted)
    check_same_device(dets=dets, scores=scores, order=order, dets_sorted=dets_sorted)
    check_indices("order", order, dets.shape[0])


def suppress_rotated(boxes: Tensor, groups: Tensor, threshold: float, inclusive: bool) -> Tensor:
    """Suppress `boxes` (N, 5) float64, sorted by descending score, within (N,) `groups`; return kept rows.

    `inclusive` drops at IoU == threshold too.
    """
    if uses_numba(boxes):
        keep = _suppress_cpu(as_numpy(boxes), as_numpy(groups), threshold, inclusive)
        return torch.from_numpy(keep)
    # One IoU matrix on the device, one transfer of a byte per pair, one scan.
    overlap = overlap_areas(boxes, boxes)
    area = _areas(boxes)
    base = area[:, None] + area[None, :] - overlap
    iou = torch.where(base > 0, overlap / base, torch.zeros_like(overlap))
    hits = (iou >= threshold) if inclusive else (iou > threshold)
    hits &= groups[:, None] == groups[None, :]
    return scan(hits)


def scan(hits: Tensor) -> Tensor:
    """Select rows greedily (int64), given (N, N) bool "row i, if kept, drops row j > i"."""
    keep = _scan_cpu(hits.to("cpu", torch.uint8).numpy())
    return torch.from_numpy(keep).to(hits.device)


def overlap_areas(first: Tensor, second: Tensor) -> Tensor:
    """Compute (N, M) float64 overlap areas of (N, 5) and (M, 5) float64 rectangles."""
    n, m = first.shape[0], second.shape[0]
    if uses_numba(first):
        return torch.from_numpy(_overlaps_cpu(as_numpy(first), as_numpy(second)))
    rows = max(1, PAIRS_PER_BLOCK // max(1, m))
    blocks = [
        overlap_areas_aligned(
            block[:, None].expand(-1, m, 5).reshape(-1, 5),
            second[None].expand(block.shape[0], m, 5).reshape(-1, 5),
        ).view(-1, m)
        for block in torch.split(first, rows)
    ]
    return torch.cat(blocks) if blocks else first.new_zeros((n, m))


def overlap_areas_aligned(first: Tensor, second: Tensor) -> Tensor:
    """Compute (N,) float64 overlap areas of rectangles paired row by row; torch, any device."""
    # 1. Corners of the second in the axes of the first.
    cos1, sin1 = torch.cos(first[:, 4]), torch.sin(first[:, 4])
    dx, dy = second[:, 0] - first[:, 0], second[:, 1] - first[:, 1]
    centre = torch.stack((dx * cos1 + dy * sin1, dy * cos1 - dx * sin1), dim=-1)
    turn = second[:, 4] - first[:, 4]
    cos, sin = torch.cos(turn), torch.sin(turn)
    signs = first.new_tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) / 2
    local = signs[None] * second[:, None, 2:4]
    corners = torch.stack(
        (
            local[..., 0] * cos[:, None] - local[..., 1] * sin[:, None],
            local[..., 0] * sin[:, None] + local[..., 1] * cos[:, None],
        ),
        dim=-1,
    )
    corners = corners + centre[:, None]
    # 2. Clip by the four half-planes. A polygon is (N, P, 2), padded with repeated corners.
    for axis in (0, 1):
        for sign in (1.0, -1.0):
            corners = _clip(corners, axis, sign, first[:, 2 + axis] / 2)
    # 3. Shoelace formula.
    after = corners.roll(-1, dims=1)
    cross = corners[..., 0] * after[..., 1] - after[..., 0] * corners[..., 1]
    return cross.sum(dim=1).abs() / 2


def _clip(corners: Tensor, axis: int, sign: float, limit: Tensor) -> Tensor:
    """Keep the part with ``sign * coordinate <= limit``; each edge yields its start and its crossing.

    An edge outside yields points that are repeated or lie on the clip line, which add no area.
    """
    after = corners.roll(-1, dims=1)
    here = limit[:, None] - sign * corners[..., axis]
    there = limit[:, None] - sign * after[..., axis]
    step = here - there
    t = torch.where(step.abs() > 0, here / step, torch.zeros_like(step)).clamp(0, 1)
    crossing = corners + t[..., None] * (after - corners)
    inside_here, inside_there = here >= 0, there >= 0
    start = torch.where(inside_here[..., None], corners, crossing)
    end = torch.where((inside_here & inside_there)[..., None], after, crossing)
    # Edges wholly outside collapse onto the clip line at the foot of their start.
    outside = ~inside_here & ~inside_there
    foot = corners.clone()
    foot[..., axis] = (sign * limit)[:, None]
    start = torch.where(outside[..., None], foot, start)
    foot_end = after.clone()
    foot_end[..., axis] = (sign * limit)[:, None]
    end = torch.where(outside[..., None], foot_end, end)
    return torch.stack((start, end), dim=2).flatten(1, 2)


def _areas(boxes: Tensor) -> Tensor:
    return boxes[:, 2] * boxes[:, 3]


@jit
def _overlap(a: F64, b: F64, ax: F64, ay: F64, bx: F64, by: F64) -> float:  # pragma: no cover - compiled
    # Far apart: the circumscribed circles are disjoint.
    dx, dy = b[0] - a[0], b[1] - a[1]
    reach = 0.5 * (np.sqrt(a[2] * a[2] + a[3] * a[3]) + np.sqrt(b[2] * b[2] + b[3] * b[3]))
    if dx * dx + dy * dy > reach * reach:
        return 0.0
    cos1, sin1 = np.cos(a[4]), np.sin(a[4])
    cx, cy = dx * cos1 + dy * sin1, dy * cos1 - dx * sin1
    cos, sin = np.cos(b[4] - a[4]), np.sin(b[4] - a[4])
    hw, hh = b[2] / 2, b[3] / 2
    ax[0], ay[0] = cx + hw * cos - hh * sin, cy + hw * sin + hh * cos
    ax[1], ay[1] = cx - hw * cos - hh * sin, cy - hw * sin + hh * cos
    ax[2], ay[2] = cx - hw * cos + hh * sin, cy - hw * sin - hh * cos
    ax[3], ay[3] = cx + hw * cos + hh * sin, cy + hw * sin - hh * cos
    n = 4
    for side in range(4):
        limit = a[2] / 2 if side < 2 else a[3] / 2
        sign = 1.0 if side % 2 == 0 else -1.0
        made = 0
        for i in range(n):
            j = i + 1 if i + 1 < n else 0
            here = limit - sign * (ax[i] if side < 2 else ay[i])
            there = limit - sign * (ax[j] if side < 2 else ay[j])
            if here >= 0:
                bx[made], by[made] = ax[i], ay[i]
                made += 1
            if (here >= 0) != (there >= 0):
                t = here / (here - there)
                bx[made] = ax[i] + t * (ax[j] - ax[i])
                by[made] = ay[i] + t * (ay[j] - ay[i])
                made += 1
        n = made
        for i in range(n):
            ax[i], ay[i] = bx[i], by[i]
    area = 0.0
    for i in range(n):
        j = i + 1 if i + 1 < n else 0
        area += ax[i] * ay[j] - ax[j] * ay[i]
    return abs(area) / 2


@jit
def _overlaps_cpu(first: F64, second: F64) -> F64:  # pragma: no cover - compiled
    out = np.zeros((first.shape[0], second.shape[0]))
    ax, ay, bx, by = np.empty(16), np.empty(16), np.empty(16), np.empty(16)
    for i in range(first.shape[0]):
        for j in range(second.shape[0]):
            out[i, j] = _overlap(first[i], second[j], ax, ay, bx, by)
    return out


@jit
def _suppress_cpu(
    boxes: F64, groups: F64, threshold: float, inclusive: bool
) -> I64:  # pragma: no cover - compiled
    n = boxes.shape[0]
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    ax, ay, bx, by = np.empty(16), np.empty(16), np.empty(16), np.empty(16)
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        area = boxes[i, 2] * boxes[i, 3]
        for j in range(i + 1, n):
            if dropped[j] or groups[i] != groups[j]:
                continue
            overlap = _overlap(boxes[i], boxes[j], ax, ay, bx, by)
            base = area + boxes[j, 2] * boxes[j, 3] - overlap
            iou = overlap / base if base > 0 else 0.0
            if iou > threshold or (inclusive and iou == threshold):
                dropped[j] = True
    return keep[:kept]


@jit
def _scan_cpu(hits: npt.NDArray[np.uint8]) -> I64:  # pragma: no cover - compiled
    n = hits.shape[0]
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        for j in range(i + 1, n):
            if hits[i, j]:
                dropped[j] = True
    return keep[:kept]
