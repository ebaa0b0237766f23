"""Weighted sums of neighbour features by score (PAConv), and the chamfer distance of point sets in the plane.

The reference is mmcv 2.1.0 `csrc/common/cuda/assign_score_withk_cuda_kernel.cuh` and
`chamfer_distance_cuda_kernel.cuh`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
from serve.ops.points.nearest import nearest
from serve.ops.points.neighbours import KNN_REACH

__all__ = [
    "assign_score_withk_backward",
    "assign_score_withk_forward",
    "chamfer_distance_backward",
    "chamfer_distance_forward",
]

Floats = npt.NDArray[np.floating]
I64 = npt.NDArray[np.int64]
# Gathered features that the torch version holds at once.
FEATURES_PER_BLOCK = 1 << 24


def assign_score_withk_forward(
    points: Tensor,
    centers: Tensor,
    scores: Tensor,
    knn_idx: Tensor,
    output: Tensor,
    B: int,
    N0: int,
    N1: int,
    M: int,
    K: int,
    O: int,  # noqa: E741 - mmcv's name
    aggregate: int,
) -> None:
    """Add to `output` the sum over m of (points of the neighbour - centers of the first neighbour) * scores.

    A neighbour outside [0, N0) is ignored: its element is unchanged. Sums are in float32 or float64.

    Args:
        points: (B, N0, M, O) float, features of each point under each of M weight matrices.
        centers: (B, N0, M, O) float.
        scores: (B, N1, K, M) float.
        knn_idx: (B, N1, K) int, neighbours of each centre; the first is the centre itself.
        output: (B, O, N1, K) float, added to in place (mmcv gives zeros).
        B: clouds.
        N0: points of each.
        N1: centres of each.
        M: weight matrices.
        K: neighbours of each centre.
        O: channels.
        aggregate: 0, 1 or 2 ("sum", "avg", "max"); without effect, as in the reference.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; an unknown `aggregate`.
        IndexError: a centre out of range that has neighbours within.
    """
    _check_assign(points, centers, scores, knn_idx, (B, N0, N1, M, K, O), aggregate, output=output)
    if output.numel() == 0 or N0 == 0:
        return
    dtype = torch.promote_types(as_compute_dtype(points).dtype, as_compute_dtype(scores).dtype)
    points, centers, scores = (part.detach().to(dtype) for part in (points, centers, scores))
    total = output.detach().to(dtype, copy=True).contiguous()
    if uses_numba(points):
        _assign_cpu(
            as_numpy(points), as_numpy(centers), as_numpy(scores), as_numpy(knn_idx.long()), total.numpy()
        )
    else:
        assign_torch(points, centers, scores, knn_idx, total)
    output.copy_(total)


def assign_score_withk_backward(
    grad_out: Tensor,
    points: Tensor,
    centers: Tensor,
    scores: Tensor,
    knn_idx: Tensor,
    grad_points: Tensor,
    grad_centers: Tensor,
    grad_scores: Tensor,
    B: int,
    N0: int,
    N1: int,
    M: int,
    K: int,
    O: int,  # noqa: E741 - mmcv's name
    aggregate: int,
) -> None:
    """Add the gradients of `assign_score_withk_forward` to the ``grad_`` tensors; arguments as there."""
    _check_assign(points, centers, scores, knn_idx, (B, N0, N1, M, K, O), aggregate, grad_out=grad_out)
    targets = {"grad_points": grad_points, "grad_centers": grad_centers, "grad_scores": grad_scores}
    for (name, target), like in zip(targets.items(), (points, centers, scores), strict=True):
        check_shape(name, target, *like.shape)
        check_floating(**{name: target})
        check_same_device(**{"points": points, name: target})
    if grad_out.numel() == 0 or N0 == 0:
        return
    dtype = torch.promote_types(as_compute_dtype(points).dtype, as_compute_dtype(scores).dtype)
    with torch.enable_grad():
        leaves = [part.detach().to(dtype).requires_grad_() for part in (points, centers, scores)]
        total = torch.zeros(grad_out.shape, dtype=dtype, device=grad_out.device)
        assign_torch(leaves[0], leaves[1], leaves[2], knn_idx, total)
        grads = torch.autograd.grad(total, leaves, grad_out.to(dtype), allow_unused=True)
    for target, grad in zip(targets.values(), grads, strict=True):
        if grad is not None:
            target += grad


def _check_assign(
    points: Tensor,
    centers: Tensor,
    scores: Tensor,
    knn_idx: Tensor,
    sizes: tuple[int, ...],
    aggregate: int,
    **summed: Tensor,
) -> None:
    clouds, n0, n1, m, k, channels = sizes
    check_shape("points", points, clouds, n0, m, channels)
    check_shape("centers", centers, clouds, n0, m, channels)
    check_shape("scores", scores, clouds, n1, k, m)
    check_shape("knn_idx", knn_idx, clouds, n1, k)
    for name, tensor in summed.items():
        check_shape(name, tensor, clouds, channels, n1, k)
    check_floating(points=points, centers=centers, scores=scores, **summed)
    check_same_device(points=points, centers=centers, scores=scores, knn_idx=knn_idx, **summed)
    if knn_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"knn_idx must be int32 or int64, got {knn_idx.dtype}")
    if aggregate not in (0, 1, 2):
        raise ValueError(f"aggregate must be 0 (sum), 1 (avg) or 2 (max), got {aggregate!r}")
    near = (knn_idx >= 0) & (knn_idx < n0)
    if bool((near & ~near[..., :1]).any()):
        raise IndexError(f"knn_idx must begin each row with the centre, a row in [0, {n0})")


def assign_torch(points: Tensor, centers: Tensor, scores: Tensor, knn_idx: Tensor, output: Tensor) -> None:
    """Add the sums on any device, in blocks of centres."""
    _, n1, k, m = scores.shape
    rows = max(1, FEATURES_PER_BLOCK // max(1, k * m * points.shape[3]))
    for cloud in range(points.shape[0]):
        for begin in range(0, n1, rows):
            block = slice(begin, begin + rows)
            idx = knn_idx[cloud, block].long()
            near = (idx >= 0) & (idx < points.shape[1])
            idx = torch.where(near, idx, torch.zeros_like(idx))
            offset = points[cloud][idx] - centers[cloud][idx[:, :1]]
            weight = torch.where(near[..., None], scores[cloud, block], scores.new_zeros(()))
            added = torch.where(near[..., None], torch.einsum("rkmo,rkm->rko", offset, weight), 0)
            output[cloud, :, block] += added.permute(2, 0, 1)


def chamfer_distance_forward(
    xyz1: Tensor, xyz2: Tensor, dist1: Tensor, dist2: Tensor, idx1: Tensor, idx2: Tensor
) -> None:
    """Write the squared distance from each point to the nearest of the other set, both ways, and its row.

    The first of equally near points is chosen; among more than two, distances of 1e10 and above count as 1e10 and name
    row 0. If the other set is empty, nothing is written.

    Args:
        xyz1: (B, N, 2) float.
        xyz2: (B, M, 2) float.
        dist1: (B, N) float, written in place.
        dist2: (B, M) float, written in place.
        idx1: (B, N) int, rows of `xyz2`, written in place.
        idx2: (B, M) int, rows of `xyz1`, written in place.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("xyz1", xyz1, None, None, 2)
    check_shape("xyz2", xyz2, xyz1.shape[0], None, 2)
    for number, points, dist, idx in ((1, xyz1, dist1, idx1), (2, xyz2, dist2, idx2)):
        check_shape(f"dist{number}", dist, *points.shape[:2])
        check_shape(f"idx{number}", idx, *points.shape[:2])
    check_floating(xyz1=xyz1, xyz2=xyz2, dist1=dist1, dist2=dist2)
    check_same_device(xyz1=xyz1, xyz2=xyz2, dist1=dist1, dist2=dist2, idx1=idx1, idx2=idx2)
    if xyz1.shape[1] == 0 or xyz2.shape[1] == 0:
        return
    # The search is in 3D: put both sets in the plane z = 0.
    first, second = (torch.nn.functional.pad(as_compute_dtype(points), (0, 1)) for points in (xyz1, xyz2))
    for cloud in range(xyz1.shape[0]):
        for own, other, dist, idx in (
            (first[cloud], second[cloud], dist1[cloud], idx1[cloud]),
            (second[cloud], first[cloud], dist2[cloud], idx2[cloud]),
        ):
            # The reference searches two points without a limit, more of them up to one.
            near, rows = nearest(own, other, 1, float("inf") if other.shape[0] == 2 else KNN_REACH)
            dist.copy_(near[:, 0])
            idx.copy_(rows[:, 0])


