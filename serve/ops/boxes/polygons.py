"""Points in quadrilaterals, smallest rectangles, and overlaps of point sets' convex hulls with quadrilaterals.

The reference is mmcv 2.1.0 `csrc/common/cuda/points_in_polygons_cuda_kernel.cuh`, `min_area_polygons_cuda.cuh`,
`convex_iou_cuda_kernel.cuh` and `diff_iou_rotated_cuda_kernel.cuh`. All use torch in float64 on any device, except
points in polygons: float32 like the reference, because borders decide there. Only oriented detectors and training
losses call them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.quadrilaterals import (
    PAIRS_PER_BLOCK,
    corners,
    cross,
    overlaps,
    overlaps_aligned,
    signed_area,
)
from serve.ops.checks import as_numpy, check_floating, check_same_device, check_shape, uses_numba
from serve.ops.cpu.jit import jit

__all__ = [
    "convex_giou",
    "convex_iou",
    "diff_iou_rotated_sort_vertices_forward",
    "min_area_polygons",
    "points_in_polygons_forward",
]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
# The first 8 of the 24 candidate corners of the overlap of two rectangles are corners of the rectangles.
INTERSECTIONS_FROM = 8
# Most corners of the overlap of two rectangles.
MOST_CORNERS = 8


def points_in_polygons_forward(points: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Write 1 if a point is in a quadrilateral, else 0, by the parity of crossings to its right.

    As in the reference, counting stops at a side that contains the point, so the result on a border depends on the
    side.

    Args:
        points: (N, 2) float.
        polygons: (M, 8) float, corners in order.
        output: (N, M), written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("points", points, None, 2)
    check_shape("polygons", polygons, None, 8)
    check_shape("output", output, points.shape[0], polygons.shape[0])
    check_floating(points=points, polygons=polygons)
    check_same_device(points=points, polygons=polygons, output=output)
    at, corner = points.detach().float(), polygons.detach().float().reshape(-1, 4, 2)
    if uses_numba(points):
        inside = torch.empty(output.shape, dtype=torch.bool)
        _in_polygons_cpu(as_numpy(at), as_numpy(corner), inside.view(torch.uint8).numpy())
    else:
        inside = in_polygons_torch(at, corner)
    output.copy_(inside)


def in_polygons_torch(points: Tensor, corner: Tensor) -> Tensor:
    """Test points (N, 2) in corners (M, 4, 2), float32, on any device; (N, M) bool."""
    out = torch.empty((points.shape[0], corner.shape[0]), dtype=torch.bool, device=points.device)
    rows = max(1, 4 * PAIRS_PER_BLOCK // max(1, corner.shape[0]))
    for begin in range(0, points.shape[0], rows):
        px, py = points[begin : begin + rows].t()[..., None]
        odd = torch.zeros((px.shape[0], corner.shape[0]), dtype=torch.bool, device=points.device)
        stopped = odd.clone()
        for i in range(4):
            (sx, sy), (tx, ty) = corner[:, i].t(), corner[:, i - 1].t()
            spans = (py >= torch.minimum(sy, ty)) & (py <= torch.maximum(sy, ty))
            at_corner = ((sx == px) & (sy == py)) | ((tx == px) & (ty == py))
            crosses = (sy < py) != (ty < py)
            x = sx + (py - sy) * (tx - sx) / (ty - sy)
            stopped |= spans & (at_corner | (crosses & (x == px)))
            odd ^= spans & crosses & (x > px) & ~stopped
        out[begin : begin + rows] = odd
    return out


@jit
def _in_polygons_cpu(points: F32, corner: F32, inside: U8) -> None:  # pragma: no cover - compiled
    for n in range(points.shape[0]):
        px, py = points[n, 0], points[n, 1]
        for m in range(corner.shape[0]):
            crossings = 0
            for i in range(4):
                j = i - 1 if i > 0 else 3
                sx, sy, tx, ty = corner[m, i, 0], corner[m, i, 1], corner[m, j, 0], corner[m, j, 1]
                if (py < sy and py < ty) or (py > sy and py > ty):
                    continue
                if (sx == px and sy == py) or (tx == px and ty == py):
                    break
                if (sy < py) != (ty < py):
                    x = sx + (py - sy) * (tx - sx) / (ty - sy)
                    if x == px:
                        break
                    crossings += x > px
            inside[n, m] = crossings % 2


def min_area_polygons(pointsets: Tensor, polygons: Tensor) -> None:
    """Write the corners of the smallest rotated rectangle around each set of nine points.

    One side of it lies on the line through two of the points (Freeman and Shapira, CACM 18(7), 1975), so all
    36 pairs are tried.

    Args:
        pointsets: (N, 18) float, x and y in turn.
        polygons: (N, 8) float, written in place: with the axes turned by an angle in [0, π/2) the corners
            (x max, y min), (x min, y min), (x min, y max), (x max, y max).

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("pointsets", pointsets, None, 18)
    check_shape("polygons", polygons, pointsets.shape[0], 8)
    check_floating(pointsets=pointsets, polygons=polygons)
    check_same_device(pointsets=pointsets, polygons=polygons)
    points = pointsets.detach().double().reshape(-1, 9, 2)
    i, j = torch.triu_indices(9, 9, 1, device=points.device)
    side = points[:, j] - points[:, i]
    angle = torch.remainder(torch.atan2(side[..., 1], side[..., 0]), math.pi / 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = points[:, None].unbind(dim=-1)
    along = torch.aminmax(x * cos[..., None] + y * sin[..., None], dim=-1)
    across = torch.aminmax(y * cos[..., None] - x * sin[..., None], dim=-1)
    best = ((along.max - along.min) * (across.max - across.min)).argmin(dim=1, keepdim=True)
    cos, sin, x0, x1, y0, y1 = (
        part.gather(1, best)[:, 0] for part in (cos, sin, along.min, along.max, across.min, across.max)
    )
    turned = [
        coordinate
        for a, b in ((x1, y0), (x0, y0), (x0, y1), (x1, y1))
        for coordinate in (a * cos - b * sin, a * sin + b * cos)
    ]
    polygons.copy_(torch.stack(turned, dim=1))


def convex_iou(pointsets: Tensor, polygons: Tensor, ious: Tensor) -> None:
    """Write the IoU of the convex hull of each set of nine points with each quadrilateral.

    Args:
        pointsets: (N, 18) float.
        polygons: (K, 8) float.
        ious: (N, K) float, written in place; 0 where neither has an area.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("pointsets", pointsets, None, 18)
    check_shape("polygons", polygons, None, 8)
    check_shape("ious", ious, pointsets.shape[0], polygons.shape[0])
    check_floating(pointsets=pointsets, polygons=polygons, ious=ious)
    check_same_device(pointsets=pointsets, polygons=polygons, ious=ious)
    hulls, quadrilaterals = _hulls(pointsets.detach().double().reshape(-1, 9, 2)), corners(polygons)
    area1, area2 = signed_area(hulls), signed_area(quadrilaterals).abs()
    overlap = overlaps(hulls, quadrilaterals)
    union = area1[:, None] + area2[None] - overlap
    ious.copy_(torch.where(union > 0, overlap / union, torch.zeros_like(union)))


def convex_giou(pointsets: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Write the generalized IoU (Rezatofighi et al., CVPR 2019) of hulls and quadrilaterals, and its gradient.

    Args:
        pointsets: (N, 18) float, nine points whose convex hull is meant.
        polygons: (N, 8) float, paired with them row by row.
        output: (N, 19) float, written in place: the gradient with respect to the 18 coordinates, then the
            generalized IoU.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("pointsets", pointsets, None, 18)
    check_shape("polygons", polygons, pointsets.shape[0], 8)
    check_shape("output", output, pointsets.shape[0], 19)
    check_floating(pointsets=pointsets, polygons=polygons, output=output)
    check_same_device(pointsets=pointsets, polygons=polygons, output=output)
    if pointsets.shape[0] == 0:
        return
    with torch.enable_grad():
        points = pointsets.detach().double().reshape(-1, 9, 2).requires_grad_()
        quadrilaterals = corners(polygons)
        hulls = _hulls(points)
        overlap = overlaps_aligned(hulls, quadrilaterals)
        union = signed_area(hulls) + signed_area(quadrilaterals).abs() - overlap
        around = signed_area(_hulls(torch.cat((points, quadrilaterals), dim=1)))
        giou = overlap / union - (around - union) / around
        (gradient,) = torch.autograd.grad(giou.sum(), points)
    output.copy_(torch.cat((gradient.flatten(1), giou.detach()[:, None]), dim=1))


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """Sort the corners of each overlap of two rectangles by angle around their mean.

    If more than 8 are valid, some coincide, and those nearest to their predecessor are dropped. (The reference
    then writes beyond its output, and loses corners if two coincide.)

    Args:
        vertices: (B, N, V, 2) float, relative to their mean; V is 24: corners of both, then intersections.
        mask: (B, N, V) bool, true for corners of the overlap.
        num_valid: (B, N) int, number of corners.

    Returns:
        (B, N, 9) int32: the valid corners by angle from the x axis towards the y axis, the first again, then padded
        with an invalid intersection (mmcv has zeros there). Only padding if fewer than 3 are valid.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("vertices", vertices, None, None, None, 2)
    check_shape("mask", mask, *vertices.shape[:3])
    check_shape("num_valid", num_valid, *vertices.shape[:2])
    check_floating(vertices=vertices)
    check_same_device(vertices=vertices, mask=mask, num_valid=num_valid)
    if vertices.shape[2] <= INTERSECTIONS_FROM:
        raise ValueError(f"vertices must hold more than 8 candidates, got shape {tuple(vertices.shape)}")
    points, valid = vertices.detach().double(), mask.bool()
    number = valid.sum(dim=2, keepdim=True)
    # 1. Sort by angle, invalid corners last.
    angle = torch.remainder(torch.atan2(points[..., 1], points[..., 0]), 2 * math.pi)
    order = torch.where(valid, angle, torch.inf).sort(dim=2, stable=True)[1]
    # 2. Keep the 8 furthest from their predecessor.
    ordered = points.gather(2, order[..., None].expand(-1, -1, -1, 2))
    rank = torch.arange(order.shape[2], device=order.device).expand_as(order)
    last = ordered.gather(2, (number - 1).clamp(min=0)[..., None].expand(-1, -1, -1, 2))
    before = torch.cat((last, ordered[:, :, :-1]), dim=2)
    gap = torch.where(rank < number, (ordered - before).square().sum(dim=3), -1.0)
    kept = gap.sort(dim=2, descending=True, stable=True)[1][..., :MOST_CORNERS].sort(dim=2)[0]
    order, number = order.gather(2, kept), number.clamp(max=MOST_CORNERS)
    # 3. Close the ring and pad.
    pad = (~valid[..., INTERSECTIONS_FROM:]).int().argmax(dim=2, keepdim=True) + INTERSECTIONS_FROM
    place = torch.arange(MOST_CORNERS + 1, device=order.device)
    ring = torch.cat((order, pad), dim=2)
    ring = torch.where(place < number, ring, torch.where(place == number, order[..., :1], pad))
    return torch.where(number >= 3, ring, pad).int()


def _hulls(points: Tensor) -> Tensor:
    """Compute the corners (N, P, 2) of the convex hulls of (N, P, 2), from x to y, padded with the first.

    Gift wrapping (Jarvis, IPL 2(1), 1973) of all sets in step. Differentiable in the points.
    """
    rows, size = points.shape[:2]
    fixed = points.detach()
    each = torch.arange(rows, device=points.device)
    # The leftmost of the lowest points is a corner.
    low = fixed[..., 1] == fixed[..., 1].amin(dim=1, keepdim=True)
    first = torch.where(low, fixed[..., 0], torch.inf).argmin(dim=1)
    at, wrapped, closed = first, [first], torch.zeros(rows, dtype=torch.bool, device=points.device)
    for _ in range(size - 1):
        offset = fixed - fixed[each, at][:, None]
        best = first
        for k in range(size):
            candidate, rival = offset[:, k], offset[each, best]
            turn = cross(rival, candidate)
            farther = candidate.square().sum(dim=1) > rival.square().sum(dim=1)
            best = torch.where((turn < 0) | ((turn == 0) & farther), k, best)
        closed |= (fixed[each, best] == fixed[each, first]).all(dim=1)
        at = torch.where(closed, first, best)
        wrapped.append(at)
    rows_of = torch.stack(wrapped, dim=1)
    return points.gather(1, rows_of[..., None].expand(-1, -1, 2))
