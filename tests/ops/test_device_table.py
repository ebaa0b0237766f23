"""Sparse convolution by tables of whole tensors against dense convolution, and its voxels against rulebooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from serve.ops.sparse import rulebook
from serve.ops.sparse.device_table import (
    ConvGeometry,
    gather_convolve,
    invert_rows,
    neighbour_rows,
    reached_voxels,
)
from tests.ops.test_sparse import at_rows, out_shape, random_sparse


def geometry_of(shape, ksize, stride, padding, dilation) -> ConvGeometry:
    out = out_shape(shape, ksize, stride, padding, dilation)
    return ConvGeometry(
        tuple(ksize), tuple(stride), tuple(padding), tuple(dilation), tuple(shape), tuple(out)
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    fill=st.sampled_from([0.05, 0.4]),
)
def test_strided_convolution_equals_dense_convolution(seed, kernel, stride, padding, fill):
    shape = (7, 6, 5)
    voxels, features, dense = random_sparse(seed, shape, 2, fill, 3)
    if not len(voxels):
        return
    geometry = geometry_of(shape, [kernel] * 3, [stride] * 3, [padding] * 3, [1] * 3)
    weight = torch.randn(kernel**3, 3, 4, generator=torch.Generator().manual_seed(seed))
    bias = torch.arange(4.0)
    (rows,) = reached_voxels(voxels, 2, [(geometry,)])
    table = neighbour_rows(voxels, rows, geometry, ascending=False)
    got = gather_convolve(features, weight, bias, table, relu=True)
    filters = weight.view(kernel, kernel, kernel, 3, 4).permute(4, 3, 0, 1, 2)
    expected = functional.conv3d(dense, filters, stride=stride, padding=padding)
    reached = functional.conv3d(
        (dense != 0).any(1, keepdim=True).float(),
        torch.ones(1, 1, *[kernel] * 3),
        stride=stride,
        padding=padding,
    )
    assert [tuple(row) for row in rows.tolist()] == [tuple(i) for i in np.argwhere(reached[:, 0].numpy() > 0)]
    wanted = (at_rows(expected, rows).reshape(got.shape) + bias).clamp(min=0)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), dilation=st.integers(1, 2), ksize=st.sampled_from([(3, 3, 3), (1, 3, 3)]))
def test_submanifold_table_equals_the_one_of_the_loops(seed, dilation, ksize):
    shape = (6, 5, 7)
    voxels, _, _ = random_sparse(seed, shape, 2, 0.3, 3)
    padding = [k // 2 for k in ksize]
    geometry = ConvGeometry(ksize, (1,) * 3, tuple(padding), (dilation,) * 3, shape, shape)
    table = neighbour_rows(voxels, voxels, geometry, ascending=False)
    _, pairs, counts = rulebook.get_indice_pairs_3d_forward(
        voxels, 2, list(shape), list(shape), list(ksize), [1] * 3, padding, [dilation] * 3, [0] * 3, 1, 0
    )
    expected = torch.full((len(voxels), len(pairs)), len(voxels), dtype=torch.int64)
    for k, count in enumerate(counts.tolist()):
        expected[pairs[k, 1, :count].long(), k] = pairs[k, 0, :count].long()
    assert torch.equal(table, expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), fill=st.sampled_from([0.02, 0.2]))
def test_voxels_of_a_chain_are_those_found_layer_by_layer(seed, fill):
    shape = (21, 16, 13)
    voxels, _, _ = random_sparse(seed, shape, 2, fill, 1)
    if not len(voxels):
        return
    layers = [([3] * 3, [2] * 3, [1] * 3), ([3] * 3, [2] * 3, [0, 1, 1]), ([3, 1, 1], [2, 1, 1], [0] * 3)]
    chain: tuple[ConvGeometry, ...] = ()
    chains, expected, now, extents = [], [], voxels, list(shape)
    for ksize, stride, padding in layers:
        geometry = geometry_of(extents, ksize, stride, padding, [1] * 3)
        chain = (*chain, geometry)
        chains.append(chain)
        out = list(geometry.out_shape)
        now = rulebook.get_indice_pairs_3d_forward(
            now, 2, out, extents, ksize, stride, padding, [1] * 3, [0] * 3, 0, 0
        )[0]
        expected.append(now)
        extents = out
    for rows, wanted in zip(reached_voxels(voxels, 2, chains), expected, strict=True):
        assert torch.equal(rows, wanted)


def test_inverse_table_has_the_outputs_of_each_input():
    table = torch.tensor([[0, 3], [3, 2]])  # three inputs; 3 is none
    assert invert_rows(table, 3).tolist() == [[0, 2], [2, 2], [2, 1]]


def test_voxel_outside_of_the_grid_raises():
    geometry = geometry_of((4, 4, 4), [3] * 3, [2] * 3, [1] * 3, [1] * 3)
    for bad in ([0, 4, 0, 0], [2, 0, 0, 0], [0, 0, -1, 0]):
        with pytest.raises(IndexError):
            reached_voxels(torch.tensor([[0, 1, 1, 1], bad], dtype=torch.int32), 2, [(geometry,)])
