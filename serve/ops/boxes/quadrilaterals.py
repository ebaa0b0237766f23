"""IoU and NMS of quadrilaterals (x1, y1, …, x4, y4), by polygon clipping.

Corners may be in either orientation. A quadrilateral is the signed sum of the two triangles at its first corner; a
polygon is clipped by each (Sutherland and Hodgman, CACM 17(1), 1974) in float64. So areas are right for every simple
quadrilateral, concave ones too. The reference (mmcv 2.1.0 `csrc/common/box_iou_rotated_utils.hpp`) tests corners as if
both were rectangles, and differs if they are not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.rotated import check_sorted, scan
from serve.ops.checks import as_numpy, check_floating, check_same_device, check_width, uses_numba
from serve.ops.cpu.jit import jit

__all__ = ["box_iou_quadri", "nms_quadri"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
# Pairs of polygons per block of the torch version, with up to 72 corners each.
PAIRS_PER_BLOCK = 1 << 16
# Smaller areas count as zero, as in the reference.
NO_AREA = 1e-14
MAX_CORNERS = 64


def box_iou_quadri(
    boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False
) -> None:
    """Write IoU (``mode_flag`` 0) or intersection over first area (1) into `ious`.

    Args:
        boxes1: (N, 8) float.
        boxes2: (M, 8) float; M = N when `aligned`.
        ious: (N * M,), or (N,) when `aligned`; written in place.
        mode_flag: 0 for IoU, 1 for IoF.
        aligned: pair row by row instead of all with all.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; an unknown mode.
    """
    check_width("boxes1", boxes1, 8)
    check_width("boxes2", boxes2, 8)
    check_floating(boxes1=boxes1, boxes2=boxes2, ious=ious)
    check_same_device(boxes1=boxes1, boxes2=boxes2, ious=ious)
    n, m = boxes1.shape[0], boxes2.shape[0]
    if mode_flag not in (0, 1):
        raise ValueError(f"mode_flag must be 0 (iou) or 1 (iof), got {mode_flag!r}")
    if aligned and n != m:
        raise ValueError(f"aligned boxes must be as many on both sides, got {n} and {m}")
    if ious.numel() != (n if aligned else n * m):
        raise ValueError(f"ious must hold {n if aligned else n * m} numbers, got {tuple(ious.shape)}")
    if ious.numel() == 0:
        return
    first, second = corners(boxes1), corners(boxes2)
    overlap = overlaps_aligned(first, second) if aligned else overlaps(first, second)
    area1, area2 = signed_area(first).abs(), signed_area(second).abs()
    if not aligned:
        area1, area2 = area1[:, None], area2[None, :]
    ious.copy_(_ratio(overlap, area1, area2, mode_flag).reshape(ious.shape))


def nms_quadri(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> Tensor:
    """Suppress quadrilaterals greedily; one is dropped if its IoU with a kept one is >= `iou_threshold`.

    Args:
        dets: (N, 8), or (N, 9) with the label last when `multi_label`.
        scores: (N,).
        order: (N,) int64, rows by descending score.
        dets_sorted: `dets` in that order.
        iou_threshold: IoU in [0, 1].
        multi_label: quadrilaterals of different labels do not suppress each other.

    Returns:
        int64 rows kept, by descending score.

    Raises:
        ValueError: a tensor of wrong shape or device.
    """
    check_sorted(dets, scores, order, dets_sorted, 9 if multi_label else 8)
    polygons = corners(dets_sorted)
    groups = dets_sorted[:, 8].double() if multi_label else polygons.new_zeros(polygons.shape[0])
    if uses_numba(dets):
        keep = torch.from_numpy(_suppress_cpu(as_numpy(polygons), as_numpy(groups), float(iou_threshold)))
    else:
        keep = suppress_torch(polygons, groups, float(iou_threshold))
    return order[keep]


def suppress_torch(polygons: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Suppress on any device; return kept rows. One matrix of IoU, one transfer of bits, one scan."""
    area = signed_area(polygons).abs()
    iou = _ratio(_overlaps_torch(polygons, polygons), area[:, None], area[None, :], 0)
    return scan((iou >= threshold) & (groups[:, None] == groups[None, :]))


