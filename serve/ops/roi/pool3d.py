"""Pooling of the features of points in 3D boxes: over a grid of the box (RoI-aware) or sampled (RoI-point).

Boxes, and "inside", are defined in `serve.ops.boxes.boxes3d`. Points of a cell, and of a box, are in the order of their
rows; those beyond a cap are dropped. Sums are in float32 or float64. The reference is mmcv 2.1.0
`csrc/common/cuda/roiaware_pool3d_cuda_kernel.cuh` and `roipoint_pool3d_cuda_kernel.cuh`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.boxes3d import inside_blocks, mark_inside, to_common_dtype
from serve.ops.checks import (
    as_compute_dtype,
    as_numpy,
    check_floating,
    check_indices,
    check_same_device,
    check_shape,
    uses_numba,
)
from serve.ops.cpu.jit import jit
from serve.ops.points.neighbours import first_hits

__all__ = ["roiaware_pool3d_backward", "roiaware_pool3d_forward", "roipoint_pool3d_forward"]

Floats = npt.NDArray[np.floating]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
MAX, MEAN = 0, 1
# Points per vectorised loop of comparisons with a box.
BLOCK = 1024


def roiaware_pool3d_forward(
    rois: Tensor,
    pts: Tensor,
    pts_feature: Tensor,
    argmax: Tensor,
    pts_idx_of_voxels: Tensor,
    pooled_features: Tensor,
    pool_method: int,
) -> None:
    """Pool the features of the points in each cell of each box; cells without points are unchanged.

    Args:
        rois: (N, 7) float boxes.
        pts: (P, 3) float, metres.
        pts_feature: (P, C) float.
        argmax: (N, X, Y, Z, C) int32, written in place by max pooling: row of `pts` with the maximum, the first of
            equal ones, -1 for none.
        pts_idx_of_voxels: (N, X, Y, Z, K) int32 zeros, contiguous, written in place: number of points of each cell,
            then their rows; the cap is K - 1.
        pooled_features: (N, X, Y, Z, C) float zeros, written in place.
        pool_method: 0 for the maximum, 1 for the mean.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape, device or layout; an unknown method.
    """
    check_shape("rois", rois, None, 7)
    check_shape("pts", pts, None, 3)
    check_shape("pts_feature", pts_feature, pts.shape[0], None)
    check_shape("pooled_features", pooled_features, rois.shape[0], None, None, None, pts_feature.shape[1])
    grid = tuple(pooled_features.shape[1:4])
    check_shape("argmax", argmax, *pooled_features.shape)
    check_shape("pts_idx_of_voxels", pts_idx_of_voxels, rois.shape[0], *grid, None)
    check_floating(rois=rois, pts=pts, pts_feature=pts_feature, pooled_features=pooled_features)
    check_same_device(
        rois=rois, pts=pts, pts_feature=pts_feature, argmax=argmax,
        pts_idx_of_voxels=pts_idx_of_voxels, pooled_features=pooled_features,
    )  # fmt: skip
    _check_method(pool_method)
    if pts_idx_of_voxels.dtype != torch.int32 or not pts_idx_of_voxels.is_contiguous():
        raise ValueError("pts_idx_of_voxels must be contiguous int32: it is written in place")
    if pts_idx_of_voxels.shape[4] < 1:
        raise ValueError("pts_idx_of_voxels must have a place for the count in its last dimension")
    points, frames = to_common_dtype(pts, rois)
    features = as_compute_dtype(pts_feature)
    pooled = as_compute_dtype(pooled_features).to(features.dtype, copy=True).contiguous()
    winners = torch.full(pooled.shape, -1, dtype=torch.int32, device=pts.device)
    pts_idx_of_voxels[..., 0] = 0
    if uses_numba(pts):
        _roiaware_cpu(
            as_numpy(points.t()), as_numpy(frames), as_numpy(features), as_numpy(torch.tensor(grid)),
            winners.flatten(1, 3).numpy(), pts_idx_of_voxels.flatten(1, 3).numpy(), pooled.flatten(1, 3).numpy(),
            pool_method == MAX,
        )  # fmt: skip
    else:
        roiaware_torch(points, frames, features, winners, pts_idx_of_voxels, pooled, pool_method)
    pooled_features.copy_(pooled)
    if pool_method == MAX:
        argmax.copy_(winners)


def roiaware_pool3d_backward(
    pts_idx_of_voxels: Tensor, argmax: Tensor, grad_out: Tensor, grad_in: Tensor, pool_method: int
) -> None:
    """Add to `grad_in` the gradient of `roiaware_pool3d_forward` with respect to the features.

    Args:
        pts_idx_of_voxels: (N, X, Y, Z, K) int, from the forward function.
        argmax: (N, X, Y, Z, C) int, from the forward function.
        grad_out: (N, X, Y, Z, C) float.
        grad_in: (P, C) float, added to in place.
        pool_method: 0 for the maximum, 1 for the mean.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; an unknown method.
        IndexError: a row beyond `grad_in`.
    """
    check_shape("grad_in", grad_in, None, None)
    check_shape("grad_out", grad_out, None, None, None, None, grad_in.shape[1])
    check_shape("argmax", argmax, *grad_out.shape)
    check_shape("pts_idx_of_voxels", pts_idx_of_voxels, *grad_out.shape[:4], None)
    check_floating(grad_out=grad_out, grad_in=grad_in)
    check_same_device(pts_idx_of_voxels=pts_idx_of_voxels, argmax=argmax, grad_out=grad_out, grad_in=grad_in)
    _check_method(pool_method)
    channels = grad_in.shape[1]
    grad, winners = as_compute_dtype(grad_out).flatten(0, 3), argmax.flatten(0, 3)
    total = as_compute_dtype(grad_in).to(grad.dtype, copy=True).contiguous()
    if pool_method == MAX:
        cell, channel = torch.nonzero(winners >= 0, as_tuple=True)
        rows = winners[cell, channel].long()
        check_indices("argmax", rows, total.shape[0])
        _add_rows(total.view(-1), rows * channels + channel, grad[cell, channel])
    else:
        held = pts_idx_of_voxels.flatten(0, 3)
        places = torch.arange(1, held.shape[1], device=held.device)
        cell, place = torch.nonzero(places <= held[:, :1], as_tuple=True)
        rows = held[cell, place + 1].long()
        check_indices("pts_idx_of_voxels", rows, total.shape[0])
        _add_rows(total, rows, grad[cell] * (1 / held[cell, :1].to(grad.dtype)))
    grad_in.copy_(total)


def roipoint_pool3d_forward(
    xyz: Tensor, boxes3d: Tensor, pts_feature: Tensor, pooled_features: Tensor, pooled_empty_flag: Tensor
) -> None:
    """Write coordinates and features of the first S points in each box; fewer points are repeated cyclically.

    A box without points has its flag set to 1 and its features unchanged.

    Args:
        xyz: (B, P, 3) float, metres.
        boxes3d: (B, M, 7) float boxes.
        pts_feature: (B, P, C) float.
        pooled_features: (B, M, S, 3 + C) float, written in place.
        pooled_empty_flag: (B, M) int, written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("xyz", xyz, None, None, 3)
    clouds, points_of = xyz.shape[:2]
    check_shape("boxes3d", boxes3d, clouds, None, 7)
    check_shape("pts_feature", pts_feature, clouds, points_of, None)
    boxes_of, width = boxes3d.shape[1], 3 + pts_feature.shape[2]
    check_shape("pooled_features", pooled_features, clouds, boxes_of, None, width)
    check_shape("pooled_empty_flag", pooled_empty_flag, clouds, boxes_of)
    check_floating(xyz=xyz, boxes3d=boxes3d, pts_feature=pts_feature, pooled_features=pooled_features)
    check_same_device(
        xyz=xyz, boxes3d=boxes3d, pts_feature=pts_feature,
        pooled_features=pooled_features, pooled_empty_flag=pooled_empty_flag,
    )  # fmt: skip
    samples = pooled_features.shape[2]
    place = torch.arange(samples, device=xyz.device)
    for cloud in range(clouds):
        points, frames = to_common_dtype(xyz[cloud], boxes3d[cloud])
        rows, number = find_first_inside(points, frames, samples)
        full = number > 0
        pooled_empty_flag[cloud].masked_fill_(~full, 1)
        if points_of == 0:
            continue
        rows = rows.gather(1, place % number.clamp(min=1)[:, None])
        dtype = pooled_features.dtype
        both = torch.cat((xyz[cloud].to(dtype), pts_feature[cloud].to(dtype)), dim=1).detach()
        picked = both[rows]
        pooled_features[cloud] = torch.where(full[:, None, None], picked, pooled_features[cloud])