def chamfer_distance_backward(
    xyz1: Tensor,
    xyz2: Tensor,
    idx1: Tensor,
    idx2: Tensor,
    grad_dist1: Tensor,
    grad_dist2: Tensor,
    grad_xyz1: Tensor,
    grad_xyz2: Tensor,
) -> None:
    """Add the gradients of `chamfer_distance_forward` to `grad_xyz1` (B, N, 2) and `grad_xyz2` (B, M, 2).

    `idx1` and `idx2` are as the forward function wrote them.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: a row out of range.
    """
    check_shape("xyz1", xyz1, None, None, 2)
    check_shape("xyz2", xyz2, xyz1.shape[0], None, 2)
    check_shape("grad_xyz1", grad_xyz1, *xyz1.shape)
    check_shape("grad_xyz2", grad_xyz2, *xyz2.shape)
    check_floating(xyz1=xyz1, xyz2=xyz2, grad_xyz1=grad_xyz1, grad_xyz2=grad_xyz2)
    check_same_device(xyz1=xyz1, xyz2=xyz2, grad_xyz1=grad_xyz1, grad_xyz2=grad_xyz2)
    first, second = as_compute_dtype(xyz1), as_compute_dtype(xyz2)
    for number, own, other, idx, grad, into, into_other in (
        (1, first, second, idx1, grad_dist1, grad_xyz1, grad_xyz2),
        (2, second, first, idx2, grad_dist2, grad_xyz2, grad_xyz1),
    ):
        check_shape(f"idx{number}", idx, *own.shape[:2])
        check_shape(f"grad_dist{number}", grad, *own.shape[:2])
        check_floating(**{f"grad_dist{number}": grad})
        check_same_device(**{"xyz1": xyz1, f"idx{number}": idx, f"grad_dist{number}": grad})
        if own.shape[1] == 0 or other.shape[1] == 0:
            continue
        check_indices(f"idx{number}", idx, other.shape[1])
        cloud = torch.arange(own.shape[0], device=own.device)[:, None].expand(idx.shape)
        slope = 2 * as_compute_dtype(grad)[..., None] * (own - other[cloud, idx.long()])
        into += slope
        into_other.index_put_((cloud, idx.long()), -slope.to(into_other.dtype), accumulate=True)


@jit
def _assign_cpu(
    points: Floats, centers: Floats, scores: Floats, idx: I64, output: Floats
) -> None:  # pragma: no cover - compiled
    clouds, n1, k_of = idx.shape
    n0, m_of, o_of = points.shape[1], points.shape[2], points.shape[3]
    total = np.empty(o_of, dtype=points.dtype)
    for b in range(clouds):
        for n in range(n1):
            centre = idx[b, n, 0]
            for k in range(k_of):
                neighbour = idx[b, n, k]
                if neighbour < 0 or neighbour >= n0:
                    continue
                for o in range(o_of):
                    total[o] = output[b, o, n, k]
                for m in range(m_of):
                    _add_weighted(points[b, neighbour, m], centers[b, centre, m], scores[b, n, k, m], total)
                for o in range(o_of):
                    output[b, o, n, k] = total[o]


@jit
def _add_weighted(
    feature: Floats, centre: Floats, score: float, total: Floats
) -> None:  # pragma: no cover - compiled
    for o in range(total.shape[0]):
        total[o] += feature[o] * score - centre[o] * score
