"""Gathering, grouping and interpolation of point features by given rows.

Everything is indexing, so torch does it on any device. Gradients are summed in float32 or float64 and, unlike the
reference's (mmcv 2.1.0 `csrc/common/cuda/gather_points_cuda_kernel.cuh`, `group_points_cuda_kernel.cuh`,
`stack_group_points_cuda_kernel.cuh`, `three_interpolate_cuda_kernel.cuh`), in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import (
    as_compute_dtype,
    check_floating,
    check_indices,
    check_same_device,
    check_shape,
    check_writable_from,
)
from serve.ops.points.neighbours import counts

__all__ = [
    "gather_points_backward",
    "gather_points_forward",
    "group_points_backward",
    "group_points_forward",
    "stack_group_points_backward",
    "stack_group_points_forward",
    "three_interpolate_backward",
    "three_interpolate_forward",
]


def gather_points_forward(
    points_tensor: Tensor, idx_tensor: Tensor, out_tensor: Tensor, b: int, c: int, n: int, npoints: int
) -> None:
    """Write the features of the points at given rows.

    Args:
        points_tensor: (b, c, n) features.
        idx_tensor: (b, npoints) int, rows in [0, n).
        out_tensor: (b, c, npoints), written in place.
        b: point clouds.
        c: channels.
        n: points per cloud.
        npoints: gathered points per cloud.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: a row out of range.
    """
    check_shape("points_tensor", points_tensor, b, c, n)
    check_shape("idx_tensor", idx_tensor, b, npoints)
    check_shape("out_tensor", out_tensor, b, c, npoints)
    check_writable_from("out_tensor", out_tensor, "points_tensor", points_tensor)
    check_same_device(points_tensor=points_tensor, idx_tensor=idx_tensor, out_tensor=out_tensor)
    check_indices("idx_tensor", idx_tensor, n)
    out_tensor.copy_(_pick(points_tensor.detach(), idx_tensor))


def gather_points_backward(
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    grad_points_tensor: Tensor,
    b: int,
    c: int,
    n: int,
    npoints: int,
) -> None:
    """Add to `grad_points_tensor` (b, c, n) the gradient of `gather_points_forward`.

    Args:
        grad_out_tensor: (b, c, npoints).
        idx_tensor: (b, npoints) int, rows in [0, n).
        grad_points_tensor: (b, c, n), added to in place.
        b: point clouds.
        c: channels.
        n: points per cloud.
        npoints: gathered points per cloud.

    Raises:
        TypeError, ValueError, IndexError: as the forward function.
    """
    check_shape("grad_out_tensor", grad_out_tensor, b, c, npoints)
    check_shape("idx_tensor", idx_tensor, b, npoints)
    _add(grad_out_tensor, idx_tensor, grad_points_tensor, b, c, n)


def group_points_forward(
    points_tensor: Tensor,
    idx_tensor: Tensor,
    out_tensor: Tensor,
    b: int,
    c: int,
    n: int,
    npoints: int,
    nsample: int,
) -> None:
    """Write the features of the neighbours of each centre.

    Args:
        points_tensor: (b, c, n) features.
        idx_tensor: (b, npoints, nsample) int, rows in [0, n).
        out_tensor: (b, c, npoints, nsample), written in place.
        b: point clouds.
        c: channels.
        n: points per cloud.
        npoints: centres per cloud.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: a row out of range.
    """
    check_shape("points_tensor", points_tensor, b, c, n)
    check_shape("idx_tensor", idx_tensor, b, npoints, nsample)
    check_shape("out_tensor", out_tensor, b, c, npoints, nsample)
    check_writable_from("out_tensor", out_tensor, "points_tensor", points_tensor)
    check_same_device(points_tensor=points_tensor, idx_tensor=idx_tensor, out_tensor=out_tensor)
    check_indices("idx_tensor", idx_tensor, n)
    picked = _pick(points_tensor.detach(), idx_tensor.reshape(b, npoints * nsample))
    out_tensor.copy_(picked.view(out_tensor.shape))


def group_points_backward(
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    grad_points_tensor: Tensor,
    b: int,
    c: int,
    n: int,
    npoints: int,
    nsample: int,
) -> None:
    """Add to `grad_points_tensor` (b, c, n) the gradient of `group_points_forward`.

    Args:
        grad_out_tensor: (b, c, npoints, nsample).
        idx_tensor: (b, npoints, nsample) int, rows in [0, n).
        grad_points_tensor: (b, c, n), added to in place.
        b: point clouds.
        c: channels.
        n: points per cloud.
        npoints: centres per cloud.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError, IndexError: as the forward function.
    """
    check_shape("grad_out_tensor", grad_out_tensor, b, c, npoints, nsample)
    check_shape("idx_tensor", idx_tensor, b, npoints, nsample)
    flat = npoints * nsample
    _add(grad_out_tensor.reshape(b, c, flat), idx_tensor.reshape(b, flat), grad_points_tensor, b, c, n)


def stack_group_points_forward(
    features_tensor: Tensor,
    features_batch_cnt_tensor: Tensor,
    idx_tensor: Tensor,
    idx_batch_cnt_tensor: Tensor,
    out_tensor: Tensor,
    b: int,
    c: int,
    m: int,
    nsample: int,
) -> None:
    """Run `group_points_forward` on stacked clouds of different sizes; a cloud without points gives zeros.

    Args:
        features_tensor: (N1 + N2 + …, c) features.
        features_batch_cnt_tensor: (b,) int, N1, N2, ….
        idx_tensor: (m, nsample) int, rows relative to the cloud.
        idx_batch_cnt_tensor: (b,) int, centres per cloud; their sum is m.
        out_tensor: (m, c, nsample), written in place.
        b: point clouds.
        c: channels.
        m: centres of all clouds.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; counts that do not add up.
        IndexError: a row out of its cloud's range (mmcv's ball query marks an empty ball with -1; replace it, as
            mmdet3d does).
    """
    check_shape("features_tensor", features_tensor, None, c)
    check_shape("idx_tensor", idx_tensor, m, nsample)
    check_shape("out_tensor", out_tensor, m, c, nsample)
    check_writable_from("out_tensor", out_tensor, "features_tensor", features_tensor)
    check_same_device(features_tensor=features_tensor, idx_tensor=idx_tensor, out_tensor=out_tensor)
    rows, empty = _stack_rows(
        idx_tensor, idx_batch_cnt_tensor, features_batch_cnt_tensor, features_tensor.shape[0], b
    )
    if features_tensor.shape[0] == 0:
        out_tensor.zero_()
        return
    out_tensor.copy_(features_tensor.detach()[rows].transpose(1, 2))
    if empty is not None:
        out_tensor[empty] = 0


def stack_group_points_backward(
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    idx_batch_cnt_tensor: Tensor,
    features_batch_cnt_tensor: Tensor,
    grad_features_tensor: Tensor,
    b: int,
    c: int,
    m: int,
    n: int,
    nsample: int,
) -> None:
    """Add to `grad_features_tensor` (n, c) the gradient of `stack_group_points_forward`.

    Args:
        grad_out_tensor: (m, c, nsample).
        idx_tensor: (m, nsample) int, rows relative to the cloud.
        idx_batch_cnt_tensor: (b,) int, centres per cloud.
        features_batch_cnt_tensor: (b,) int, points per cloud.
        grad_features_tensor: (n, c), added to in place.
        b: point clouds.
        c: channels.
        m: centres of all clouds.
        n: points of all clouds.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError, IndexError: as the forward function.
    """
    check_shape("grad_out_tensor", grad_out_tensor, m, c, nsample)
    check_shape("idx_tensor", idx_tensor, m, nsample)
    check_shape("grad_features_tensor", grad_features_tensor, n, c)
    check_floating(grad_out_tensor=grad_out_tensor, grad_features_tensor=grad_features_tensor)
    check_same_device(
        grad_out_tensor=grad_out_tensor, idx_tensor=idx_tensor, grad_features_tensor=grad_features_tensor
    )
    rows, empty = _stack_rows(idx_tensor, idx_batch_cnt_tensor, features_batch_cnt_tensor, n, b)
    if n == 0:
        return
    grad = grad_out_tensor.detach()
    if empty is not None:
        grad = grad.clone()
        grad[empty] = 0
    flat = grad.permute(1, 0, 2).reshape(1, c, m * nsample)
    _add(flat, rows.reshape(1, m * nsample), grad_features_tensor.t()[None], 1, c, n)


def three_interpolate_forward(
    points_tensor: Tensor,
    idx_tensor: Tensor,
    weight_tensor: Tensor,
    out_tensor: Tensor,
    b: int,
    c: int,
    m: int,
    n: int,
) -> None:
    """Write the weighted sum of the features of three points.

    Args:
        points_tensor: (b, c, m) float features.
        idx_tensor: (b, n, 3) int, rows in [0, m).
        weight_tensor: (b, n, 3) float.
        out_tensor: (b, c, n) float, written in place.
        b: point clouds.
        c: channels.
        m: known points per cloud.
        n: interpolated points per cloud.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: a row out of range.
    """
    check_shape("points_tensor", points_tensor, b, c, m)
    check_shape("idx_tensor", idx_tensor, b, n, 3)
    check_shape("weight_tensor", weight_tensor, b, n, 3)
    check_shape("out_tensor", out_tensor, b, c, n)
    check_floating(points_tensor=points_tensor, weight_tensor=weight_tensor, out_tensor=out_tensor)
    check_same_device(
        points_tensor=points_tensor, idx_tensor=idx_tensor, weight_tensor=weight_tensor, out_tensor=out_tensor
    )
    check_indices("idx_tensor", idx_tensor, m)
    points, weight = as_compute_dtype(points_tensor), as_compute_dtype(weight_tensor)
    total = _pick(points, idx_tensor[..., 0]).mul_(weight[:, None, :, 0])
    for corner in (1, 2):
        total.addcmul_(_pick(points, idx_tensor[..., corner]), weight[:, None, :, corner])
    out_tensor.copy_(total)


def three_interpolate_backward(
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    weight_tensor: Tensor,
    grad_points_tensor: Tensor,
    b: int,
    c: int,
    n: int,
    m: int,
) -> None:
    """Add to `grad_points_tensor` (b, c, m) the gradient of `three_interpolate_forward`.

    Args:
        grad_out_tensor: (b, c, n).
        idx_tensor: (b, n, 3) int, rows in [0, m).
        weight_tensor: (b, n, 3) float.
        grad_points_tensor: (b, c, m), added to in place.
        b: point clouds.
        c: channels.
        n: interpolated points per cloud.
        m: known points per cloud.

    Raises:
        TypeError, ValueError, IndexError: as the forward function.
    """
    check_shape("grad_out_tensor", grad_out_tensor, b, c, n)
    check_shape("idx_tensor", idx_tensor, b, n, 3)
    check_shape("weight_tensor", weight_tensor, b, n, 3)
    check_floating(grad_out_tensor=grad_out_tensor, weight_tensor=weight_tensor)
    check_same_device(grad_out_tensor=grad_out_tensor, idx_tensor=idx_tensor, weight_tensor=weight_tensor)
    grad = as_compute_dtype(grad_out_tensor)[..., None] * as_compute_dtype(weight_tensor)[:, None]
    _add(grad.reshape(b, c, n * 3), idx_tensor.reshape(b, n * 3), grad_points_tensor, b, c, m)


def _pick(features: Tensor, rows: Tensor) -> Tensor:
    """Gather (B, C, K) from (B, C, N) at checked rows (B, K)."""
    return features.gather(2, rows[:, None].long().expand(-1, features.shape[1], -1))


def _add(grad: Tensor, rows: Tensor, into: Tensor, b: int, c: int, n: int) -> None:
    """Add (B, C, K) to `into` (B, C, N) at the rows (B, K), in a fixed order."""
    check_shape("grad_points_tensor", into, b, c, n)
    check_floating(grad_out_tensor=grad, grad_points_tensor=into)
    check_same_device(grad_out_tensor=grad, idx_tensor=rows, grad_points_tensor=into)
    check_indices("idx_tensor", rows, n)
    if rows.numel() == 0:
        return
    grad, rows = as_compute_dtype(grad), rows.long()
    total = as_compute_dtype(into).to(grad.dtype, copy=True)
    if total.device.type == "cpu":
        total.scatter_add_(2, rows[:, None].expand(-1, c, -1), grad)
    else:
        # scatter_add_ uses atomics on CUDA; index_put_ sorts first, so its order is fixed.
        start = torch.arange(b, device=rows.device)[:, None] * n
        flat = total.transpose(1, 2).reshape(b * n, c)
        flat.index_put_(((rows + start).flatten(),), grad.transpose(1, 2).flatten(0, 1), accumulate=True)
        total = flat.view(b, n, c).transpose(1, 2)
    into.copy_(total)


def _stack_rows(
    idx: Tensor, centre_counts: Tensor, point_counts: Tensor, n: int, b: int
) -> tuple[Tensor, Tensor | None]:
    """Convert rows relative to each cloud to rows of the stack; also mark centres of clouds without points."""
    centres_of = counts("idx_batch_cnt_tensor", centre_counts, idx.shape[0])
    points_of = counts("features_batch_cnt_tensor", point_counts, n)
    if len(centres_of) != b or len(points_of) != b:
        raise ValueError(f"both batch counts must hold b={b} numbers, got {centres_of} and {points_of}")
    start = 0
    rows = torch.zeros(idx.shape, dtype=torch.int64, device=idx.device)
    empty = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    first_centre = 0
    for size, centres in zip(points_of, centres_of, strict=True):
        of_cloud = slice(first_centre, first_centre + centres)
        if size > 0:
            check_indices("idx_tensor", idx[of_cloud], size)
            rows[of_cloud] = idx[of_cloud].long() + start
        else:
            empty[of_cloud] = True
        start += size
        first_centre += centres
    return rows, (empty if 0 in points_of else None)
