"""Neighbour searches in 3D: ball query, k nearest, three nearest.

Every centre is compared with every point, as in the reference (mmcv 2.1.0 `csrc/common/cuda/`
`ball_query_cuda_kernel.cuh`, `stack_ball_query_cuda_kernel.cuh`, `knn_cuda_kernel.cuh`,
`three_nn_cuda_kernel.cuh`), in the precision of the coordinates. Of equally near points the one of the
lower row comes first; in k-NN on the CPU, as the reference's heap leaves them. A point with a NaN
coordinate has no neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    uses_numba,
)
from serve.ops.cpu.jit import jit
from serve.ops.points.nearest import BLOCK, distance_blocks, in_one_dtype, nearest, squared_distances

__all__ = ["ball_query_forward", "knn_forward", "stack_ball_query_forward", "three_nn_forward"]

Floats = npt.NDArray[np.floating]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
# Upper bound of squared distances of k-NN, square metres, as in the reference.
KNN_REACH = 1e10
# And none of the three nearest.
NN_REACH = 1e40


def ball_query_forward(
    new_xyz_tensor: Tensor,
    xyz_tensor: Tensor,
    idx_tensor: Tensor,
    b: int,
    n: int,
    m: int,
    min_radius: float,
    max_radius: float,
    nsample: int,
) -> None:
    """Find the first `nsample` points, by row, with min_radius <= distance < max_radius, or at the centre itself.

    A ball with fewer points is padded with its first; an empty one leaves its row of `idx_tensor` unchanged.

    Args:
        new_xyz_tensor: (b, m, 3) float centres, metres.
        xyz_tensor: (b, n, 3) float points, metres.
        idx_tensor: (b, m, nsample) int, written in place with rows of `xyz_tensor`.
        b: point clouds.
        n: points per cloud.
        m: centres per cloud.
        min_radius: inner radius, metres.
        max_radius: outer radius, metres, exclusive.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("new_xyz_tensor", new_xyz_tensor, b, m, 3)
    check_shape("xyz_tensor", xyz_tensor, b, n, 3)
    check_shape("idx_tensor", idx_tensor, b, m, nsample)
    _check_points(idx_tensor, new_xyz_tensor=new_xyz_tensor, xyz_tensor=xyz_tensor)
    for cloud in range(b):
        _ball_query(new_xyz_tensor[cloud], xyz_tensor[cloud], idx_tensor[cloud], min_radius, max_radius, True)


def stack_ball_query_forward(
    new_xyz_tensor: Tensor,
    new_xyz_batch_cnt: Tensor,
    xyz_tensor: Tensor,
    xyz_batch_cnt: Tensor,
    idx_tensor: Tensor,
    max_radius: float,
    nsample: int,
) -> None:
    """Run `ball_query_forward` on stacked clouds of different sizes; an empty ball's row starts with -1.

    Args:
        new_xyz_tensor: (M1 + M2 + …, 3) float centres, metres.
        new_xyz_batch_cnt: (B,) int, M1, M2, ….
        xyz_tensor: (N1 + N2 + …, 3) float points, metres.
        xyz_batch_cnt: (B,) int, N1, N2, ….
        idx_tensor: (M1 + M2 + …, nsample) int, written in place with rows relative to the cloud.
        max_radius: metres, exclusive.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; counts that do not add up.
    """
    check_shape("new_xyz_tensor", new_xyz_tensor, None, 3)
    check_shape("xyz_tensor", xyz_tensor, None, 3)
    check_shape("idx_tensor", idx_tensor, new_xyz_tensor.shape[0], nsample)
    _check_points(idx_tensor, new_xyz_tensor=new_xyz_tensor, xyz_tensor=xyz_tensor)
    centres_of = counts("new_xyz_batch_cnt", new_xyz_batch_cnt, new_xyz_tensor.shape[0])
    points_of = counts("xyz_batch_cnt", xyz_batch_cnt, xyz_tensor.shape[0])
    if len(centres_of) != len(points_of):
        raise ValueError(
            f"xyz_batch_cnt must have as many counts as new_xyz_batch_cnt, got {len(points_of)} "
            f"and {len(centres_of)}"
        )
    parts = zip(
        torch.split(new_xyz_tensor, centres_of),
        torch.split(xyz_tensor, points_of),
        torch.split(idx_tensor, centres_of),
        strict=True,
    )
    for centres, points, idx in parts:
        if nsample > 0:
            idx[:, 0] = -1
        _ball_query(centres, points, idx, 0.0, max_radius, False)


