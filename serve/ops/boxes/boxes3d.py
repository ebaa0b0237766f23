"""Tests of points in upright 3D boxes.

A box is (x, y, z, x_size, y_size, z_size, yaw): metres and radians, z at the centre of its *bottom*, yaw
counter-clockwise about the z axis. A point on the bottom or the top face is inside, one on a side face is
outside, as in the reference (mmcv 2.1.0 `csrc/common/cuda/points_in_boxes_cuda_kernel.cuh`); so is a point
whose x or y is NaN, but not one whose z is. All is computed in float32, or in float64 where points or boxes are.
Camera boxes do not come here: mmdet3d turns their boxes into this frame first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_compute_dtype,
    as_numpy,
    check_floating,
    check_same_device,
    check_shape,
    uses_numba,
)
from serve.ops.cpu.jit import jit

__all__ = ["points_in_boxes_all_forward", "points_in_boxes_cpu_forward", "points_in_boxes_part_forward"]

Floats = npt.NDArray[np.floating]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# Pairs of a point and a box per block of the torch versions.
PAIRS_PER_BLOCK = 1 << 23


def points_in_boxes_part_forward(
    boxes_tensor: Tensor, pts_tensor: Tensor, box_idx_of_points_tensor: Tensor
) -> None:
    """Write the first box that contains each point; the elements of other points are unchanged (mmcv passes -1).

    Args:
        boxes_tensor: (B, T, 7) float.
        pts_tensor: (B, M, 3) float, metres.
        box_idx_of_points_tensor: (B, M) int, written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    clouds, points_of, _ = _check(boxes_tensor, pts_tensor)
    check_shape("box_idx_of_points_tensor", box_idx_of_points_tensor, clouds, points_of)
    check_same_device(pts_tensor=pts_tensor, box_idx_of_points_tensor=box_idx_of_points_tensor)
    for points, boxes, out in zip(pts_tensor, boxes_tensor, box_idx_of_points_tensor, strict=True):
        points, frames = to_common_dtype(points, boxes)
        if uses_numba(points):
            first = torch.full((points_of,), -1, dtype=torch.int32)
            _first_box_cpu(as_numpy(points.t()), as_numpy(frames), first.numpy())
        else:
            first = first_box_torch(points, frames)
        out.copy_(torch.where(first >= 0, first.to(out.dtype), out))


def points_in_boxes_cpu_forward(boxes_tensor: Tensor, pts_tensor: Tensor, pts_indices_tensor: Tensor) -> None:
    """Write 1 if a point is in a box, else 0, for one point cloud; on any device despite the name.

    Args:
        boxes_tensor: (T, 7) float.
        pts_tensor: (M, 3) float, metres.
        pts_indices_tensor: (T, M) int, written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("boxes_tensor", boxes_tensor, None, 7)
    check_shape("pts_tensor", pts_tensor, None, 3)
    _check(boxes_tensor[None], pts_tensor[None])
    check_shape("pts_indices_tensor", pts_indices_tensor, boxes_tensor.shape[0], pts_tensor.shape[0])
    check_same_device(pts_tensor=pts_tensor, pts_indices_tensor=pts_indices_tensor)
    pts_indices_tensor.copy_(inside(pts_tensor, boxes_tensor))


def points_in_boxes_all_forward(
    boxes_tensor: Tensor, pts_tensor: Tensor, box_idx_of_points_tensor: Tensor
) -> None:
    """Write 1 if a point is in a box; other elements are unchanged (mmcv passes 0).

    Args:
        boxes_tensor: (B, T, 7) float.
        pts_tensor: (B, M, 3) float, metres.
        box_idx_of_points_tensor: (B, M, T) int, written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    clouds, points_of, boxes_of = _check(boxes_tensor, pts_tensor)
    check_shape("box_idx_of_points_tensor", box_idx_of_points_tensor, clouds, points_of, boxes_of)
    check_same_device(pts_tensor=pts_tensor, box_idx_of_points_tensor=box_idx_of_points_tensor)
    for points, boxes, out in zip(pts_tensor, boxes_tensor, box_idx_of_points_tensor, strict=True):
        out.masked_fill_(inside(points, boxes).t(), 1)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Test which of the points (M, 3) lie in which of the boxes (T, 7); (T, M) bool."""
    points, frames = to_common_dtype(points, boxes)
    if uses_numba(points):
        hits = torch.empty((boxes.shape[0], points.shape[0]), dtype=torch.bool)
        _inside_cpu(as_numpy(points.t()), as_numpy(frames), hits.view(torch.uint8).numpy())
        return hits
    blocks = [hits for _, hits in inside_blocks(points, frames)]
    return torch.cat(blocks) if blocks else points.new_zeros((0, points.shape[0]), dtype=torch.bool)


def to_common_dtype(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Convert points, and boxes to (T, 9) frames, to a common dtype.

    A frame is the centre, half the sizes, cosine and sine of -yaw, and z of the bottom.
    """
    dtype = torch.promote_types(as_compute_dtype(points).dtype, as_compute_dtype(boxes).dtype)
    points, boxes = points.detach().to(dtype), boxes.detach().to(dtype)
    half = boxes[:, 3:6] / 2
    centre = torch.cat((boxes[:, :2], boxes[:, 2:3] + half[:, 2:3]), dim=1)
    turn = -boxes[:, 6:7]
    return points, torch.cat((centre, half, torch.cos(turn), torch.sin(turn), boxes[:, 2:3]), dim=1)


