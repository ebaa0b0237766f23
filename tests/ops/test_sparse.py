"""Sparse convolution against dense convolution, on every device path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.sparse import conv as sparse_conv
from serve.ops.sparse import rulebook


def random_sparse(seed: int, shape: tuple[int, ...], batch: int, fill: float, channels: int):
    """Draw indices (N, 1 + D) int32 in random order, features, and the dense (B, C, *shape) equivalent."""
    rng = np.random.default_rng(seed)
    occupied = np.argwhere(rng.random((batch, *shape)) < fill).astype(np.int32)
    rng.shuffle(occupied)
    indices = torch.from_numpy(occupied)
    features = torch.from_numpy(rng.standard_normal((len(occupied), channels)).astype(np.float32))
    dense = torch.zeros(batch, channels, *shape)
    for row, feature in zip(indices.tolist(), features, strict=True):
        dense[(row[0], slice(None), *row[1:])] = feature
    return indices, features, dense


def out_shape(shape, ksize, stride, padding, dilation):
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape, ksize, stride, padding, dilation, strict=True)
    ]


def at_rows(dense: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (
        torch.stack([dense[(r[0], slice(None), *r[1:])] for r in rows.tolist()])
        if len(rows)
        else dense.new_zeros(0)
    )


def build_rulebook(path, indices, batch, out, shape, ksize, stride, padding, dilation, subm=0, transpose=0):
    """Build a rulebook with the numba or the torch version (`path`)."""
    geometry = np.array(
        [
            ksize,
            [1] * len(ksize) if subm else stride,
            [k // 2 for k in ksize] if subm else padding,
            dilation,
            out,
            shape,
        ],
        dtype=np.int64,
    )
    build = {"numba": rulebook._rulebook_cpu, "torch": rulebook._rulebook_torch}[path]
    return build(indices, geometry, bool(subm), bool(transpose))


CONV = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@pytest.mark.parametrize("path", ["numba", "torch"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    ndim=st.sampled_from([2, 3]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    kernel=st.integers(1, 3),
    fill=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_strided_convolution_equals_dense_convolution(path, seed, ndim, stride, padding, kernel, fill):
    shape = (7, 6, 5)[:ndim]
    ksize, strides, pads, ones = [kernel] * ndim, [stride] * ndim, [padding] * ndim, [1] * ndim
    indices, features, dense = random_sparse(seed, shape, 2, fill, 3)
    weight = torch.randn(*ksize, 3, 4, generator=torch.Generator().manual_seed(seed))
    out = out_shape(shape, ksize, strides, pads, ones)
    rows, pairs, counts = build_rulebook(path, indices, 2, out, shape, ksize, strides, pads, ones)
    got = sparse_conv.indice_conv_forward(features, weight, pairs, counts, rows.shape[0])
    expected = CONV[ndim](dense, weight.permute(-1, -2, *range(ndim)), stride=stride, padding=padding)
    full = torch.zeros_like(expected)
    for row, value in zip(rows.tolist(), got, strict=True):
        full[(row[0], slice(None), *row[1:])] = value
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["numba", "torch"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), ndim=st.sampled_from([2, 3]), fill=st.sampled_from([0.0, 0.1, 0.5]))
def test_submanifold_convolution_equals_dense_convolution_at_its_own_voxels(path, seed, ndim, fill):
    shape = (6, 5, 7)[:ndim]
    indices, features, dense = random_sparse(seed, shape, 2, fill, 3)
    weight = torch.randn(*[3] * ndim, 3, 4, generator=torch.Generator().manual_seed(seed))
    rows, pairs, counts = build_rulebook(
        path, indices, 2, shape, shape, [3] * ndim, [1] * ndim, [1] * ndim, [1] * ndim, subm=1
    )
    assert torch.equal(rows, indices)
    got = sparse_conv.indice_conv_forward(features, weight, pairs, counts, rows.shape[0], subm=1)
    expected = at_rows(CONV[ndim](dense, weight.permute(-1, -2, *range(ndim)), padding=1), rows)
    torch.testing.assert_close(got, expected.reshape(got.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["numba", "torch"])
def test_transposed_convolution_equals_dense_transposed_convolution(path):
    shape, kernel, stride, padding = (4, 5, 3), [3] * 3, [2] * 3, [1] * 3
    indices, features, dense = random_sparse(3, shape, 2, 0.3, 3)
    weight = torch.randn(3, 3, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    out = [(n - 1) * 2 - 2 + 3 for n in shape]
    rows, pairs, counts = build_rulebook(
        path, indices, 2, out, shape, kernel, stride, padding, [1] * 3, transpose=1
    )
    got = sparse_conv.indice_conv_forward(features, weight, pairs, counts, rows.shape[0])
    expected = torch.nn.functional.conv_transpose3d(dense, weight.permute(3, 4, 0, 1, 2), stride=2, padding=1)
    torch.testing.assert_close(got, at_rows(expected, rows), atol=1e-5, rtol=1e-5)


def test_numba_and_torch_rulebooks_are_equal():
    shape = [9, 8, 7]
    indices, _, _ = random_sparse(5, tuple(shape), 3, 0.2, 1)
    out = out_shape(shape, [3] * 3, [2] * 3, [1] * 3, [1] * 3)
    books = [
        build_rulebook(path, indices, 3, out, shape, [3] * 3, [2] * 3, [1] * 3, [1] * 3)
        for path in ("numba", "torch")
    ]
    connections = []
    for rows, pairs, counts in books:
        connections.append(
            {
                (k, source, tuple(rows[target].tolist()))
                for k, count in enumerate(counts.tolist())
                for source, target in zip(
                    pairs[k, 0, :count].tolist(), pairs[k, 1, :count].tolist(), strict=True
                )
            }
        )
        assert (pairs[0, :, counts[0] :] == -1).all()
    assert connections[0] == connections[1]


@pytest.mark.parametrize(("subm", "inverse"), [(0, 0), (1, 0), (0, 1)])
def test_gradients_equal_finite_differences(subm, inverse):
    shape = [4, 4, 4]
    indices, _, _ = random_sparse(1, tuple(shape), 1, 0.3, 2)
    ksize = [3] * 3
    out = shape if subm else out_shape(shape, ksize, [2] * 3, [1] * 3, [1] * 3)
    rows, pairs, counts = rulebook.get_indice_pairs_3d_forward(
        indices, 1, out, shape, ksize, [2] * 3, [1] * 3, [1] * 3, [0] * 3, subm, 0
    )
    n_in, n_out = (rows.shape[0], indices.shape[0]) if inverse else (indices.shape[0], rows.shape[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_in, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 3, 3, 2, 3, generator=generator, dtype=torch.float64)
    grad = torch.randn(n_out, 3, generator=generator, dtype=torch.float64)
    got_x, got_weight = sparse_conv.indice_conv_backward(x, weight, grad, pairs, counts, inverse, subm)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> float:
        out = sparse_conv.indice_conv_forward(x, weight, pairs, counts, n_out, inverse, subm)
        return float((out * grad).sum())

    step = 1e-6
    for tensor, got in ((x, got_x), (weight, got_weight)):
        flat, flat_got = tensor.view(-1), got.reshape(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 20)):
            kept = float(flat[i])
            flat[i] = kept + step
            above = loss(x, weight)
            flat[i] = kept - step
            below = loss(x, weight)
            flat[i] = kept
            assert (above - below) / (2 * step) == pytest.approx(float(flat_got[i]), abs=1e-6)


def test_max_pool_and_its_gradient_use_the_maximum():
    shape, ksize = [4, 4], [2, 2]
    indices, features, _ = random_sparse(2, (4, 4), 1, 0.6, 2)
    features = features.abs()
    rows, pairs, counts = rulebook.get_indice_pairs_2d_forward(
        indices, 1, [2, 2], shape, ksize, [2, 2], [0, 0], [1, 1], [0, 0], 0, 0
    )
    pooled = sparse_conv.indice_maxpool_forward(features, pairs, counts, rows.shape[0])
    for row, value in zip(rows.tolist(), pooled, strict=True):
        members = [
            f for i, f in zip(indices.tolist(), features, strict=True) if [v // 2 for v in i[1:]] == row[1:]
        ]
        assert torch.equal(value, torch.stack(members).amax(0))
    grad = sparse_conv.indice_maxpool_backward(features, pooled, torch.ones_like(pooled), pairs, counts)
    assert grad.sum() == pooled.numel()


def test_empty_input_gives_empty_output():
    empty = torch.zeros((0, 4), dtype=torch.int32)
    for subm in (0, 1):
        shape = [5, 5, 5]
        out = shape if subm else [3, 3, 3]
        rows, pairs, counts = rulebook.get_indice_pairs_3d_forward(
            empty, 1, out, shape, [3] * 3, [2] * 3, [1] * 3, [1] * 3, [0] * 3, subm, 0
        )
        result = sparse_conv.indice_conv_forward(
            torch.zeros(0, 2), torch.zeros(3, 3, 3, 2, 4), pairs, counts, rows.shape[0], 0, subm
        )
        assert rows.shape == (0, 4) and result.shape == (0, 4)


def test_index_outside_the_grid_raises_index_error():
    indices = torch.tensor([[0, 1, 1, 9]], dtype=torch.int32)
    with pytest.raises(IndexError, match="must lie in"):
        rulebook.get_indice_pairs_3d_forward(
            indices, 1, [5] * 3, [5] * 3, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, 1, 0
        )


@pytest.mark.parametrize("spoil", ["channels", "dtype", "kernel"])
def test_errors_name_the_wrong_argument(spoil):
    features, filters = torch.zeros(2, 3), torch.zeros(3, 3, 3, 4)
    pairs, counts = torch.full((9, 2, 2), -1, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    if spoil == "channels":
        features = torch.zeros(2, 5)
    elif spoil == "dtype":
        features = features.half()
    else:
        pairs = pairs[:4]
    with pytest.raises((ValueError, TypeError), match=r"filters|offsets|indice_pair_num"):
        sparse_conv.indice_conv_forward(features, filters, pairs, counts, 2)


def test_isolated_voxels_give_all_output_voxels():
    # A 3x3x3 kernel of stride 1 has 27 outputs per isolated voxel.
    places = [(0, x, y, z) for x, y, z in itertools.product(range(1, 30, 4), repeat=3)]
    indices = torch.tensor(places, dtype=torch.int32)
    rows, _, counts = rulebook.get_indice_pairs_3d_forward(
        indices, 1, [32] * 3, [32] * 3, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, 0, 0
    )
    assert rows.shape[0] == 27 * len(places) == len({tuple(r) for r in rows.tolist()})
    assert counts.tolist() == [len(places)] * 27


def test_autocast_does_not_change_the_result():
    shape = [6, 6, 6]
    indices, features, _ = random_sparse(4, (6, 6, 6), 1, 0.3, 3)
    weight = torch.randn(3, 3, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    for subm, out in ((1, shape), (0, [3, 3, 3])):
        rows, pairs, counts = rulebook.get_indice_pairs_3d_forward(
            indices, 1, out, shape, [3] * 3, [2] * 3, [1] * 3, [1] * 3, [0] * 3, subm, 0
        )
        plain = sparse_conv.indice_conv_forward(features, weight, pairs, counts, len(rows), 0, subm)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = sparse_conv.indice_conv_forward(features, weight, pairs, counts, len(rows), 0, subm)
        assert torch.equal(plain, inside) and inside.dtype == torch.float32


def test_duplicate_voxels_are_summed():
    indices = torch.tensor([[0, 2, 2], [0, 2, 2], [0, 3, 3]], dtype=torch.int32)
    features = torch.tensor([[1.0], [10.0], [100.0]])
    weight = torch.ones(2, 2, 1, 1)
    rows, pairs, counts = rulebook.get_indice_pairs_2d_forward(
        indices, 1, [2, 2], [4, 4], [2, 2], [2, 2], [0, 0], [1, 1], [0, 0], 0, 0
    )
    got = sparse_conv.indice_conv_forward(features, weight, pairs, counts, len(rows))
    assert rows.tolist() == [[0, 1, 1]] and got.tolist() == [[111.0]]


@pytest.mark.parametrize(("source", "target"), [(0, 5), (7, 0)])
def test_rulebook_with_a_row_out_of_range_is_rejected(source, target):
    pairs = torch.full((1, 2, 2), -1, dtype=torch.int32)
    pairs[0, 0, 0], pairs[0, 1, 0] = source, target
    with pytest.raises(IndexError, match="row"):
        sparse_conv.indice_conv_forward(
            torch.zeros(2, 3), torch.zeros(1, 3, 4), pairs, torch.tensor([1], dtype=torch.int32), 2
        )


@pytest.mark.parametrize("channels", [(1, 3), (5, 8), (16, 16), (7, 64), (32, 128), (3, 96)])
def test_numba_version_equals_torch_version(channels):
    shape = [6, 6, 6]
    indices, features, _ = random_sparse(9, (6, 6, 6), 2, 0.3, channels[0])
    weight = torch.randn(3, 3, 3, *channels, generator=torch.Generator().manual_seed(0))
    rows, pairs, counts = rulebook.get_indice_pairs_3d_forward(
        indices, 2, [3] * 3, shape, [3] * 3, [2] * 3, [1] * 3, [1] * 3, [0] * 3, 0, 0
    )
    compiled = sparse_conv.indice_conv_forward(features, weight, pairs, counts, len(rows))
    in_double = sparse_conv.indice_conv_forward(features.double(), weight.double(), pairs, counts, len(rows))
    torch.testing.assert_close(compiled, in_double.float(), atol=1e-4, rtol=1e-4)


def test_number_of_threads_does_not_change_the_result():
    indices, features, _ = random_sparse(11, (14, 14, 14), 1, 0.5, 16)  # several tiles, the last one short
    weight = torch.randn(3, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shape = [14, 14, 14]
    _, pairs, counts = rulebook.get_indice_pairs_3d_forward(
        indices, 1, shape, shape, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, 1, 0
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                sparse_conv.indice_conv_forward(features, weight, pairs, counts, len(indices), 0, 1)
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("channels", [(4, 16), (16, 24), (5, 7), (16, 64)])
def test_other_rows_do_not_change_a_rows_bits(channels):
    shape = [9, 9, 9]
    indices, features, _ = random_sparse(12, (9, 9, 9), 4, 0.4, channels[0])
    weight = torch.randn(3, 3, 3, *channels, generator=torch.Generator().manual_seed(0))

    def convolve(rows: torch.Tensor) -> torch.Tensor:
        own = indices[rows].clone()
        own[:, 0] -= own[:, 0].min()
        _, pairs, counts = rulebook.get_indice_pairs_3d_forward(
            own, 4, shape, shape, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, 1, 0
        )
        return sparse_conv.indice_conv_forward(features[rows], weight, pairs, counts, len(rows), 0, 1)

    everything = convolve(torch.arange(len(indices)))
    for batch in range(4):
        rows = (indices[:, 0] == batch).nonzero().squeeze(1)
        assert torch.equal(convolve(rows), everything[rows])
