"""Sampling, neighbour search and grouping of points against loops from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.points import grouping, nearest, neighbours, sampling

some_seeds = st.integers(0, 2**16)


@pytest.fixture
def mmcv(mmcv_ops):
    return mmcv_ops


def cloud(seed: int, *shape: int) -> torch.Tensor:
    """Draw coordinates with many duplicates and equal distances: a coarse grid plus free points."""
    rng = np.random.default_rng(seed)
    free = rng.uniform(-2, 2, (*shape, 3))
    points = np.where(rng.random((*shape, 1)) < 0.5, np.round(free), free)
    return torch.from_numpy(points.astype(np.float32))


def squared(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Compute (len(a), len(b)) squared distances, summed as x + y + z in the given dtype."""
    offset = a.numpy()[:, None] - b.numpy()[None]
    return offset[..., 0] ** 2 + offset[..., 1] ** 2 + offset[..., 2] ** 2


def furthest(distances: np.ndarray, m: int) -> list[int]:
    """Choose `m` rows; ties go to the thread of mmcv's block whose number, bits reversed, is lowest."""
    n = len(distances)
    bits = n.bit_length() - 1
    thread = [int(format(row % 2**bits, f"0{bits}b")[::-1], 2) if bits else 0 for row in range(n)]
    chosen, near = [0], np.full(n, 1e10, dtype=np.float32)
    while len(chosen) < m:
        near = np.minimum(near, distances[chosen[-1]])
        chosen.append(min(range(n), key=lambda row: (-near[row], thread[row], row)))
    return chosen[:m]


def sample(points, m, dtype=torch.int32):
    b, n = points.shape[:2]
    idx = torch.full((b, m), -7, dtype=dtype)
    temp = torch.full((b, n), 1e10)
    sampling.furthest_point_sampling_forward(points, temp, idx, b=b, n=n, m=m)
    return idx, temp


@settings(max_examples=30, deadline=None)
@given(seed=some_seeds, b=st.integers(1, 3), n=st.integers(1, 40), m=st.integers(0, 12))
def test_each_sample_is_the_point_furthest_from_all_before(seed, b, n, m):
    points = cloud(seed, b, n)
    expected = [furthest(squared(one, one), m) for one in points]
    idx, temp = sample(points, m, torch.int64 if seed % 2 else torch.int32)
    assert idx.tolist() == expected
    other_temp = torch.full((b, n), 1e10)
    if m:
        assert sampling._sample_torch(points, other_temp, m).tolist() == expected
        assert torch.equal(temp, other_temp)


@settings(max_examples=20, deadline=None)
@given(seed=some_seeds, n=st.integers(1, 30), m=st.integers(1, 10))
def test_sampling_by_distances_equals_sampling_by_coordinates(seed, n, m):
    points = cloud(seed, 2, n)
    distances = torch.from_numpy(np.stack([squared(one, one) for one in points]))
    idx, temp = torch.zeros((2, m), dtype=torch.int32), torch.full((2, n), 1e10)
    sampling.furthest_point_sampling_with_dist_forward(distances, temp, idx, 2, n, m)
    assert idx.tolist() == [furthest(one.numpy(), m) for one in distances]
    again = torch.full((2, n), 1e10)
    assert sampling._sample_with_dist_torch(distances, again, m).tolist() == idx.tolist()
    assert torch.equal(temp, again)


def test_sampling_accepts_slices_float16_and_one_point():
    wide = cloud(3, 2, 50).repeat(1, 1, 2).half()
    assert torch.equal(sample(wide[..., 1:4], 9)[0], sample(wide[..., 1:4].float().contiguous(), 9)[0])
    assert sample(cloud(0, 1, 1), 3)[0].tolist() == [[0, 0, 0]]
    assert sample(cloud(0, 0, 5).view(0, 5, 3), 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="points_tensor must hold at least one point"):
        sample(torch.zeros(1, 0, 3), 2)


def in_ball(centre, points, low, high, itself) -> list[int]:
    d2 = squared(centre[None], points)[0]
    low, high = np.float32(low) ** 2, np.float32(high) ** 2
    return [i for i, d in enumerate(d2) if low <= d < high or (itself and d == 0)]


