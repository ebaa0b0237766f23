"""Furthest-point sampling: the next sample is the point furthest from all samples so far.

The first sample is point 0. Ties are broken as by the threads of the reference (mmcv 2.1.0
`csrc/common/cuda/furthest_point_sample_cuda_kernel.cuh`): the largest power of two up to the number of points, at most
1024, is the number of threads. They take the points in turns and keep the first of equal ones; the reduction keeps the
thread whose number is lowest with its bits reversed. Distances are squared and in float32. A point with a NaN
coordinate keeps its distance in `temp_tensor`, as in the reference.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_floating, check_same_device, check_shape, uses_numba
from serve.ops.constants import constant
from serve.ops.cpu.jit import jit
from serve.ops.device_kernels import uses_triton

__all__ = ["furthest_point_sampling_forward", "furthest_point_sampling_with_dist_forward"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def furthest_point_sampling_forward(
    points_tensor: Tensor, temp_tensor: Tensor, idx_tensor: Tensor, b: int, n: int, m: int
) -> None:
    """Write into `idx_tensor` the rows of `m` samples of each cloud.

    Args:
        points_tensor: (b, n, 3) float, metres.
        temp_tensor: (b, n) float, square metres: on entry an upper bound of all distances (mmcv passes 1e10), on
            return the squared distance to the nearest sample except the last.
        idx_tensor: (b, m) int, written in place.
        b: point clouds.
        n: points per cloud.
        m: samples per cloud; beyond `n` the first point is repeated.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; samples of an empty cloud.
    """
    check_shape("points_tensor", points_tensor, b, n, 3)
    _check(points_tensor, temp_tensor, idx_tensor, b, n, m)
    if b == 0 or m == 0:
        return
    points = points_tensor.detach().float()
    temp = temp_tensor.detach().to(torch.float32, copy=True).contiguous()
    if uses_numba(points):
        out = torch.empty((b, m), dtype=torch.int32)
        _sample_cpu(
            as_numpy(points.transpose(1, 2)),
            temp.numpy(),
            temp.view(torch.int32).numpy(),
            out.numpy(),
            _thread_ranks(n),
        )
    elif uses_triton(points):
        from serve.ops.triton.sampling import sample_furthest

        out = sample_furthest(
            points, temp, constant(tuple(_thread_ranks(n).tolist()), torch.int64, points.device), m
        )
    else:
        out = _sample_torch(points, temp, m)
    temp_tensor.copy_(temp)
    idx_tensor.copy_(out)


def furthest_point_sampling_with_dist_forward(
    points_tensor: Tensor, temp_tensor: Tensor, idx_tensor: Tensor, b: int, n: int, m: int
) -> None:
    """Run `furthest_point_sampling_forward` on given distances instead of coordinates.

    Args:
        points_tensor: (b, n, n) float distances of any kind; row i holds those from point i.
        temp_tensor: (b, n) float, as above.
        idx_tensor: (b, m) int, written in place.
        b: point clouds.
        n: points per cloud.
        m: samples per cloud.

    Raises:
        TypeError, ValueError: as above.
    """
    check_shape("points_tensor", points_tensor, b, n, n)
    _check(points_tensor, temp_tensor, idx_tensor, b, n, m)
    if b == 0 or m == 0:
        return
    distances = points_tensor.detach().float()
    temp = temp_tensor.detach().to(torch.float32, copy=True).contiguous()
    if uses_numba(distances):
        out = torch.empty((b, m), dtype=torch.int32)
        _sample_with_dist_cpu(
            as_numpy(distances), temp.numpy(), temp.view(torch.int32).numpy(), out.numpy(), _thread_ranks(n)
        )
    else:
        out = _sample_with_dist_torch(distances, temp, m)
    temp_tensor.copy_(temp)
    idx_tensor.copy_(out)


def _check(points: Tensor, temp: Tensor, idx: Tensor, b: int, n: int, m: int) -> None:
    check_floating(points_tensor=points, temp_tensor=temp)
    check_shape("temp_tensor", temp, b, n)
    check_shape("idx_tensor", idx, b, m)
    check_same_device(points_tensor=points, temp_tensor=temp, idx_tensor=idx)
    if b > 0 and m > 0 and n == 0:
        raise ValueError(f"points_tensor must hold at least one point to take {m} samples of, got n=0")


def _sample_torch(points: Tensor, temp: Tensor, m: int) -> Tensor:
    """Sample (b, m) int64 on any device, without transfers to the host."""
    x, y, z = points.unbind(2)
    rows = torch.zeros((points.shape[0], m), dtype=torch.int64, device=points.device)
    for step in range(1, m):
        old = rows[:, step - 1 : step]
        dx, dy, dz = x - x.gather(1, old), y - y.gather(1, old), z - z.gather(1, old)
        rows[:, step] = _fold(dx * dx + dy * dy + dz * dz, temp)
    return rows


def _sample_with_dist_torch(distances: Tensor, temp: Tensor, m: int) -> Tensor:
    rows = torch.zeros((distances.shape[0], m), dtype=torch.int64, device=distances.device)
    cloud = torch.arange(distances.shape[0], device=distances.device)
    for step in range(1, m):
        rows[:, step] = _fold(distances[cloud, rows[:, step - 1]], temp)
    return rows


def _fold(distance: Tensor, temp: Tensor) -> Tensor:
    """Lower `temp` to `distance` where smaller (NaN is not); return the position of its maximum."""
    torch.where(distance < temp, distance, temp, out=temp)
    ranks = torch.from_numpy(_thread_ranks(temp.shape[1])).to(temp.device)
    point = torch.arange(temp.shape[1], device=temp.device)
    turns = temp.shape[1] // len(ranks) + 1
    rank = ranks[point % len(ranks)] * turns + point // len(ranks)
    largest = temp.amax(dim=1, keepdim=True)
    first = torch.where(temp == largest, rank, torch.full_like(rank, len(ranks) * turns)).argmin(dim=1)
    # Below -1 no thread finds any.
    return torch.where(largest[:, 0] > -1, first, torch.zeros_like(first))


@cache
def _thread_ranks(points: int) -> npt.NDArray[np.int64]:
    """Return the number of each thread of the reference's block with its bits reversed."""
    bits = min(int(math.log(points) / math.log(2)), 10)
    ranks = np.zeros(1 << bits, dtype=np.int64)
    for bit in range(bits):
        ranks |= (np.arange(1 << bits) >> bit & 1) << (bits - 1 - bit)
    return ranks