def knn_forward(
    xyz_tensor: Tensor,
    new_xyz_tensor: Tensor,
    idx_tensor: Tensor,
    dist2_tensor: Tensor,
    b: int,
    n: int,
    m: int,
    nsample: int,
) -> None:
    """Find the `nsample` points nearest to each centre, nearest first.

    With fewer points, the rest is row 0 and the squared distance 1e10, as in the reference.

    The reference ignores the width of a row: it reads consecutive triples from the start of the data. DGCNN passes
    rows of 64 features, and its published weights were trained on the resulting neighbours, so wider rows are read the
    same way here.

    Args:
        xyz_tensor: (b, n, 3) float points, metres; or (b, n, c) with c > 3, read as above.
        new_xyz_tensor: (b, m, 3) float centres, metres; or (b, m, c), read as above.
        idx_tensor: (b, m, nsample) int, written in place with rows of `xyz_tensor`.
        dist2_tensor: (b, m, nsample) float, written in place, square metres.
        b: point clouds.
        n: points per cloud.
        m: centres per cloud.
        nsample: neighbours per centre.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    xyz_tensor, new_xyz_tensor = _triples(xyz_tensor, b, n), _triples(new_xyz_tensor, b, m)
    check_shape("xyz_tensor", xyz_tensor, b, n, 3)
    check_shape("new_xyz_tensor", new_xyz_tensor, b, m, 3)
    check_shape("idx_tensor", idx_tensor, b, m, nsample)
    check_shape("dist2_tensor", dist2_tensor, b, m, nsample)
    _check_points(idx_tensor, new_xyz_tensor=new_xyz_tensor, xyz_tensor=xyz_tensor, dist2_tensor=dist2_tensor)
    for cloud in range(b):
        dist2, rows = nearest(new_xyz_tensor[cloud], xyz_tensor[cloud], nsample, KNN_REACH, heap=True)
        idx_tensor[cloud] = rows
        dist2_tensor[cloud] = dist2


def _triples(rows: Tensor, b: int, n: int) -> Tensor:
    """Return the first b × n × 3 numbers of wider rows as points, anything else unchanged."""
    if rows.dim() != 3 or rows.shape[:2] != (b, n) or rows.shape[2] <= 3:
        return rows
    return rows.reshape(-1)[: b * n * 3].view(b, n, 3)


def three_nn_forward(
    unknown_tensor: Tensor,
    known_tensor: Tensor,
    dist2_tensor: Tensor,
    idx_tensor: Tensor,
    b: int,
    n: int,
    m: int,
) -> None:
    """Find the three known points nearest to each unknown one, nearest first.

    Where fewer than three are known, row 0 and the squared distance 1e40 (infinite in float32) fill up.

    Args:
        unknown_tensor: (b, n, 3) float, metres.
        known_tensor: (b, m, 3) float, metres.
        dist2_tensor: (b, n, 3) float, written in place, square metres.
        idx_tensor: (b, n, 3) int, written in place with rows of `known_tensor`.
        b: point clouds.
        n: unknown points per cloud.
        m: known points per cloud.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
    """
    check_shape("unknown_tensor", unknown_tensor, b, n, 3)
    check_shape("known_tensor", known_tensor, b, m, 3)
    check_shape("dist2_tensor", dist2_tensor, b, n, 3)
    check_shape("idx_tensor", idx_tensor, b, n, 3)
    _check_points(
        idx_tensor, unknown_tensor=unknown_tensor, known_tensor=known_tensor, dist2_tensor=dist2_tensor
    )
    wide = torch.float64 in (unknown_tensor.dtype, known_tensor.dtype)
    for cloud in range(b):
        dist2, rows = nearest(
            unknown_tensor[cloud], known_tensor[cloud], 3, NN_REACH if wide else float("inf")
        )
        idx_tensor[cloud] = rows
        dist2_tensor[cloud] = dist2


def counts(name: str, tensor: Tensor, total: int) -> list[int]:
    """Convert the counts of a stack to numbers; raise ValueError unless their sum is `total`."""
    check_shape(name, tensor, None)
    check_integer(**{name: tensor})
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must have values, got a tensor on {tensor.device}")
    sizes: list[int] = tensor.tolist()
    if any(size < 0 for size in sizes) or sum(sizes) != total:
        raise ValueError(f"{name} must be counts that add up to {total}, got {sizes}")
    return sizes


def first_hits(hits: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Find the first `limit` columns that are True in each row of `hits` (R, N), and their number (R,), int64.

    The result (R, limit) int64 is padded with 0. Torch, any device, no transfer to the host.
    """
    rank = hits.cumsum(dim=1)
    place = torch.where(hits & (rank <= limit), rank - 1, torch.full_like(rank, limit))
    column = torch.arange(hits.shape[1], device=hits.device).expand_as(place)
    # All other columns are written to an extra element, which is cut off.
    found = torch.zeros((hits.shape[0], limit + 1), dtype=torch.int64, device=hits.device)
    found.scatter_(1, place, column)
    return found[:, :limit], hits.sum(dim=1).clamp(max=limit)