@settings(max_examples=40, deadline=None)
@given(
    seed=some_seeds,
    n=st.integers(0, 300),
    m=st.integers(0, 20),
    low=st.sampled_from([0.0, 0.5, 1.0]),
    nsample=st.integers(1, 9),
)
def test_ball_query_finds_the_first_points_within_the_radii(seed, n, m, low, nsample):
    points, centres = cloud(seed, 2, n), cloud(seed + 1, 2, m)
    if n and m:
        centres[:, 0] = points[:, 0]  # a centre that is a point belongs to its own ball
    idx = torch.full((2, m, nsample), -7, dtype=torch.int32)
    expected = idx.clone()
    for cell in np.ndindex(2, m):
        found = in_ball(centres[cell], points[cell[0]], low, 1.5, True)[:nsample]
        if found:
            expected[cell] = torch.tensor(found + [found[0]] * (nsample - len(found)))
    other = idx.clone()
    neighbours.ball_query_forward(centres, points, idx, 2, n, m, low, 1.5, nsample)
    assert torch.equal(idx, expected)
    for c in range(2):
        neighbours.ball_query_torch(centres[c], points[c], other[c], low**2, 1.5**2, True)
    assert torch.equal(other, expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=some_seeds, sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=4)
)
def test_stack_ball_query_stays_within_its_cloud_and_marks_empty_balls(seed, sizes):
    n_of, m_of = [n for n, _ in sizes], [m for _, m in sizes]
    points, centres = cloud(seed, sum(n_of)), cloud(seed + 1, sum(m_of))
    idx = torch.zeros((sum(m_of), 4), dtype=torch.int32)
    neighbours.stack_ball_query_forward(
        centres, torch.tensor(m_of, dtype=torch.int32), points, torch.tensor(n_of), idx, 0.9, 4
    )
    for part, own, rows in zip(centres.split(m_of), points.split(n_of), idx.split(m_of), strict=True):
        for centre, row in zip(part, rows.tolist(), strict=True):
            found = in_ball(centre, own, 0, 0.9, False)[:4]
            assert row == (found + [found[0]] * (4 - len(found)) if found else [-1, 0, 0, 0])


@settings(max_examples=40, deadline=None)
@given(
    seed=some_seeds,
    n=st.integers(0, 300),
    m=st.integers(0, 9),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_knn_orders_points_by_distance(seed, n, m, k, dtype):
    points, centres = cloud(seed, 1, n).to(dtype), cloud(seed + 1, 1, m).to(dtype)
    idx, dist2 = torch.full((1, m, k), -7, dtype=torch.int64), torch.full((1, m, k), -7, dtype=dtype)
    neighbours.knn_forward(points, centres, idx, dist2, 1, n, m, k)
    d2 = squared(centres[0], points[0])
    for i in range(m):
        # The distances are float32 whatever the points are; a heap decides which of equally near points come.
        shortest = np.sort(d2[i].astype(np.float32))[:k].astype(float).tolist()
        assert dist2[0, i].tolist() == shortest + [1e10] * (k - len(shortest))
        rows = idx[0, i].tolist()
        assert len(set(rows[: len(shortest)])) == len(shortest) and not any(rows[len(shortest) :])
        assert [float(np.float32(d2[i, j])) for j in rows[: len(shortest)]] == shortest
    other_dist2, other = nearest.nearest_torch(centres[0], points[0], k, 1e10, torch.float32)
    assert torch.equal(other_dist2.to(dtype), dist2[0])
    # The torch version takes the lower rows.
    for i in range(m):
        order = sorted(range(n), key=lambda j, i=i: (np.float32(d2[i, j]), j))[:k]
        assert other[i].tolist() == order + [0] * (k - len(order))


def test_three_nn_pads_with_row_0_at_infinity():
    known, unknown = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]]), torch.tensor([[[2.0, 0, 0]]])
    dist2, idx = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int32)
    neighbours.three_nn_forward(unknown, known, dist2, idx, 1, 1, 2)
    assert idx.tolist() == [[[1, 0, 0]]] and dist2.tolist() == [[[1, 4, float("inf")]]]
    neighbours.three_nn_forward(unknown, known[:, :0], dist2, idx, 1, 1, 0)
    assert idx.tolist() == [[[0, 0, 0]]] and torch.isinf(dist2).all()


def test_nan_point_is_never_a_neighbour():
    points = torch.tensor([[float("nan"), 0, 0], [1, 0, 0], [float("inf"), 0, 0]])
    for search in (nearest.nearest, nearest.nearest_torch):
        dist2, rows = search(torch.zeros(1, 3), points, 3, 1e10)
        assert rows.tolist() == [[1, 0, 0]] and dist2.tolist() == [[1, 1e10, 1e10]]


