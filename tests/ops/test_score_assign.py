"""Score-weighted neighbour features and chamfer distance against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops import score_assign

some_seeds = st.integers(0, 2**16)


def inputs(seed: int, b: int, n0: int, n1: int, m: int, k: int, o: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    points, centers = (torch.randn(b, n0, m, o, generator=generator).to(dtype) for _ in range(2))
    scores = torch.randn(b, n1, k, m, generator=generator).to(dtype)
    idx = torch.randint(-1, n0 + 1, (b, n1, k), generator=generator)  # -1 and n0 are no neighbours
    if k:
        idx[..., 0].clamp_(0, n0 - 1)
    return points, centers, scores, idx


def naive(points, centers, scores, idx):
    b, n1, k, _ = scores.shape
    out = torch.zeros((b, points.shape[3], n1, k), dtype=torch.float64)
    for c, n, j in np.ndindex(b, n1, k):
        row, first = int(idx[c, n, j]), int(idx[c, n, 0])
        if 0 <= row < points.shape[1]:
            offset = points[c, row].double() - centers[c, first].double()
            out[c, :, n, j] = (offset * scores[c, n, j, :, None].double()).sum(0)
    return out


@settings(max_examples=30, deadline=None)
@given(
    seed=some_seeds,
    n0=st.integers(1, 6),
    n1=st.integers(0, 5),
    m=st.integers(0, 4),
    k=st.integers(0, 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_assign_score_weights_offsets_of_neighbours(seed, n0, n1, m, k, dtype, index):
    points, centers, scores, idx = inputs(seed, 2, n0, n1, m, k, 3, dtype)
    expected = naive(points, centers, scores, idx)
    out = torch.ones((2, 3, n1, k), dtype=dtype)  # the kernel adds to it
    score_assign.assign_score_withk_forward(
        points, centers, scores, idx.to(index), out, B=2, N0=n0, N1=n1, M=m, K=k, O=3, aggregate=0
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected + 1, atol=tolerance, rtol=tolerance)
    other = torch.ones_like(expected)
    score_assign.assign_torch(points.double(), centers.double(), scores.double(), idx, other)
    torch.testing.assert_close(other, expected + 1)


def nearest(own, other):
    d2 = ((own[:, None] - other[None]) ** 2).sum(-1)
    return d2.min(1), d2.argmin(1)


@settings(max_examples=30, deadline=None)
@given(seed=some_seeds, n=st.integers(1, 200), m=st.integers(1, 20))
def test_chamfer_distance_uses_the_first_nearest_point(seed, n, m):
    rng = np.random.default_rng(seed)
    sets = [np.round(rng.uniform(-3, 3, (2, size, 2))) for size in (n, m)]  # many ties
    dist = [torch.full((2, size), -1.0) for size in (n, m)]
    idx = [torch.full((2, size), -1, dtype=torch.int32) for size in (n, m)]
    score_assign.chamfer_distance_forward(*map(torch.from_numpy, sets), *dist, *idx)
    for cloud in range(2):
        for own in (0, 1):
            near, rows = nearest(sets[own][cloud], sets[1 - own][cloud])
            assert dist[own][cloud].tolist() == near.tolist() and idx[own][cloud].tolist() == rows.tolist()


def test_chamfer_distance_to_an_empty_set_is_not_written():
    points, none = torch.zeros(1, 2, 2), torch.zeros(1, 0, 2)
    dist, idx = torch.full((1, 2), 5.0), torch.full((1, 2), 5, dtype=torch.int32)
    score_assign.chamfer_distance_forward(points, none, dist, none[..., 0], idx, none[..., 0].int())
    assert dist.tolist() == [[5, 5]] and idx.tolist() == [[5, 5]]


def test_mmcv_assign_score_and_chamfer_use_these_kernels(mmcv_ops):
    mmcv = mmcv_ops
    points, centers, scores, idx = inputs(3, 2, 20, 8, 4, 5, 6, torch.float32)
    out = mmcv.assign_score_withk(scores, points, centers, idx.clamp(0, 19), "sum")
    torch.testing.assert_close(
        out.double(), naive(points, centers, scores, idx.clamp(0, 19)), atol=1e-5, rtol=1e-5
    )
    first, second = torch.rand(2, 30, 2), torch.rand(2, 30, 2)
    dist1, dist2, idx1, _ = mmcv.chamfer_distance(first, second)
    torch.testing.assert_close(dist1, torch.cdist(first, second).amin(2) ** 2, atol=1e-5, rtol=1e-4)
    assert dist2.shape == (2, 30) and idx1.dtype == torch.int32


def test_errors_name_the_wrong_argument():
    points, centers, scores, idx = inputs(0, 1, 4, 2, 3, 2, 5)
    sizes = {"B": 1, "N0": 4, "N1": 2, "M": 3, "K": 2, "O": 5}
    out = torch.zeros((1, 5, 2, 2), dtype=torch.float64)
    call = score_assign.assign_score_withk_forward
    with pytest.raises(ValueError, match="aggregate must be 0"):
        call(points, centers, scores, idx, out, **sizes, aggregate=3)
    with pytest.raises(ValueError, match=r"centers must have shape \(1, 4, 3, 5\)"):
        call(points, centers[:, :3], scores, idx, out, **sizes, aggregate=0)
    with pytest.raises(TypeError, match="knn_idx must be int32"):
        call(points, centers, scores, idx.double(), out, **sizes, aggregate=0)
    with pytest.raises(IndexError, match="knn_idx"):
        call(points, centers, scores, torch.tensor([[[-1, 0], [0, 1]]]), out, **sizes, aggregate=0)
    with pytest.raises(ValueError, match=r"xyz2 must have shape \(1, \*, 2\)"):
        flat = torch.zeros(1, 3)
        score_assign.chamfer_distance_forward(
            torch.zeros(1, 3, 2), torch.zeros(1, 3, 3), flat, flat, flat, flat
        )
