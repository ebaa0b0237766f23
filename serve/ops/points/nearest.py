"""The k nearest of points in 3D to centres, by comparing every centre with every point.

The reference is mmcv 2.1.0 `csrc/common/cuda/knn_cuda_kernel.cuh` and `three_nn_cuda_kernel.cuh`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_compute_dtype, as_numpy, uses_numba
from serve.ops.cpu.jit import jit

__all__ = ["BLOCK", "distance_blocks", "in_one_dtype", "nearest", "nearest_torch", "squared_distances"]

Floats = npt.NDArray[np.floating]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
# Distances per block of the torch versions.
PAIRS_PER_BLOCK = 1 << 23
# Points per vectorised loop of distances, before they are compared.
BLOCK = 128


def nearest(
    centres: Tensor, points: Tensor, k: int, reach: float, *, heap: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared distances and rows, both (M, k), of the `k` points (N, 3) nearest to the centres (M, 3).

    Only squared distances below `reach` count; `reach` and row 0 pad the rest. Equally near points are in the order of
    their rows; with `heap`, on the CPU, in the order of the reference's heap, whose distances are float32.
    """
    centres, points = in_one_dtype(centres, points)
    if not uses_numba(centres) or centres.dtype == torch.float16:
        return nearest_torch(centres, points, k, reach, torch.float32 if heap else None)
    dist2 = torch.full((centres.shape[0], k), reach, dtype=torch.float32 if heap else centres.dtype)
    rows = torch.zeros((centres.shape[0], k), dtype=torch.int32)
    if k > 0:
        search = _heap_cpu if heap else _nearest_cpu
        search(as_numpy(points.t()), as_numpy(centres.t()), dist2.numpy(), rows.numpy())
    return dist2, rows


def in_one_dtype(centres: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float16 if they are, as the reference computes then; else in float32 or float64."""
    if centres.dtype == points.dtype == torch.float16:
        return centres.detach(), points.detach()
    dtype = torch.promote_types(as_compute_dtype(centres).dtype, as_compute_dtype(points).dtype)
    return centres.detach().to(dtype), points.detach().to(dtype)


def nearest_torch(
    centres: Tensor, points: Tensor, k: int, reach: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`nearest` on any device: a stable sort of the distances, in `dtype`, keeps equally near points in order."""
    dtype = dtype or torch.promote_types(centres.dtype, torch.float32)
    dist2 = torch.full((centres.shape[0], k), reach, dtype=dtype, device=centres.device)
    rows = torch.zeros((centres.shape[0], k), dtype=torch.int32, device=centres.device)
    found = min(k, points.shape[0])
    if found == 0:
        return dist2, rows
    for block, raw in distance_blocks(centres, points):
        dist = raw.to(dtype)
        dist = torch.where(dist < reach, dist, torch.full_like(dist, reach))
        if dist.dtype == torch.float32:
            # The bits of a float that is not negative order as it does; with the row below them every key
            # is different and a partial sort will do.
            row = torch.arange(points.shape[0], device=points.device)
            keys = (dist.view(torch.int32).long() << 32) | row
            keys = keys.topk(found, dim=1, largest=False, sorted=True)[0]
            near, at = (keys >> 32).int().view(torch.float32), (keys & 0xFFFFFFFF).int()
        else:
            near, at = (part[:, :found] for part in torch.sort(dist, dim=1, stable=True))
        dist2[block, :found] = near
        rows[block, :found] = torch.where(near < reach, at, torch.zeros_like(at)).int()
    return dist2, rows


def distance_blocks(centres: Tensor, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield squared distances (rows, N) in blocks of centres, summed in the reference's order."""
    rows = max(1, PAIRS_PER_BLOCK // max(1, points.shape[0]))
    for begin in range(0, centres.shape[0], rows):
        block = slice(begin, begin + rows)
        offset = [centres[block, axis, None] - points[None, :, axis] for axis in range(3)]
        yield block, offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]


@jit
def squared_distances(x: Floats, y: Floats, z: Floats, x1: float, y1: float, z1: float, out: Floats) -> None:
    # pragma: no cover - compiled
    """Write the squared distances of points from one centre; vectorised."""
    for k in range(x.shape[0]):
        dx, dy, dz = x1 - x[k], y1 - y[k], z1 - z[k]
        out[k] = dx * dx + dy * dy + dz * dz


@jit
def _nearest_cpu(
    points: Floats, centres: Floats, dist2: Floats, rows: I32
) -> None:  # pragma: no cover - compiled
    n, last = points.shape[1], dist2.shape[1] - 1
    x, y, z = points[0], points[1], points[2]
    near = np.empty(BLOCK, dtype=points.dtype)
    for i in range(centres.shape[1]):
        worst = dist2[i, last]
        for begin in range(0, n, BLOCK):
            end = min(n, begin + BLOCK)
            squared_distances(
                x[begin:end], y[begin:end], z[begin:end], centres[0, i], centres[1, i], centres[2, i], near
            )
            better = 0
            for k in range(end - begin):
                better += near[k] < worst
            if better == 0:
                continue
            for k in range(end - begin):
                d = near[k]
                if d < worst:
                    at = last
                    while at > 0 and dist2[i, at - 1] > d:
                        dist2[i, at] = dist2[i, at - 1]
                        rows[i, at] = rows[i, at - 1]
                        at -= 1
                    dist2[i, at] = d
                    rows[i, at] = begin + k
                    worst = dist2[i, last]


@jit
def _sift(dist2: F32, rows: I32, count: int) -> None:  # pragma: no cover - compiled
    """Let the root of a heap of `count`, the farthest on top, sink to its place."""
    root, child = 0, 1
    while child < count:
        if child + 1 < count and dist2[child + 1] > dist2[child]:
            child += 1
        if dist2[root] > dist2[child]:
            return
        dist2[root], dist2[child] = dist2[child], dist2[root]
        rows[root], rows[child] = rows[child], rows[root]
        root, child = child, 2 * child + 1


@jit
def _heap_cpu(points: Floats, centres: Floats, dist2: F32, rows: I32) -> None:  # pragma: no cover - compiled
    """As `_nearest_cpu` through a heap, which decides what becomes of equally near points."""
    n, size = points.shape[1], dist2.shape[1]
    x, y, z = points[0], points[1], points[2]
    near = np.empty(BLOCK, dtype=points.dtype)
    for i in range(centres.shape[1]):
        heap, row = dist2[i], rows[i]
        for begin in range(0, n, BLOCK):
            end = min(n, begin + BLOCK)
            squared_distances(
                x[begin:end], y[begin:end], z[begin:end], centres[0, i], centres[1, i], centres[2, i], near
            )
            worst = heap[0]
            better = 0
            for k in range(end - begin):
                better += near[k] < worst
            if better == 0:
                continue
            for k in range(end - begin):
                if near[k] < heap[0]:
                    heap[0], row[0] = near[k], begin + k
                    _sift(heap, row, size)
        for last in range(size - 1, 0, -1):
            heap[0], heap[last] = heap[last], heap[0]
            row[0], row[last] = row[last], row[0]
            _sift(heap, row, last)
