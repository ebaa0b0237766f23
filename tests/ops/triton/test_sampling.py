"""Furthest-point sampling in Triton against the loops, sample by sample."""

from __future__ import annotations

import pytest
import torch

from serve.ops.points import sampling
from serve.ops.triton import sampling as by_triton


def sampled(points, samples, device, bound=1e10):
    nearest = torch.full(points.shape[:2], bound, device=device)
    ranks = torch.from_numpy(sampling._thread_ranks(points.shape[1])).long().to(device)
    return by_triton.sample_furthest(points.to(device), nearest, ranks, samples).cpu(), nearest.cpu()


def by_loops(points, samples, bound=1e10):
    nearest, rows = torch.full(points.shape[:2], bound), torch.zeros(len(points), samples, dtype=torch.int32)
    sampling.furthest_point_sampling_forward(points, nearest, rows, *points.shape[:2], samples)
    return rows.long(), nearest


@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize(
    ("batch", "count", "samples"), [(2, 100, 40), (1, 1, 3), (1, 1500, 20), (3, 64, 64), (1, 5, 9)]
)
def test_samples_are_those_of_the_loops(batch, count, samples, block, device, monkeypatch):
    monkeypatch.setattr(by_triton, "BLOCK", block)
    points = torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(count)) * 50
    for one, other in zip(sampled(points, samples, device), by_loops(points, samples), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block", [64, 4096])  # many points per lane, or one
def test_equal_distances_are_ordered_as_by_the_loops(block, device, monkeypatch):
    monkeypatch.setattr(by_triton, "BLOCK", block)
    axis = torch.arange(6.0)
    points = torch.cartesian_prod(axis, axis, axis)[None].repeat_interleave(2, dim=1)
    for one, other in zip(sampled(points, 60, device), by_loops(points, 60), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bound", [1e10, -2.0])
def test_points_that_are_no_numbers_and_bounds_below_all_are_as_in_the_loops(bound, device):
    points = torch.rand(1, 90, 3, generator=torch.Generator().manual_seed(0))
    points[0, 7], points[0, 40, 1] = torch.nan, torch.nan
    for one, other in zip(sampled(points, 12, device, bound), by_loops(points, 12, bound), strict=True):
        assert torch.equal(one, other)
