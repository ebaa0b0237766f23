"""Arguments for each kernel for points and voxels, at inference sizes or small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.bench.kernels.inputs import Inputs

__all__ = ["CASES"]

I64 = torch.int64


def hard_voxelize_forward(x: Inputs) -> list[Any]:
    cap = x.size(16, 16000)
    return [
        x.cloud(x.size(20, 20000), 4), x.numbers(0.05, 0.05, 0.1), x.numbers(0.0, -40, -3, 70.4, 40, 1),
        x.zeros(cap, 5, 4), x.zeros(cap, 3, dtype=torch.int32), x.zeros(cap, dtype=torch.int32),
        x.zeros(1, dtype=I64).squeeze(0), 5, cap, 3, True,
    ]  # fmt: skip


def dynamic_voxelize_forward(x: Inputs) -> list[Any]:
    n = x.size(20, 20000)
    grid = x.numbers(0.16, 0.16, 4.0), x.numbers(0.0, -39.68, -3, 69.12, 39.68, 1)
    return [x.cloud(n, 4), *grid, x.zeros(n, 3, dtype=torch.int32), 3]


def dynamic_point_to_voxel_forward(x: Inputs) -> list[Any]:
    n = x.size(20, 20000)
    return [x.normal(n, x.size(4, 64)), x.whole(x.size(3, 20), n, 3), "max"]


def dynamic_point_to_voxel_backward(x: Inputs) -> list[Any]:
    from serve.ops.points.scatter import dynamic_point_to_voxel_forward as forward

    feats, coors, kind = dynamic_point_to_voxel_forward(x)
    reduced, _, where, count = forward(feats, coors, kind)
    return [torch.zeros_like(feats), torch.ones_like(reduced), feats, reduced, where, count, kind]


def _rulebook(x: Inputs, ndim: int, subm: int) -> list[Any]:
    shape = {2: (x.size(6, 200), 7), 3: (x.size(5, 41), x.size(6, 400), x.size(7, 352)), 4: (4, 5, 6, 7)}[
        ndim
    ]
    voxels = x.voxels(x.size(12, 16000), *shape)
    stride = [1 if subm else 2] * ndim
    out = list(shape) if subm else [(extent + 2 - 3) // 2 + 1 for extent in shape]
    one = [1] * ndim
    return [voxels, 1, out, list(shape), [3] * ndim, stride, one, one, [0] * ndim, subm, 0]


def get_indice_pairs_2d_forward(x: Inputs) -> list[Any]:
    return _rulebook(x, 2, 1)


def get_indice_pairs_3d_forward(x: Inputs) -> list[Any]:
    return _rulebook(x, 3, 1)


def get_indice_pairs_4d_forward(x: Inputs) -> list[Any]:
    return _rulebook(x, 4, 0)


def get_indice_pairs_2d_backward(x: Inputs) -> list[Any]:
    voxels, *rest = _rulebook(x, 2, 0)
    return [voxels, x.zeros(1, dtype=torch.int32), *rest]


def get_indice_pairs_3d_backward(x: Inputs) -> list[Any]:
    voxels, *rest = _rulebook(x, 3, 0)
    return [voxels, x.zeros(1, dtype=torch.int32), *rest]


def _layer(x: Inputs, subm: int = 1) -> tuple[Any, ...]:
    from serve.ops.sparse.rulebook import get_indice_pairs_3d_forward as rulebook

    out, pairs, counts = rulebook(*_rulebook(x, 3, subm))
    channels = x.size(4, 32)
    features = x.normal(pairs.shape[2], channels)
    return features, x.normal(3, 3, 3, channels, channels), pairs, counts, out.shape[0]


def indice_conv_forward(x: Inputs) -> list[Any]:
    return [*_layer(x), 0, 1]


def fused_indice_conv_forward(x: Inputs) -> list[Any]:
    features, filters, *rest = _layer(x)
    return [features, filters, x.normal(filters.shape[-1]), *rest, 0, 1]


def indice_conv_backward(x: Inputs) -> list[Any]:
    features, filters, pairs, counts, rows = _layer(x)
    return [features, filters, x.normal(rows, filters.shape[-1]), pairs, counts, 0, 1]


def indice_maxpool_forward(x: Inputs) -> list[Any]:
    features, _, pairs, counts, rows = _layer(x, 0)
    return [features, pairs, counts, rows]


def indice_maxpool_backward(x: Inputs) -> list[Any]:
    from serve.ops.sparse.conv import indice_maxpool_forward as forward

    features, pairs, counts, rows = indice_maxpool_forward(x)
    pooled = forward(features, pairs, counts, rows)
    return [features, pooled, torch.ones_like(pooled), pairs, counts]


def ball_query_forward(x: Inputs) -> list[Any]:
    n, m, k = x.size(20, 16384), x.size(4, 2048), x.size(3, 32)
    return [x.cloud(m)[None], x.cloud(n)[None], x.zeros(1, m, k, dtype=torch.int32), 1, n, m, 0.0, 1.5, k]


def stack_ball_query_forward(x: Inputs) -> list[Any]:
    n, m, k = x.size(20, 16384), x.size(4, 2048), x.size(3, 16)
    counts = [x.numbers(total // 2, total - total // 2, dtype=torch.int32) for total in (m, n)]
    return [x.cloud(m), counts[0], x.cloud(n), counts[1], x.zeros(m, k, dtype=torch.int32), 1.5, k]


def knn_forward(x: Inputs) -> list[Any]:
    n, m, k = x.size(20, 8192), x.size(4, 1024), x.size(3, 16)
    return [
        x.cloud(n)[None], x.cloud(m)[None], x.zeros(1, m, k, dtype=torch.int32), x.zeros(1, m, k), 1, n, m, k,
    ]  # fmt: skip


def three_nn_forward(x: Inputs) -> list[Any]:
    n, m = x.size(20, 8192), x.size(6, 1024)
    return [
        x.cloud(n)[None],
        x.cloud(m)[None],
        x.zeros(1, n, 3),
        x.zeros(1, n, 3, dtype=torch.int32),
        1,
        n,
        m,
    ]


def three_interpolate_forward(x: Inputs) -> list[Any]:
    c, m, n = x.size(4, 256), x.size(6, 1024), x.size(20, 8192)
    return [x.normal(1, c, m), x.whole(m, 1, n, 3), x.uniform(1, n, 3), x.zeros(1, c, n), 1, c, m, n]


def three_interpolate_backward(x: Inputs) -> list[Any]:
    c, m, n = x.size(4, 256), x.size(6, 1024), x.size(20, 8192)
    return [x.normal(1, c, n), x.whole(m, 1, n, 3), x.uniform(1, n, 3), x.zeros(1, c, m), 1, c, n, m]


def furthest_point_sampling_forward(x: Inputs) -> list[Any]:
    n, m = x.size(20, 16384), x.size(4, 4096)
    return [x.cloud(n)[None], x.zeros(1, n) + 1e10, x.zeros(1, m, dtype=torch.int32), 1, n, m]


def furthest_point_sampling_with_dist_forward(x: Inputs) -> list[Any]:
    n, m = x.size(8, 1024), x.size(4, 256)
    cloud = x.cloud(n)
    return [torch.cdist(cloud, cloud)[None], x.zeros(1, n) + 1e10, x.zeros(1, m, dtype=torch.int32), 1, n, m]


def gather_points_forward(x: Inputs) -> list[Any]:
    c, n, m = x.size(4, 128), x.size(20, 16384), x.size(4, 2048)
    return [x.normal(1, c, n), x.whole(n, 1, m), x.zeros(1, c, m), 1, c, n, m]


def gather_points_backward(x: Inputs) -> list[Any]:
    c, n, m = x.size(4, 128), x.size(20, 16384), x.size(4, 2048)
    return [x.normal(1, c, m), x.whole(n, 1, m), x.zeros(1, c, n), 1, c, n, m]


def group_points_forward(x: Inputs) -> list[Any]:
    c, n, m, k = x.size(4, 64), x.size(20, 16384), x.size(4, 2048), x.size(3, 32)
    return [x.normal(1, c, n), x.whole(n, 1, m, k), x.zeros(1, c, m, k), 1, c, n, m, k]


def group_points_backward(x: Inputs) -> list[Any]:
    c, n, m, k = x.size(4, 64), x.size(20, 16384), x.size(4, 2048), x.size(3, 32)
    return [x.normal(1, c, m, k), x.whole(n, 1, m, k), x.zeros(1, c, n), 1, c, n, m, k]


def _stack(x: Inputs) -> tuple[Any, ...]:
    c, n, m, k = x.size(4, 64), x.size(20, 16384), x.size(4, 2048), x.size(3, 16)
    idx = x.whole(n // 2, m, k)
    counts = [x.numbers(total // 2, total - total // 2, dtype=torch.int32) for total in (n, m)]
    return c, n, m, k, idx, counts


def stack_group_points_forward(x: Inputs) -> list[Any]:
    c, n, m, k, idx, (points, centres) = _stack(x)
    return [x.normal(n, c), points, idx, centres, x.zeros(m, c, k), 2, c, m, k]


def stack_group_points_backward(x: Inputs) -> list[Any]:
    c, n, m, k, idx, (points, centres) = _stack(x)
    return [x.normal(m, c, k), idx, centres, points, x.zeros(n, c), 2, c, m, n, k]


def roiaware_pool3d_forward(x: Inputs) -> list[Any]:
    n, p, c, g, k = x.size(3, 100), x.size(20, 16384), x.size(2, 16), x.size(2, 14), x.size(4, 128)
    return [
        x.boxes3d(n), x.cloud(p), x.normal(p, c), x.zeros(n, g, g, g, c, dtype=torch.int32),
        x.zeros(n, g, g, g, k, dtype=torch.int32), x.zeros(n, g, g, g, c), 0,
    ]  # fmt: skip


def roiaware_pool3d_backward(x: Inputs) -> list[Any]:
    from serve.ops.roi.pool3d import roiaware_pool3d_forward as forward

    rois, pts, features, argmax, held, pooled, method = roiaware_pool3d_forward(x)
    forward(rois, pts, features, argmax, held, pooled, method)
    return [held, argmax, torch.ones_like(pooled), torch.zeros_like(features), method]


def roipoint_pool3d_forward(x: Inputs) -> list[Any]:
    m, p, c, s = x.size(3, 100), x.size(20, 16384), x.size(2, 128), x.size(4, 512)
    return [
        x.cloud(p)[None], x.boxes3d(m)[None], x.normal(1, p, c), x.zeros(1, m, s, 3 + c),
        x.zeros(1, m, dtype=torch.int32),
    ]  # fmt: skip


def _assign(x: Inputs) -> tuple[Any, ...]:
    n0, n1, k, m, o = x.size(8, 1024), x.size(5, 1024), x.size(3, 32), x.size(2, 8), x.size(4, 32)
    return (
        x.normal(1, n0, m, o), x.normal(1, n0, m, o), x.uniform(1, n1, k, m), x.whole(n0, 1, n1, k, dtype=I64),
        (1, n0, n1, m, k, o, 0),
    )  # fmt: skip


def assign_score_withk_forward(x: Inputs) -> list[Any]:
    points, centers, scores, idx, sizes = _assign(x)
    return [points, centers, scores, idx, x.zeros(1, sizes[5], sizes[2], sizes[4]), *sizes]


def assign_score_withk_backward(x: Inputs) -> list[Any]:
    points, centers, scores, idx, sizes = _assign(x)
    grads = [torch.zeros_like(one) for one in (points, centers, scores)]
    return [x.normal(1, sizes[5], sizes[2], sizes[4]), points, centers, scores, idx, *grads, *sizes]


def chamfer_distance_forward(x: Inputs) -> list[Any]:
    n, m = x.size(6, 2048), x.size(5, 1024)
    idx = [x.zeros(1, count, dtype=torch.int32) for count in (n, m)]
    return [x.uniform(1, n, 2), x.uniform(1, m, 2), x.zeros(1, n), x.zeros(1, m), *idx]


def chamfer_distance_backward(x: Inputs) -> list[Any]:
    n, m = x.size(6, 2048), x.size(5, 1024)
    first, second = x.uniform(1, n, 2), x.uniform(1, m, 2)
    return [
        first, second, x.whole(m, 1, n), x.whole(n, 1, m), x.normal(1, n), x.normal(1, m),
        torch.zeros_like(first), torch.zeros_like(second),
    ]  # fmt: skip


CASES: dict[str, Callable[[Inputs], list[Any]]] = {
    name: build
    for name, build in globals().items()
    if callable(build) and not name.startswith("_") and getattr(build, "__module__", "") == __name__
}