def test_neighbour_searches_accept_float16_and_slices():
    wide = cloud(5, 1, 60).repeat(1, 1, 2).half()
    half, plain = wide[..., 2:5], wide[..., 2:5].contiguous()
    found = []
    for points in (half, plain):
        idx, dist2 = torch.zeros(1, 60, 4, dtype=torch.int32), torch.zeros(1, 60, 4)
        neighbours.knn_forward(points, points, idx, dist2, 1, 60, 60, 4)
        ball = torch.zeros(1, 60, 8, dtype=torch.int32)
        neighbours.ball_query_forward(points, points, ball, 1, 60, 60, 0.2, 1.1, 8)
        found.append((idx, dist2, ball))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=some_seeds,
    n=st.integers(1, 9),
    m=st.integers(0, 6),
    k=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_grouping_gathers_features_and_its_gradient_sums_them(seed, n, m, k, dtype, index):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, n, generator=generator).to(dtype)
    idx = torch.randint(0, n, (2, m, k), generator=generator).to(index)
    out = torch.empty((2, 5, m, k), dtype=dtype)
    grouping.group_points_forward(features, idx, out, 2, 5, n, m, k)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    got = torch.zeros_like(features)
    grouping.group_points_backward(grad, idx, got, 2, 5, n, m, k)
    expected = torch.zeros(features.shape, dtype=torch.float64)
    for c in range(2):
        for i, j in np.ndindex(m, k):
            row = int(idx[c, i, j])
            assert torch.equal(out[c, :, i, j], features[c, :, row])
            expected[c, :, row] += grad[c, :, i, j].double()
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    seed=some_seeds, sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=4)
)
def test_stack_grouping_uses_rows_relative_to_each_cloud(seed, sizes):
    n_of, m_of = [n for n, _ in sizes], [m for _, m in sizes]
    n, m, b = sum(n_of), sum(m_of), len(sizes)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator)
    idx = torch.cat([torch.randint(0, max(1, a), (c, 2), generator=generator) for a, c in sizes]).int()
    counts = torch.tensor(n_of, dtype=torch.int32), torch.tensor(m_of, dtype=torch.int32)
    out = torch.full((m, 3, 2), 9.0)
    grouping.stack_group_points_forward(features, counts[0], idx, counts[1], out, b, 3, m, 2)
    grad = torch.randn(m, 3, 2, generator=generator)
    got, expected = torch.zeros(n, 3), torch.zeros(n, 3)
    grouping.stack_group_points_backward(grad, idx, counts[1], counts[0], got, b, 3, m, n, 2)
    cloud_of = np.repeat(np.arange(b), m_of)
    start = np.cumsum([0, *n_of])
    for i, j in np.ndindex(m, 2):
        if n_of[cloud_of[i]] == 0:
            assert not out[i, :, j].any()
            continue
        row = int(idx[i, j]) + int(start[cloud_of[i]])
        assert torch.equal(out[i, :, j], features[row])
        expected[row] += grad[i, :, j]
    torch.testing.assert_close(got, expected)


@settings(max_examples=20, deadline=None)
@given(seed=some_seeds, n=st.integers(0, 8), m=st.integers(1, 5))
def test_interpolation_and_its_gradient_weight_three_points(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2, 4, m, generator=generator, dtype=torch.float64, requires_grad=True)
    idx = torch.randint(0, m, (2, n, 3), generator=generator).int()
    weight = torch.rand(2, n, 3, generator=generator, dtype=torch.float64)
    rows = idx.long()
    expected = torch.stack([(points[c][:, rows[c]] * weight[c]).sum(-1) for c in range(2)])
    out = torch.full((2, 4, n), float("nan"), dtype=torch.float64)
    grouping.three_interpolate_forward(points, idx, weight, out, 2, 4, m, n)
    torch.testing.assert_close(out, expected.detach())
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, points, upstream)
    got = torch.zeros_like(gradient)
    grouping.three_interpolate_backward(upstream, idx, weight, got, 2, 4, n, m)
    torch.testing.assert_close(got, gradient)