def find_first_inside(points: Tensor, frames: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Find the first `limit` points in each box, (T, limit) int64 padded with 0, and their number (T,) int64."""
    if not uses_numba(points):
        return find_first_inside_torch(points, frames, limit)
    rows = torch.zeros((frames.shape[0], limit), dtype=torch.int64)
    number = torch.zeros(frames.shape[0], dtype=torch.int64)
    _find_first_inside_cpu(as_numpy(points.t()), as_numpy(frames), rows.numpy(), number.numpy())
    return rows, number


def find_first_inside_torch(points: Tensor, frames: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Run `find_first_inside` on any device."""
    rows = torch.zeros((frames.shape[0], limit), dtype=torch.int64, device=points.device)
    number = torch.zeros(frames.shape[0], dtype=torch.int64, device=points.device)
    for block, hits in inside_blocks(points, frames):
        rows[block], number[block] = first_hits(hits, limit)
    return rows, number


def roiaware_torch(
    points: Tensor,
    frames: Tensor,
    features: Tensor,
    winners: Tensor,
    held: Tensor,
    pooled: Tensor,
    method: int,
) -> None:
    """Pool on any device; `winners` is filled with -1, `pooled` and `held` are contiguous."""
    grid, cap, channels = pooled.shape[1:4], held.shape[4] - 1, features.shape[1]
    cells = grid.numel()
    for block, hits in inside_blocks(points, frames):
        box, point = torch.nonzero(hits, as_tuple=True)
        box = box + block.start
        cell = box * cells + _cells(points[point], frames[box], grid)
        # Group points by cell, in the order of their rows.
        cell, order = torch.sort(cell, stable=True)
        point = point[order]
        new = torch.ones_like(cell, dtype=torch.bool)
        new[1:] = cell[1:] != cell[:-1]
        start = new.nonzero().squeeze(1)
        place = torch.arange(cell.numel(), device=cell.device) - start[torch.cumsum(new, 0) - 1]
        kept = place < cap
        cell, point, place = cell[kept], point[kept], place[kept]
        if cell.numel() == 0:
            continue
        flat = held.flatten(0, 3)
        flat[cell, place + 1] = point.int()
        taken, group, number = torch.unique_consecutive(cell, return_inverse=True, return_counts=True)
        flat[taken, 0] = number.int()
        values = features[point]
        if method == MEAN:
            total = values.new_zeros((taken.numel(), channels))
            _add_rows(total, group, values)
            pooled.flatten(0, 3)[taken] = total / number[:, None].to(total.dtype)
            continue
        lowest = torch.full_like(values, -torch.inf)
        values = torch.where(values > lowest, values, lowest)  # NaN is never the maximum
        into = group[:, None].expand_as(values)
        top = lowest[: taken.numel()].scatter_reduce(0, into, values, "amax")
        place = torch.arange(group.numel(), device=group.device)[:, None].expand_as(values)
        beyond = torch.full_like(place, group.numel())
        first = beyond[: taken.numel()].scatter_reduce(
            0, into, torch.where((values == top[group]) & (values > -torch.inf), place, beyond), "amin"
        )
        found = first < group.numel()
        row = torch.where(found, point[first.clamp(max=group.numel() - 1)], torch.full_like(first, -1))
        winners.flatten(0, 3)[taken] = row.int()
        pooled.flatten(0, 3)[taken] = torch.where(found, top, pooled.flatten(0, 3)[taken])


def _cells(points: Tensor, frames: Tensor, grid: torch.Size) -> Tensor:
    """Compute (K,) int64, the flat cell of each point in its paired box."""
    cx, cy, _, hx, hy, hz, cos, sin, bottom = frames.t()
    dx, dy = points[:, 0] - cx, points[:, 1] - cy
    x, y, z = dx * cos + dy * -sin, dx * sin + dy * cos, points[:, 2] - bottom
    cell = torch.zeros_like(x, dtype=torch.int64)
    for size, offset, half in zip(grid, (x + hx, y + hy, z), (hx, hy, hz), strict=True):
        at = torch.nan_to_num(offset / (half * 2 / size)).clamp(0, size - 1)
        cell = cell * size + at.long()
    return cell


def _check_method(pool_method: int) -> None:
    if pool_method not in (MAX, MEAN):
        raise ValueError(f"pool_method must be 0 (max) or 1 (mean), got {pool_method!r}")


def _add_rows(into: Tensor, rows: Tensor, values: Tensor) -> None:
    """Compute ``into[rows] += values`` with repeated rows, in a fixed order on any device."""
    if into.device.type == "cpu":
        into.index_add_(0, rows, values)
    else:
        into.index_put_((rows,), values, accumulate=True)


@jit
def _cell(offset: float, size: float, count: int) -> int:  # pragma: no cover - compiled
    at = offset / size
    if not at > 0:
        return 0
    return count - 1 if at >= count else int(at)


@jit
def _roiaware_cpu(
    points: Floats,
    frames: Floats,
    features: Floats,
    grid: I64,
    winners: I32,
    held: I32,
    pooled: Floats,
    maximum: bool,
) -> None:  # pragma: no cover - compiled
    n, channels, cap = points.shape[1], features.shape[1], held.shape[2] - 1
    hits = np.empty(n, dtype=np.uint8)
    sizes = np.empty(3, dtype=points.dtype)
    touched = np.empty(min(n, held.shape[1]), dtype=np.int64)
    for box in range(frames.shape[0]):
        mark_inside(points[0], points[1], points[2], frames[box], hits)
        for axis in range(3):
            sizes[axis] = frames[box, 3 + axis] * 2 / grid[axis]
        cells = 0
        for p in range(n):
            if hits[p] == 0:
                continue
            dx, dy = points[0, p] - frames[box, 0], points[1, p] - frames[box, 1]
            cos, sin = frames[box, 6], frames[box, 7]
            x = _cell(dx * cos + dy * -sin + frames[box, 3], sizes[0], grid[0])
            y = _cell(dx * sin + dy * cos + frames[box, 4], sizes[1], grid[1])
            z = _cell(points[2, p] - frames[box, 8], sizes[2], grid[2])
            cell = (x * grid[1] + y) * grid[2] + z
            count = held[box, cell, 0]
            if count >= cap:
                continue
            held[box, cell, count + 1] = p
            held[box, cell, 0] = count + 1
            if maximum:
                for c in range(channels):
                    value = features[p, c]
                    # No point yet: anything above minus infinity is larger. NaN compares false.
                    best = pooled[box, cell, c] if winners[box, cell, c] >= 0 else -np.inf
                    if value > best:
                        pooled[box, cell, c] = value
                        winners[box, cell, c] = p
            else:
                if count == 0:
                    touched[cells] = cell
                    cells += 1
                    pooled[box, cell, :] = 0
                for c in range(channels):
                    pooled[box, cell, c] += features[p, c]
        for i in range(cells):
            for c in range(channels):
                pooled[box, touched[i], c] /= held[box, touched[i], 0]


@jit
def _find_first_inside_cpu(
    points: Floats, frames: Floats, rows: I64, number: I64
) -> None:  # pragma: no cover - compiled
    n, limit = points.shape[1], rows.shape[1]
    x, y, z = points[0], points[1], points[2]
    hits = np.empty(BLOCK, dtype=np.uint8)
    for box in range(frames.shape[0]):
        found = 0
        for begin in range(0, n, BLOCK):
            end = min(n, begin + BLOCK)
            mark_inside(x[begin:end], y[begin:end], z[begin:end], frames[box], hits)
            for k in range(end - begin):
                if hits[k] and found < limit:
                    rows[box, found] = begin + k
                    found += 1
            if found == limit:
                break
        number[box] = found