def _check_points(idx: Tensor, **floats: Tensor) -> None:
    check_floating(**floats)
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx_tensor must be int32 or int64, got {idx.dtype}")
    check_same_device(**floats, idx_tensor=idx)


def _ball_query(
    centres: Tensor, points: Tensor, idx: Tensor, min_radius: float, max_radius: float, itself: bool
) -> None:
    """Query one point cloud. `itself`: a point at the centre counts for any radii."""
    if idx.numel() == 0 or points.shape[0] == 0:
        return
    centres, points = in_one_dtype(centres, points)
    # The reference squares the radii in float32, whatever the coordinates are.
    low, high = np.float32(min_radius) ** 2, np.float32(max_radius) ** 2
    if uses_numba(centres) and centres.dtype != torch.float16:
        rows = idx.to(torch.int32, copy=True).contiguous()
        _ball_query_cpu(as_numpy(points.t()), as_numpy(centres.t()), low, high, itself, rows.numpy())
        idx.copy_(rows)
    else:
        ball_query_torch(centres, points, idx, float(low), float(high), itself)


def ball_query_torch(
    centres: Tensor, points: Tensor, idx: Tensor, low: float, high: float, itself: bool
) -> None:
    """Query one point cloud on any device; `low` and `high` are squared."""
    place = torch.arange(idx.shape[1], device=idx.device)
    for block, distances in distance_blocks(centres, points):
        # A radius is not rounded to the half precision of distances.
        distances = distances.to(torch.promote_types(distances.dtype, torch.float32))
        hits = (distances >= low) & (distances < high)
        if itself:
            hits |= distances == 0
        rows, number = first_hits(hits, idx.shape[1])
        rows = torch.where(place < number[:, None], rows, rows[:, :1])
        idx[block] = torch.where(number[:, None] > 0, rows, idx[block].long()).to(idx.dtype)


@jit
def _ball_query_cpu(
    points: Floats, centres: Floats, low: np.float32, high: np.float32, itself: bool, rows: I32
) -> None:  # pragma: no cover - compiled
    n, limit = points.shape[1], rows.shape[1]
    x, y, z = points[0], points[1], points[2]
    near = np.empty(BLOCK, dtype=points.dtype)
    for i in range(centres.shape[1]):
        found = 0
        for begin in range(0, n, BLOCK):
            end = min(n, begin + BLOCK)
            squared_distances(
                x[begin:end], y[begin:end], z[begin:end], centres[0, i], centres[1, i], centres[2, i], near
            )
            hits = 0
            for k in range(end - begin):
                hits += ((near[k] >= low) & (near[k] < high)) | (itself & (near[k] == 0))
            if hits == 0:
                continue
            for k in range(end - begin):
                if (near[k] >= low and near[k] < high) or (itself and near[k] == 0):
                    if found == 0:
                        rows[i, :] = begin + k
                    rows[i, found] = begin + k
                    found += 1
                    if found == limit:
                        break
            if found == limit:
                break
