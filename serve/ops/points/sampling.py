"""Furthest-point sampling: the next sample is the point furthest from all samples so far.

The first sample is point 0. The first of equally far points is chosen; in the reference (mmcv 2.1.0
`csrc/common/cuda/furthest_point_sample_cuda_kernel.cuh`) the thread layout decides. Distances are squared and in
float32. A point with a NaN coordinate keeps its distance in `temp_tensor`, as in the reference.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_floating, check_same_device, check_shape, uses_numba
from serve.ops.cpu.jit import jit

__all__ = ["furthest_point_sampling_forward", "furthest_point_sampling_with_dist_forward"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


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
            as_numpy(points.transpose(1, 2)), temp.numpy(), temp.view(torch.int32).numpy(), out.numpy()
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
        points_tensor: (b, n, n) float, non-negative distances; row i has those from point i.
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
        _sample_with_dist_cpu(as_numpy(distances), temp.numpy(), temp.view(torch.int32).numpy(), out.numpy())
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
    return temp.argmax(dim=1)


@jit
def _first_largest(bits: I32) -> int:  # pragma: no cover - compiled
    # Non-negative floats compare as their bits do. A maximum of integers is vectorised, one of floats is not
    # because of NaN.
    best = np.int32(-1)
    for k in range(bits.shape[0]):
        best = bits[k] if bits[k] > best else best
    at = 0
    while bits[at] != best:
        at += 1
    return at


@jit
def _sample_cpu(xyz: F32, temp: F32, bits: I32, out: I32) -> None:  # pragma: no cover - compiled
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
            old = _first_largest(near_bits)
            out[c, step] = old


@jit
def _sample_with_dist_cpu(
    distances: F32, temp: F32, bits: I32, out: I32
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
            old = _first_largest(near_bits)
            out[c, step] = old