def corners(boxes: Tensor) -> Tensor:
    """Convert to (N, 4, 2) float64 corners."""
    return boxes[:, :8].detach().double().reshape(-1, 4, 2)


def signed_area(polygons: Tensor) -> Tensor:
    """Compute (N,) areas of (N, P, 2) by the shoelace formula, positive if the corners go from x to y."""
    if polygons.shape[1] == 0:
        return polygons.new_zeros(polygons.shape[0])
    local = polygons - polygons[:, :1]
    return cross(local, local.roll(-1, dims=1)).sum(dim=1) / 2


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Compute the z component of the cross product of vectors (…, 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Compute (N, M) overlap areas of polygons (N, P, 2) and quadrilaterals (M, 4, 2), float64.

    P may be up to 9; a concave polygon may have at most four corners.
    """
    if uses_numba(first):
        return torch.from_numpy(_overlaps_cpu(as_numpy(first), as_numpy(second)))
    return _overlaps_torch(first, second)


def _overlaps_torch(first: Tensor, second: Tensor) -> Tensor:
    n, m = first.shape[0], second.shape[0]
    out = first.new_zeros((n, m))
    rows = max(1, PAIRS_PER_BLOCK // max(1, m))
    for begin in range(0, n, rows):
        block = first[begin : begin + rows]
        pairs = (
            block[:, None].expand(-1, m, -1, 2).flatten(0, 1),
            second[None].expand(block.shape[0], m, 4, 2).flatten(0, 1),
        )
        out[begin : begin + rows] = overlaps_aligned(*pairs).view(block.shape[0], m)
    return out


def overlaps_aligned(polygons: Tensor, quadrilaterals: Tensor) -> Tensor:
    """Compute (R,) overlap areas of (R, P, 2) polygons and (R, 4, 2) quadrilaterals, row by row.

    Torch only, any device, float64; differentiable in both.
    """
    total = polygons.new_zeros(polygons.shape[0])
    for corner in (1, 2):
        triangle = torch.stack([quadrilaterals[:, i] for i in (0, corner, corner + 1)], dim=1)
        sign = torch.sign(signed_area(triangle.detach()))
        clipped = polygons
        for side in range(3):
            start, end = triangle[:, side], triangle[:, (side + 1) % 3]
            clipped = _clip(clipped, start, (end - start) * sign[:, None])
        total = total + sign * signed_area(clipped)
    return total.abs()


def _clip(polygons: Tensor, start: Tensor, along: Tensor) -> Tensor:
    """Keep the part left of the line: (R, P, 2) become (R, 2 P, 2), a start and an end per side.

    Parts outside collapse onto the line, where they enclose no area.
    """
    after = polygons.roll(-1, dims=1)
    normal = torch.stack((-along[:, 1], along[:, 0]), dim=-1)[:, None]
    length = (normal * normal).sum(dim=-1)
    length = torch.where(length > 0, length, torch.ones_like(length))
    here, there = (((end - start[:, None]) * normal).sum(dim=-1) for end in (polygons, after))
    step = here - there
    # Make the denominator safe first: gradients flow through the branch not taken too.
    t = (here / torch.where(step == 0, torch.ones_like(step), step)).clamp(0, 1)
    crossing = polygons + t[..., None] * (after - polygons)
    inside_here, inside_there = here >= 0, there >= 0
    begin = torch.where(inside_here[..., None], polygons, crossing)
    finish = torch.where(inside_there[..., None], after, crossing)
    outside = (~inside_here & ~inside_there)[..., None]
    begin = torch.where(outside, polygons - normal * (here / length)[..., None], begin)
    finish = torch.where(outside, after - normal * (there / length)[..., None], finish)
    return torch.stack((begin, finish), dim=2).flatten(1, 2)


def _ratio(overlap: Tensor, area1: Tensor, area2: Tensor, mode_flag: int) -> Tensor:
    base = area1 + torch.zeros_like(area2) if mode_flag == 1 else area1 + area2 - overlap
    there = (area1 >= NO_AREA) & (area2 >= NO_AREA)
    return torch.where(there, overlap / base, torch.zeros_like(overlap))


@jit
def _turn(a: F64, b: F64, c: F64) -> float:  # pragma: no cover - compiled
    return float((b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1]))


@jit
def _overlap(a: F64, b: F64, x: F64, y: F64, u: F64, v: F64) -> float:  # pragma: no cover - compiled
    total = 0.0
    for corner in range(1, 3):
        sign = np.sign(_turn(b[0], b[corner], b[corner + 1]))
        n = a.shape[0]
        for i in range(n):
            x[i], y[i] = a[i, 0], a[i, 1]
        for side in range(3):
            p = b[0 if side == 0 else corner + side - 1]
            q = b[0 if side == 2 else corner + side]
            ex, ey = sign * (q[0] - p[0]), sign * (q[1] - p[1])
            made = 0
            for i in range(n):
                j = i + 1 if i + 1 < n else 0
                here = ex * (y[i] - p[1]) - ey * (x[i] - p[0])
                there = ex * (y[j] - p[1]) - ey * (x[j] - p[0])
                if here >= 0:
                    u[made], v[made] = x[i], y[i]
                    made += 1
                if (here >= 0) != (there >= 0):
                    t = here / (here - there)
                    u[made], v[made] = x[i] + t * (x[j] - x[i]), y[i] + t * (y[j] - y[i])
                    made += 1
            n = made
            for i in range(n):
                x[i], y[i] = u[i], v[i]
        area = 0.0
        for i in range(1, n - 1):
            area += (x[i] - x[0]) * (y[i + 1] - y[0]) - (x[i + 1] - x[0]) * (y[i] - y[0])
        total += sign * area / 2
    return abs(total)


@jit
def _bounds(polygons: F64) -> F64:  # pragma: no cover - compiled
    out = np.empty((polygons.shape[0], 4))
    for i in range(polygons.shape[0]):
        for axis in range(2):
            out[i, axis], out[i, 2 + axis] = polygons[i, :, axis].min(), polygons[i, :, axis].max()
    return out


@jit
def _apart(a: F64, b: F64) -> bool:  # pragma: no cover - compiled
    return bool((a[0] >= b[2]) | (b[0] >= a[2]) | (a[1] >= b[3]) | (b[1] >= a[3]))


@jit
def _overlaps_cpu(first: F64, second: F64) -> F64:  # pragma: no cover - compiled
    out = np.zeros((first.shape[0], second.shape[0]))
    x, y, u, v = np.empty(MAX_CORNERS), np.empty(MAX_CORNERS), np.empty(MAX_CORNERS), np.empty(MAX_CORNERS)
    around1, around2 = _bounds(first), _bounds(second)
    for i in range(first.shape[0]):
        for j in range(second.shape[0]):
            if not _apart(around1[i], around2[j]):
                out[i, j] = _overlap(first[i], second[j], x, y, u, v)
    return out


@jit
def _suppress_cpu(polygons: F64, groups: F64, threshold: float) -> I64:  # pragma: no cover - compiled
    n = polygons.shape[0]
    area = np.empty(n)
    for i in range(n):
        p = polygons[i]
        # Half the cross product of the diagonals.
        area[i] = (
            abs((p[2, 0] - p[0, 0]) * (p[3, 1] - p[1, 1]) - (p[2, 1] - p[0, 1]) * (p[3, 0] - p[1, 0])) / 2
        )
    around = _bounds(polygons)
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    kept = 0
    x, y, u, v = np.empty(MAX_CORNERS), np.empty(MAX_CORNERS), np.empty(MAX_CORNERS), np.empty(MAX_CORNERS)
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        for j in range(i + 1, n):
            if dropped[j] or groups[i] != groups[j]:
                continue
            iou = 0.0
            if area[i] >= NO_AREA and area[j] >= NO_AREA and not _apart(around[i], around[j]):
                overlap = _overlap(polygons[i], polygons[j], x, y, u, v)
                iou = overlap / (area[i] + area[j] - overlap)
            dropped[j] = iou >= threshold
    return keep[:kept]
