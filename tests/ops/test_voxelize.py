"""Voxelization against a dictionary, on every device path."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.ops.checks import torch_only
from serve.ops.points import numbered_voxels, scatter, voxelize
from serve.ops.points.grouped_voxels import voxelize_clouds

SIZE, RANGE = (0.5, 0.5, 1.0), (0.0, -2.0, -1.0, 4.0, 2.0, 2.0)


def naive(points: np.ndarray, max_points: int, max_voxels: int):
    """Voxelize with a dictionary, from the definition."""
    voxels: dict[tuple[int, ...], list[np.ndarray]] = {}
    size, low = np.array(SIZE, dtype=np.float32), np.array(RANGE[:3], dtype=np.float32)
    grid = np.round((np.array(RANGE[3:], dtype=np.float32) - low) / size)
    for point in points:
        cell = np.floor((point[:3] - low) / size)
        if not ((cell >= 0) & (cell < grid)).all():
            continue
        key = tuple(int(c) for c in cell[::-1])
        if key not in voxels and len(voxels) >= max_voxels:
            continue
        members = voxels.setdefault(key, [])
        if len(members) < max_points:
            members.append(point)
    return voxels


def run(points: torch.Tensor, max_points: int, max_voxels: int, path: str):
    voxels = points.new_zeros((max_voxels, max_points, points.shape[1]))
    coors = torch.zeros((max_voxels, 3), dtype=torch.int32)
    counts = torch.zeros(max_voxels, dtype=torch.int32)
    size, bounds, made = torch.tensor(SIZE), torch.tensor(RANGE), torch.zeros((), dtype=torch.long)
    with torch_only() if path == "torch" else nullcontext():
        voxelize.hard_voxelize_forward(
            points, size, bounds, voxels, coors, counts, made, max_points=max_points, max_voxels=max_voxels
        )
    n = int(made)
    return voxels[:n], coors[:n], counts[:n]


@pytest.mark.parametrize("path", ["numba", "torch"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 200),
    max_points=st.integers(1, 6),
    max_voxels=st.integers(1, 80),
)
def test_hard_voxelization_keeps_the_first_points_and_voxels(path, seed, n, max_points, max_voxels):
    rng = np.random.default_rng(seed)
    # Some points are exactly on borders of voxels and of the range.
    points = np.where(rng.random((n, 4)) < 0.3, rng.integers(-2, 5, (n, 4)), rng.uniform(-3, 5, (n, 4)))
    points = points.astype(np.float32)
    expected = naive(points, max_points, max_voxels)
    voxels, coors, counts = run(torch.from_numpy(points), max_points, max_voxels, path)
    assert [tuple(c) for c in coors.tolist()] == list(expected)
    for voxel, count, members in zip(voxels, counts.tolist(), expected.values(), strict=True):
        assert count == len(members)
        np.testing.assert_array_equal(voxel[:count].numpy(), np.stack(members))
        assert not voxel[count:].any()


@pytest.mark.parametrize("way", ["rank", "hash", "sort"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    max_points=st.integers(1, 4),
    max_voxels=st.integers(1, 40),
)
def test_clouds_voxelized_together_are_those_voxelized_alone(
    way, seed, sizes, max_points, max_voxels, monkeypatch
):
    rng = np.random.default_rng(seed)
    clouds = [torch.from_numpy(rng.uniform(-3, 5, (n, 4)).astype(np.float32)) for n in sizes]
    monkeypatch.setattr(numbered_voxels, "_WORDS_PER_POINT", 8 if way == "rank" else 0)
    with torch_only() if way == "sort" else nullcontext():
        voxels, coordinates, counts = voxelize_clouds(
            clouds, SIZE, RANGE[:3], (8, 8, 3), max_points, max_voxels
        )
    alone = [run(cloud, max_points, max_voxels, "numba") for cloud in clouds]
    assert torch.equal(voxels, torch.cat([one[0] for one in alone]))
    assert torch.equal(coordinates[:, 1:], torch.cat([one[1] for one in alone]))
    assert torch.equal(counts, torch.cat([one[2] for one in alone]))
    assert coordinates[:, 0].tolist() == [i for i, one in enumerate(alone) for _ in one[1]]


@pytest.mark.parametrize("path", ["numba", "torch"])
def test_nan_and_inf_points_are_outside(path):
    points = torch.tensor([[float("nan"), 0, 0, 1], [1, float("inf"), 0, 1], [1.0, 1.0, 0.0, 1]])
    _, coors, counts = run(points, 3, 5, path)
    assert counts.tolist() == [1] and coors.tolist() == [[1, 6, 2]]


def test_voxelization_accepts_float16_and_slices():
    wide = torch.rand(50, 8) * 3
    expected = run(wide[:, 2:6].contiguous(), 3, 40, "numba")
    for got, want in zip(run(wide[:, 2:6], 3, 40, "numba"), expected, strict=True):
        assert torch.equal(got, want)
    coarse = run(wide[:, 2:6].half(), 3, 40, "numba")
    assert coarse[0].dtype == torch.float16 and len(coarse[0]) > 0


def test_dynamic_voxelization_marks_points_outside():
    points = torch.tensor([[0.6, 0.0, 0.0], [9.0, 0.0, 0.0], [3.9, 1.9, 1.9]])
    coors = torch.zeros((3, 3), dtype=torch.int32)
    voxelize.dynamic_voxelize_forward(points, torch.tensor(SIZE), torch.tensor(RANGE), coors)
    assert coors.tolist() == [[1, 4, 1], [-1, -1, -1], [2, 7, 7]]


@pytest.mark.parametrize("bad", ["rank", "integers", "size"])
def test_wrong_points_raise_errors_that_name_them(bad):
    points = {"rank": torch.zeros(3), "integers": torch.zeros(3, 4, dtype=torch.int32)}.get(
        bad, torch.zeros(3, 4)
    )
    size = torch.tensor((0.0, 1.0, 1.0) if bad == "size" else SIZE)
    with pytest.raises((ValueError, TypeError), match=r"points|voxel"):
        voxelize.dynamic_voxelize_forward(
            points, size, torch.tensor(RANGE), torch.zeros(3, 3, dtype=torch.int32)
        )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 60), how=st.sampled_from(["max", "mean", "sum"]))
def test_scatter_reduces_the_points_of_each_voxel(seed, n, how):
    generator = torch.Generator().manual_seed(seed)
    coors = torch.randint(-1, 3, (n, 3), generator=generator, dtype=torch.int32)
    feats = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    reduced, out_coors, mapping, counts = scatter.dynamic_point_to_voxel_forward(feats, coors, how)
    reduce = {"max": lambda t: t.amax(0), "mean": lambda t: t.mean(0), "sum": lambda t: t.sum(0)}[how]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, coor in enumerate(coors.tolist()):
        if min(coor) >= 0:
            groups.setdefault(tuple(coor), []).append(i)
        else:
            assert mapping[i] == -1
    assert [tuple(c) for c in out_coors.tolist()] == sorted(groups)
    for row, key in enumerate(sorted(groups)):
        torch.testing.assert_close(reduced[row], reduce(feats[groups[key]]))
        assert counts[row] == len(groups[key]) and (mapping[groups[key]] == row).all()


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
def test_scatter_gradients_equal_autograd(how):
    generator = torch.Generator().manual_seed(0)
    coors = torch.randint(-1, 2, (30, 3), generator=generator, dtype=torch.int32)
    feats = torch.randn(30, 4, generator=generator, requires_grad=True)
    reduced, _, mapping, counts = scatter.dynamic_point_to_voxel_forward(feats, coors, how)
    upstream = torch.randn(reduced.shape, generator=generator)
    (expected,) = torch.autograd.grad(reduced, feats, upstream)
    got = torch.zeros_like(feats)
    scatter.dynamic_point_to_voxel_backward(
        got, upstream, feats.detach(), reduced.detach(), mapping, counts, how
    )
    torch.testing.assert_close(got, expected)
