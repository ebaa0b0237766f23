"""Voxelization in Triton against whole tensors of torch and the loops, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serve.ops.points import grouped_voxels
from serve.ops.points.voxelize import hard_voxelize_forward

SIZE, LOW, GRID = (0.5, 0.25, 1.0), (-2.0, 0.0, -1.0), (8, 12, 3)


def cloud(seed: int, count: int, columns: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, columns, generator=generator) * torch.tensor(
        [5.0, 4, 4, *[1.0] * (columns - 3)]
    )
    points[:, :3] += torch.tensor([-2.5, -0.5, -1.5])
    if count > 8:
        points[3, 0], points[5, 2] = torch.nan, torch.inf
        points[6, :3] = torch.tensor(LOW)  # on the border: inside
        points[7, :3] = torch.tensor([2.0, 3.0, 2.0])  # on the other one: outside
    return points


def voxelized(clouds, max_points, max_voxels, device):
    joined = torch.cat(clouds).to(device)
    ends = tuple(np.cumsum([len(one) for one in clouds]).tolist())
    return [
        one.cpu()
        for one in grouped_voxels._voxelize_by_kernels(joined, ends, SIZE, LOW, GRID, max_points, max_voxels)
    ]


@pytest.mark.parametrize(("max_points", "max_voxels"), [(5, 1000), (1, 1000), (3, 20), (40, 1), (2, 7)])
@pytest.mark.parametrize(
    "sizes",
    [(300,), (1,), (257, 100), (50, 0, 80), (0, 30), (9, 9, 9, 9)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_voxels_are_those_of_whole_tensors(sizes, max_points, max_voxels, device):
    clouds = [cloud(seed, count) for seed, count in enumerate(sizes)]
    wanted = grouped_voxels.voxelize_clouds(clouds, SIZE, LOW, GRID, max_points, max_voxels)
    for one, other in zip(voxelized(clouds, max_points, max_voxels, device), wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("max_points", "max_voxels"), [(5, 1000), (3, 20)])
def test_voxels_are_those_of_the_loops(max_points, max_voxels, device):
    points = cloud(3, 400, columns=5)
    voxels, coordinates = (
        torch.zeros(max_voxels, max_points, 5),
        torch.zeros(max_voxels, 3, dtype=torch.int32),
    )
    counts, number = torch.zeros(max_voxels, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    bounds = torch.tensor([*LOW, *(low + n * size for low, n, size in zip(LOW, GRID, SIZE, strict=True))])
    hard_voxelize_forward(
        points, torch.tensor(SIZE), bounds, voxels, coordinates, counts, number, max_points, max_voxels
    )
    got = voxelized([points], max_points, max_voxels, device)
    assert torch.equal(got[0], voxels[:number])
    assert torch.equal(got[1][:, 1:], coordinates[:number]) and torch.equal(got[2], counts[:number])


def test_cloud_outside_of_the_grid_has_no_voxels(device):
    got = voxelized([torch.full((40, 4), 100.0)], 5, 10, device)
    assert [len(one) for one in got] == [0, 0, 0]


def test_voxel_in_half_precision_has_the_points_as_they_are(device):
    points = cloud(4, 200).half()
    wanted = grouped_voxels.voxelize_clouds([points], SIZE, LOW, GRID, 4, 50)
    for one, other in zip(voxelized([points], 4, 50, device), wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_keys_of_a_large_grid_and_many_clouds_exceed_32_bits(device):
    clouds = [cloud(seed, 20) for seed in range(9)]
    large, size = (1600, 1408, 410), (0.003125, 0.0022, 0.0098)
    joined = torch.cat(clouds).to(device)
    ends = tuple(20 * (i + 1) for i in range(9))
    got = grouped_voxels._voxelize_by_kernels(joined, ends, size, LOW, large, 5, 100)
    wanted = grouped_voxels.voxelize_clouds(clouds, size, LOW, large, 5, 100)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.cpu(), other)
