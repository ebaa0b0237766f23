"""Neighbour tables in Triton against whole tensors of torch, number by number."""

from __future__ import annotations

import pytest
import torch

from serve.ops.sparse.device_table import ConvGeometry, _padded_grid, neighbour_rows
from serve.ops.triton.neighbours import find_rows
from tests.ops.test_sparse import out_shape, random_sparse


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("fill", [0.02, 0.5])
def test_rows_are_those_of_whole_tensors(fill, ascending, device):
    shape, ksize = (9, 8, 7), (3, 3, 3)
    voxels, _, _ = random_sparse(3, shape, 2, fill, 1)
    if ascending:
        keys = (voxels * torch.tensor([1000, 100, 10, 1])).sum(dim=1)
        voxels = voxels[keys.argsort()]
    out = tuple(out_shape(shape, ksize, (1,) * 3, (1,) * 3, (1,) * 3))
    geometry = ConvGeometry(ksize, (1,) * 3, (1,) * 3, (1,) * 3, shape, out)
    wanted = neighbour_rows(voxels, voxels, geometry, ascending=ascending)
    steps, distances, stride, shift = (torch.tensor(one) for one in _padded_grid(geometry))
    known, base = (voxels * steps).sum(dim=1) + shift, (voxels * stride).sum(dim=1)
    order = None
    if not ascending:
        known, order = torch.sort(known)
        order = order.to(device)
    got = find_rows(known.to(device), order, base.to(device), distances.to(device))
    assert got.dtype == torch.int32 and torch.equal(got.cpu().long(), wanted)


def test_rows_before_the_first_and_behind_the_last_are_none_and_large_indices_fit(device):
    known = torch.tensor([5, 1 << 40, (1 << 40) + 1], device=device)
    base, distances = torch.tensor([0, 5, 1 << 40], device=device), torch.tensor([-1, 0, 1, 2], device=device)
    assert find_rows(known, None, base, distances).tolist() == [[3, 3, 3, 3], [3, 0, 3, 3], [3, 1, 2, 3]]
    assert find_rows(known, None, base[:0], distances).shape == (0, 4)