def test_mmcv_sampling_and_grouping_use_these_kernels(mmcv):
    points = cloud(11, 2, 64)
    rows = mmcv.furthest_point_sample(points, 8)
    assert rows.dtype == torch.int32 and rows.tolist() == [furthest(squared(p, p), 8) for p in points]
    distances = torch.from_numpy(np.stack([squared(p, p) for p in points]))
    assert torch.equal(mmcv.furthest_point_sample_with_dist(distances, 8), rows)
    features = torch.randn(2, 6, 64, requires_grad=True)
    picked = mmcv.gather_points(features, rows)
    assert torch.equal(picked[1, :, 3], features[1, :, int(rows[1, 3])])
    picked.sum().backward()
    assert features.grad.sum() == picked.numel()
    centres = torch.stack([p[r.long()] for p, r in zip(points, rows, strict=True)])
    grouped = mmcv.QueryAndGroup(1.0, 5)(points, centres, features)
    assert grouped.shape == (2, 9, 8, 5) and torch.equal(
        grouped[:, :3, :, 0].isnan().any(), torch.tensor(False)
    )
    assert mmcv.QueryAndGroup(None, 5)(points, centres, features).shape == (2, 9, 8, 5)
    stacked = mmcv.ball_query(
        0,
        1.0,
        5,
        points.flatten(0, 1),
        centres.flatten(0, 1),
        torch.tensor([64, 64]).int(),
        torch.tensor([8, 8]).int(),
    )
    assert torch.equal(stacked, mmcv.ball_query(0, 1.0, 5, points, centres).flatten(0, 1))


def test_mmcv_interpolation_uses_these_kernels(mmcv):
    source, target = cloud(1, 2, 20), cloud(2, 2, 30)
    distance, rows = mmcv.three_nn(target, source)
    far = torch.tensor([[9.0, 9, 9]]) * torch.arange(1, 3)[:, None]
    assert torch.equal(mmcv.three_nn(far[None], far[None])[1][..., :2], mmcv.knn(2, far[None], far[None]).mT)
    assert torch.equal(
        mmcv.knn(3, source.transpose(1, 2), target.transpose(1, 2), True), mmcv.knn(3, source, target)
    )
    weight = 1 / (distance + 1e-8)
    weight = (weight / weight.sum(2, keepdim=True)).contiguous()
    features = torch.randn(2, 6, 20, requires_grad=True)
    out = mmcv.three_interpolate(features, rows, weight)
    assert torch.allclose(mmcv.three_interpolate(torch.ones(2, 1, 20), rows, weight), torch.ones(2, 1, 30))
    out.sum().backward()
    torch.testing.assert_close(features.grad.sum(), torch.tensor(2 * 6 * 30.0))


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"idx_tensor": torch.full((1, 2), 5)}, IndexError, "idx_tensor"),
        ({"idx_tensor": torch.full((1, 2), -1)}, IndexError, "idx_tensor"),
        ({"idx_tensor": torch.zeros(1, 2)}, TypeError, "idx_tensor"),
        ({"idx_tensor": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, "idx_tensor"),
        ({"points_tensor": torch.zeros(1, 3)}, ValueError, "points_tensor"),
        ({"out_tensor": torch.zeros(1, 3, 3)}, ValueError, "out_tensor"),
    ],
)
def test_errors_name_the_wrong_argument(change, error, names):
    given_tensors = {
        "points_tensor": torch.zeros(1, 3, 5),
        "idx_tensor": torch.zeros(1, 2, dtype=torch.int32),
        "out_tensor": torch.zeros(1, 3, 2),
    }
    with pytest.raises(error, match=names):
        grouping.gather_points_forward(**(given_tensors | change), b=1, c=3, n=5, npoints=2)


def test_stack_kernels_reject_wrong_counts_and_rows():
    three, one = torch.zeros(3, 3), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"xyz_batch_cnt .* 3"):
        neighbours.stack_ball_query_forward(
            three[:1], torch.tensor([1]), three, torch.tensor([2]), one, 1.0, 2
        )
    with pytest.raises(IndexError, match=r"idx_tensor must lie in \[0, 1\)"):
        # Row 1 exists in the stack, but belongs to the second cloud.
        grouping.stack_group_points_forward(
            three, torch.tensor([1, 2]), one + 1, torch.tensor([1, 0]), torch.zeros(1, 3, 2), 2, 3, 1, 2
        )
    with pytest.raises(TypeError, match="xyz_tensor must be floating point"):
        neighbours.knn_forward(
            three[None].int(), three[None], torch.zeros(1, 3, 1).int(), torch.zeros(1, 3, 1), 1, 3, 3, 1
        )