def inside_blocks(points: Tensor, frames: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of (boxes, M) bool on any device."""
    rows = max(1, PAIRS_PER_BLOCK // max(1, points.shape[0]))
    x, y, z = points.t()[:, None]
    for begin in range(0, frames.shape[0], rows):
        block = slice(begin, begin + rows)
        cx, cy, cz, hx, hy, hz, cos, sin, _ = frames[block].t()[..., None]
        dx, dy = x - cx, y - cy
        along, across = dx * cos + dy * -sin, dx * sin + dy * cos
        # As in the reference a height that is no number is inside, and float64 ones are compared in float32.
        yield (
            block,
            ~((z - cz).abs().float() > hz) & (along > -hx) & (along < hx) & (across > -hy) & (across < hy),
        )


def first_box_torch(points: Tensor, frames: Tensor) -> Tensor:
    """Find the first box that contains each point on any device; (M,) int64, -1 for none."""
    beyond = frames.shape[0]
    first = torch.full((points.shape[0],), beyond, dtype=torch.int64, device=points.device)
    for block, hits in inside_blocks(points, frames):
        box = torch.arange(beyond, device=points.device)[block, None]
        first = torch.minimum(first, torch.where(hits, box, torch.full_like(box, beyond)).amin(dim=0))
    return torch.where(first < beyond, first, torch.full_like(first, -1))


def _check(boxes: Tensor, points: Tensor) -> tuple[int, int, int]:
    """Check the arguments; return the number of point clouds, points and boxes."""
    check_shape("boxes_tensor", boxes, None, None, 7)
    check_shape("pts_tensor", points, boxes.shape[0], None, 3)
    check_floating(boxes_tensor=boxes, pts_tensor=points)
    check_same_device(boxes_tensor=boxes, pts_tensor=points)
    return boxes.shape[0], points.shape[1], boxes.shape[1]


@jit
def mark_inside(
    x: Floats, y: Floats, z: Floats, frame: Floats, hits: U8
) -> None:  # pragma: no cover - compiled
    """Set `hits` to 1 for points in the box `frame`, else to 0. Branch-free, to be vectorised."""
    cx, cy, cz, hx, hy, hz = frame[0], frame[1], frame[2], frame[3], frame[4], frame[5]
    cos, sin = frame[6], frame[7]
    for k in range(x.shape[0]):
        dx, dy = x[k] - cx, y[k] - cy
        along, across = dx * cos + dy * -sin, dx * sin + dy * cos
        hits[k] = (
            (not np.float32(abs(z[k] - cz)) > hz) & (along > -hx) & (along < hx) & (across > -hy) & (across < hy)
        )  # fmt: skip


@jit
def _inside_cpu(points: Floats, frames: Floats, hits: U8) -> None:  # pragma: no cover - compiled
    for box in range(frames.shape[0]):
        mark_inside(points[0], points[1], points[2], frames[box], hits[box])


@jit
def _first_box_cpu(points: Floats, frames: Floats, first: I32) -> None:  # pragma: no cover - compiled
    hits = np.empty(points.shape[1], dtype=np.uint8)
    for back in range(frames.shape[0]):
        box = frames.shape[0] - 1 - back
        mark_inside(points[0], points[1], points[2], frames[box], hits)
        for k in range(hits.shape[0]):
            first[k] = box if hits[k] else first[k]
