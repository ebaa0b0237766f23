"""Points in quadrilaterals, smallest rectangles, and overlaps of point sets' convex hulls with quadrilaterals.

The arithmetic is that of mmcv's CUDA kernels: mmcv 2.1.0 `csrc/common/cuda/points_in_polygons_cuda_kernel.cuh` here,
the others in `serve.ops.boxes.point_sets` and `serve.ops.boxes.vertex_order`, which compute on the CPU for all devices.
Reached from oriented detectors and training losses only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.point_sets import hull_gious, hull_ious, smallest_rectangles
from serve.ops.boxes.vertex_order import INTERSECTIONS_FROM, MOST_CORNERS, order_vertices
from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_indices,
    check_same_device,
    check_shape,
    uses_numba,
)
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
# Pairs of a point and a polygon that the torch version holds at once.
PAIRS_PER_BLOCK = 1 << 18


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
    rows = max(1, PAIRS_PER_BLOCK // max(1, corner.shape[0]))
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

    One side of it lies on a side of their hull (Freeman and Shapira, CACM 18(7), 1975), so those are tried, in float32;
    of equally small ones the first is taken.

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
    rectangles = torch.empty(polygons.shape, dtype=torch.float32)
    smallest_rectangles(_pairs(pointsets, torch.float32), rectangles.numpy())
    polygons.copy_(rectangles)


def convex_iou(pointsets: Tensor, polygons: Tensor, ious: Tensor) -> None:
    """Write the IoU of the convex hull of each set of nine points with each quadrilateral.

    Args:
        pointsets: (N, 18) float.
        polygons: (K, 8) float.
        ious: (N, K) float, written in place; NaN where neither has an area.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("pointsets", pointsets, None, 18)
    check_shape("polygons", polygons, None, 8)
    check_shape("ious", ious, pointsets.shape[0], polygons.shape[0])
    check_floating(pointsets=pointsets, polygons=polygons, ious=ious)
    check_same_device(pointsets=pointsets, polygons=polygons, ious=ious)
    found = torch.empty(ious.shape, dtype=torch.float32)
    hull_ious(_pairs(pointsets), _pairs(polygons), found.numpy())
    ious.copy_(found)


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
    found = torch.zeros(output.shape, dtype=torch.float32)
    hull_gious(_pairs(pointsets), _pairs(polygons), found.numpy())
    output.copy_(found)


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """Put the corners of each overlap of two rectangles in order around their mean, in float32.

    Corners that coincide are lost as in the reference: the first candidate stands in their place. Where more than 8 are
    valid the reference writes beyond its output; here those nearest to the one before are left out.

    Args:
        vertices: (B, N, V, 2) float, relative to their mean; V is 24: corners of both, then intersections.
        mask: (B, N, V) bool, true for corners of the overlap.
        num_valid: (B, N) int, number of corners.

    Returns:
        (B, N, 9) int32: the valid corners by angle from the x axis towards the y axis, the first again, then padded
        with an invalid intersection (mmcv has zeros there). Only padding if fewer than 3 are valid.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: `num_valid` is negative or more than there are candidates.
    """
    check_shape("vertices", vertices, None, None, None, 2)
    check_shape("mask", mask, *vertices.shape[:3])
    check_shape("num_valid", num_valid, *vertices.shape[:2])
    check_floating(vertices=vertices)
    check_same_device(vertices=vertices, mask=mask, num_valid=num_valid)
    if vertices.shape[2] <= INTERSECTIONS_FROM:
        raise ValueError(f"vertices must hold more than 8 candidates, got shape {tuple(vertices.shape)}")
    if vertices.device.type == "meta":
        raise ValueError(f"vertices must be on a device that holds numbers, got {vertices.device}")
    check_indices("num_valid", num_valid, vertices.shape[2] + 1)
    points = vertices.detach().to("cpu", torch.float32).flatten(0, 1).contiguous()
    valid = mask.detach().to("cpu", torch.bool).flatten(0, 1).contiguous()
    number = num_valid.detach().to("cpu", torch.int32).flatten().contiguous()
    ring = torch.empty((len(points), MOST_CORNERS + 1), dtype=torch.int32)
    order_vertices(points.numpy(), valid.view(torch.uint8).numpy(), number.numpy(), ring.numpy())
    crowded = (number > MOST_CORNERS).nonzero().squeeze(1)
    if crowded.numel() > 0:
        ring[crowded] = _furthest_apart(points[crowded], valid[crowded])
    return ring.view(*vertices.shape[:2], -1).to(vertices.device)


def _furthest_apart(points: Tensor, valid: Tensor) -> Tensor:
    """(R, 9) int32 rings of the 8 valid points (of R, V, 2) that are furthest from the one before."""
    # 1. By angle, those not valid last.
    number = valid.sum(dim=1, keepdim=True)
    angle = torch.remainder(torch.atan2(points[..., 1], points[..., 0]), 2 * math.pi)
    order = torch.where(valid, angle, torch.inf).sort(dim=1, stable=True)[1]
    # 2. The 8, in that order.
    ordered = points.gather(1, order[..., None].expand(-1, -1, 2))
    rank = torch.arange(order.shape[1]).expand_as(order)
    last = ordered.gather(1, (number - 1).clamp(min=0)[..., None].expand(-1, -1, 2))
    before = torch.cat((last, ordered[:, :-1]), dim=1)
    gap = torch.where(rank < number, (ordered - before).square().sum(dim=2), -1.0)
    kept = gap.sort(dim=1, descending=True, stable=True)[1][:, :MOST_CORNERS].sort(dim=1)[0]
    order = order.gather(1, kept)
    # 3. Close the ring.
    return torch.cat((order, order[:, :1]), dim=1).int()


def _pairs(coordinates: Tensor, dtype: torch.dtype = torch.float64) -> npt.NDArray[Any]:
    """(N, P, 2) points of (N, 2 P) coordinates, on the CPU."""
    if coordinates.device.type == "meta":
        raise ValueError(f"polygons must be on a device that holds numbers, got {coordinates.device}")
    return as_numpy(
        coordinates.detach().to("cpu", dtype).reshape(len(coordinates), coordinates.shape[1] // 2, 2)
    )