@jit
def _largest(bits: I32) -> np.int32:  # pragma: no cover - compiled
    # Non-negative floats compare as their bits do. A maximum of integers is vectorised, one of floats is not
    # because of NaN.
    best = np.int32(-1)
    for k in range(bits.shape[0]):
        best = bits[k] if bits[k] > best else best
    return best


@jit
def _next_sample(near: F32, bits: I32, ranks: I64) -> int:  # pragma: no cover - compiled
    """Return the row of the largest of `near`; of equal ones the first of the thread with the lowest rank."""
    best = _largest(bits)
    if best < 0:
        return _largest_below_zero(near, ranks)
    at = 0
    while bits[at] != best:
        at += 1
    # Looking for another one as large costs less than counting them.
    if _largest(bits[at + 1 :]) != best:
        return at
    found = at
    for k in range(at + 1, bits.shape[0]):
        if bits[k] == best and ranks[k & (ranks.shape[0] - 1)] < ranks[found & (ranks.shape[0] - 1)]:
            found = k
    return found


@jit
def _largest_below_zero(near: F32, ranks: I64) -> int:  # pragma: no cover - compiled
    """Return the same if all are negative; row 0 if none is above -1, as in the reference."""
    found, best = 0, np.float32(-1)
    for k in range(near.shape[0]):
        ahead = near[k] == best and best > -1 and (
            ranks[k & (ranks.shape[0] - 1)] < ranks[found & (ranks.shape[0] - 1)]
        )  # fmt: skip
        if near[k] > best or ahead:
            found, best = k, near[k]
    return found


@jit
def _sample_cpu(xyz: F32, temp: F32, bits: I32, out: I32, ranks: I64) -> None:  # pragma: no cover - compiled
    n = xyz.shape[2]
    for c in range(xyz.shape[0]):
        x, y, z = xyz[c, 0], xyz[c, 1], xyz[c, 2]
        near, near_bits = temp[c], bits[c]
        old = 0
        out[c, 0] = 0
        for step in range(1, out.shape[1]):
            x1, y1, z1 = x[old], y[old], z[old]
            for k in range(n):
                dx, dy, dz = x[k] - x1, y[k] - y1, z[k] - z1
                d = dx * dx + dy * dy + dz * dz
                near[k] = d if d < near[k] else near[k]
            old = _next_sample(near, near_bits, ranks)
            out[c, step] = old


@jit
def _sample_with_dist_cpu(
    distances: F32, temp: F32, bits: I32, out: I32, ranks: I64
) -> None:  # pragma: no cover - compiled
    n = distances.shape[1]
    for c in range(distances.shape[0]):
        near, near_bits = temp[c], bits[c]
        old = 0
        out[c, 0] = 0
        for step in range(1, out.shape[1]):
            row = distances[c, old]
            for k in range(n):
                near[k] = row[k] if row[k] < near[k] else near[k]
            old = _next_sample(near, near_bits, ranks)
            out[c, step] = old
