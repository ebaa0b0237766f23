"""Neighbour tables equal the rulebooks of mmcv's layers, for each way of building them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.cpu import rank_bitmap
from serve.ops.sparse import neighbour_table, rulebook, strided_table
from serve.ops.sparse.table_conv import convolve_table, pack_filters


def voxels(shape: list[int], batch: int, share: float, seed: int) -> torch.Tensor:
    """Draw voxels of a grid, in random order."""
    rng = np.random.default_rng(seed)
    taken = np.argwhere(rng.random((batch, *shape)) < share).astype(np.int32)
    return torch.from_numpy(rng.permutation(taken))


def by_pairs(indices, batch, out_shape, in_shape, ksize, stride, padding, dilation, subm, transpose):
    """Build the table from the pairs of the torch version, which shares no code with the tables."""
    geometry = np.array([ksize, stride, padding, dilation, out_shape, in_shape], dtype=np.int64)
    rows, pairs, counts = rulebook._rulebook_torch(indices, geometry, subm, transpose)
    table = np.full((len(counts), len(rows)), -1, np.int32)
    for k, count in enumerate(counts.tolist()):
        table[k, pairs[k, 1, :count]] = pairs[k, 0, :count]
    return rows.numpy(), table


dimensions = st.integers(1, 4)


@st.composite
def strided(draw):
    ndim = draw(dimensions)
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(ndim)]  # noqa: E731
    in_shape, ksize, stride, dilation = each(1, 6), each(1, 3), each(1, 3), each(1, 2)
    padding = [draw(st.integers(0, k)) for k in ksize]
    transpose = draw(st.booleans())
    if transpose:
        dilation = [1] * ndim
        out_shape = [
            (n - 1) * s - 2 * p + k for n, s, p, k in zip(in_shape, stride, padding, ksize, strict=True)
        ]
    else:
        out_shape = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, k, d in zip(in_shape, stride, padding, ksize, dilation, strict=True)
        ]
    seed, share, batch = (
        draw(st.integers(0, 1000)),
        draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])),
        draw(st.integers(1, 3)),
    )
    return in_shape, out_shape, ksize, stride, padding, dilation, transpose, seed, share, batch


@settings(max_examples=150, deadline=None)
@given(case=strided(), marked=st.booleans())
def test_strided_table_equals_the_rulebook(case, marked):
    in_shape, out_shape, ksize, stride, padding, dilation, transpose, seed, share, batch = case
    if min(out_shape) <= 0:
        return
    indices = voxels(in_shape, batch, share, seed)
    expected_rows, expected = by_pairs(
        indices, batch, out_shape, in_shape, ksize, stride, padding, dilation, False, transpose
    )
    limit = strided_table.MAX_MARKED_CELLS if marked else 0
    rows, table = strided_table.strided_table(
        indices,
        batch,
        in_shape,
        out_shape,
        ksize,
        stride,
        padding,
        dilation,
        transpose,
        max_marked_cells=limit,
    )
    assert np.array_equal(rows.numpy(), expected_rows) and np.array_equal(table, expected)
    assert rows.dtype == torch.int32 and table.dtype == np.int32
    turned = neighbour_table.invert_table(table, len(indices))
    k, o = np.nonzero(table >= 0)
    assert np.array_equal(turned[k, table[k, o]], o) and (turned >= 0).sum() == len(k)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ndim=dimensions, seed=st.integers(0, 1000), ordered=st.booleans())
def test_submanifold_table_equals_the_rulebook(data, ndim, seed, ordered):
    shape = [data.draw(st.integers(1, 6)) for _ in range(ndim)]
    ksize = [data.draw(st.integers(1, 3)) for _ in range(ndim)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(ndim)]
    indices = voxels(shape, 2, data.draw(st.sampled_from([0.0, 0.2, 1.0])), seed)
    if ordered and len(indices):
        indices = torch.unique(indices, dim=0)
    half = [k // 2 for k in ksize]
    _, expected = by_pairs(indices, 2, shape, shape, ksize, [1] * ndim, half, dilation, True, False)
    table = neighbour_table.submanifold_table(indices, 2, shape, ksize, dilation)
    assert np.array_equal(table, expected)


@pytest.mark.parametrize("wrong", [[0, 0, 0, 5], [0, -1, 0, 0], [2, 0, 0, 0]])
def test_voxel_outside_the_grid_raises_index_error(wrong):
    indices = torch.tensor([[0, 1, 1, 1], wrong], dtype=torch.int32)
    with pytest.raises(IndexError, match="must lie in"):
        neighbour_table.submanifold_table(indices, 2, [4, 4, 4], [3, 3, 3], [1, 1, 1])
    with pytest.raises(IndexError, match="must lie in"):
        strided_table.strided_table(
            indices, 2, [4, 4, 4], [2, 2, 2], [3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], False
        )


@pytest.mark.parametrize("ordered", [True, False])
def test_number_of_threads_does_not_change_a_table(monkeypatch, ordered):
    for module in (neighbour_table, strided_table):
        monkeypatch.setattr(module, "ROWS_PER_THREAD", 2048)
    indices = voxels([20, 60, 60], 2, 0.1, 3)
    indices = torch.unique(indices, dim=0) if ordered else indices
    strided_case = ([20, 60, 60], [10, 30, 30], [3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1])

    def found(threads: int):
        torch.set_num_threads(threads)
        rows, table = strided_table.strided_table(indices, 2, *strided_case, False)
        return rows, table, neighbour_table.submanifold_table(indices, 2, [20, 60, 60], [3, 3, 3], [1, 1, 1])

    before = torch.get_num_threads()
    try:
        rows, table, same = found(1)
        others = found(3)
    finally:
        torch.set_num_threads(before)
    assert (
        torch.equal(rows, others[0]) and np.array_equal(table, others[1]) and np.array_equal(same, others[2])
    )
    in_shape, out_shape, *rest = strided_case
    expected = by_pairs(indices, 2, out_shape, in_shape, *rest, False, False)
    assert np.array_equal(rows, expected[0]) and np.array_equal(table, expected[1])
    half = [1, 1, 1]
    _, expected_same = by_pairs(indices, 2, in_shape, in_shape, [3, 3, 3], half, half, half, True, False)
    assert np.array_equal(same, expected_same)


def test_prefix_popcounts_count_set_bits():
    rng = np.random.default_rng(0)
    marks = rng.integers(0, 1 << 63, 1000, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    marks[::3] = 0
    before = np.empty(1000, np.int32)
    total = rank_bitmap.prefix_popcounts(marks, before)
    ones = np.array([int(word).bit_count() for word in marks])
    assert total == ones.sum() and np.array_equal(before, np.cumsum(ones) - ones)


def test_layers_with_one_key_and_other_voxels_are_rejected():
    from mmcv.ops import SparseConvTensor, SubMConv3d

    from serve.runtime.fused_sparse_conv import FusedSparseConv

    layer = FusedSparseConv(SubMConv3d(2, 2, 3, padding=1, indice_key="a"), relu=False)
    first = SparseConvTensor(torch.ones(3, 2), voxels([4, 4, 4], 1, 1.0, 0)[:3], [4, 4, 4], 1)
    layer(first)
    other = SparseConvTensor(torch.ones(5, 2), voxels([4, 4, 4], 1, 1.0, 0)[:5], [4, 4, 4], 1)
    other.indice_dict = first.indice_dict
    with pytest.raises(ValueError, match="5 rows of features for 3 voxels of 'a'"):
        layer(other)


def test_converted_weights_are_repacked():
    from mmcv.ops import SparseConvTensor, SubMConv3d

    from serve.runtime.fused_sparse_conv import FusedSparseConv

    layer = FusedSparseConv(SubMConv3d(2, 2, 3, padding=1), relu=False)
    x = SparseConvTensor(torch.ones(3, 2), voxels([4, 4, 4], 1, 1.0, 0)[:3], [4, 4, 4], 1)
    with torch.no_grad():
        single = layer(x).features
        x.indice_dict.clear()
        double = layer.double()(SparseConvTensor(x.features.double(), x.indices, [4, 4, 4], 1)).features
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single)
        assert torch.equal(layer.float()(x).features, single)


def test_convolve_table_rejects_inconsistent_shapes():
    kernel = pack_filters(torch.ones(3, 4, 5), None)
    with pytest.raises(ValueError, match="features"):
        convolve_table(torch.ones(2, 3), kernel, np.full((3, 2), -1, np.int32))
    with pytest.raises(ValueError, match="offsets"):
        convolve_table(torch.ones(2, 4), kernel, np.full((4, 2), -1, np.int32))
