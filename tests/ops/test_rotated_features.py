"""Rotated features, correlation, shifts in time and text regions against loops, and through mmcv."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops import rotated_features, text_regions


def sample(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    return sum(
        plane[i, j] * max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
        for i, j in np.ndindex(height, width)
    )


@pytest.mark.parametrize("points", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotated_feature_align_adds_samples_of_the_box(points, dtype, mmcv_ops):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
    boxes = torch.rand(2, 4, 5, 5, generator=generator).to(dtype) * 40
    expected = features.double().numpy().copy()
    for b, c, i, j in np.ndindex(*features.shape):
        y, x, w, h = (boxes[b, i, j, :4].double().numpy() / 8).tolist()
        a = float(boxes[b, i, j, 4])
        places = [(y, x)]
        if points == 5:
            for u, v in ((w, h), (-w, h), (-w, -h), (w, -h)):
                places.append(
                    (
                        y + (u * math.sin(a) + v * math.cos(a)) / 2,
                        x + (u * math.cos(a) - v * math.sin(a)) / 2,
                    )
                )
        expected[b, c, i, j] += sum(sample(features[b, c].double().numpy(), *place) for place in places)
    got = mmcv_ops.rotated_feature_align(features, boxes, 1 / 8, points)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_active_rotated_filter_permutes_entries(mmcv_ops):
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(2, 3, 4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    places = torch.stack([torch.randperm(36, generator=generator) + 1 for _ in range(8)], 1).int()
    expected = np.zeros((2, 8, 3, 36))
    for o, i, entry, r in np.ndindex(2, 3, 36, 8):
        expected[o, r, i, int(places[entry, r]) - 1] = filters[o, i].detach().flatten()[entry]
    indices = places.view(4, 3, 3, 8)
    got = mmcv_ops.active_rotated_filter(filters, indices)
    np.testing.assert_array_equal(got.detach().numpy().reshape(expected.shape), expected)
    assert torch.autograd.gradcheck(lambda f: mmcv_ops.active_rotated_filter(f, indices), [filters])
    with pytest.raises(IndexError, match="indices"):
        mmcv_ops.active_rotated_filter(filters, indices + 1)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from([1, 3]),
    reach=st.integers(0, 2),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    spread=st.integers(1, 2),
)
def test_correlation_multiplies_shifted_windows(seed, kernel, reach, stride, padding, dilation, spread):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 1, 2, 5, 6, generator=generator)
    rows, columns = (
        (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1 for size in first.shape[2:]
    )
    patch = 2 * reach + 1
    expected = np.zeros((1, patch, patch, rows, columns))
    for i, j, y, x, u, v in np.ndindex(patch, patch, rows, columns, kernel, kernel):
        a, b = y * stride - padding + u * dilation, x * stride - padding + v * dilation
        c, d = a + (i - reach) * spread, b + (j - reach) * spread
        if 0 <= a < 5 and 0 <= b < 6 and 0 <= c < 5 and 0 <= d < 6:
            expected[0, i, j, y, x] += float((first[0, :, a, b] * second[0, :, c, d]).sum())
    output = torch.zeros(expected.shape)
    rotated_features.correlation_forward(
        first, second, output, kernel, kernel, patch, patch, padding, padding, dilation, dilation, spread,
        spread, stride, stride,
    )  # fmt: skip
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_mmcv_correlation_uses_these_kernels(mmcv_ops):
    x = torch.ones(1, 2, 3, 3)
    got = mmcv_ops.Correlation(max_displacement=1)(x, x)
    assert got.shape == (1, 3, 3, 3, 3) and got[0, 1, 1].eq(2).all() and got[0, 0, 0, 0, 0] == 0


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_tin_shift_shifts_both_ways(mmcv_ops, index):
    x = torch.arange(1.0, 25).view(1, 3, 4, 2).double().requires_grad_()
    shift = torch.tensor([[1, -2]], dtype=index)
    got = mmcv_ops.tin_shift(x, shift)
    assert torch.equal(got[0, 1:, :2], x[0, :-1, :2]) and not got[0, 0, :2].any()
    assert torch.equal(got[0, :1, 2:], x[0, 2:, 2:]) and not got[0, 1:, 2:].any()
    # mmcv's backward kernel shifts forward too.
    (gradient,) = torch.autograd.grad(got, x, x.detach())
    assert torch.equal(gradient, got.detach())


def flood(labels: np.ndarray, start: list[tuple[int, int]], steps, joins) -> np.ndarray:
    queue = list(start)
    for y, x in queue:
        for dy, dx in steps:
            v, u = y + dy, x + dx
            if (
                0 <= v < labels.shape[0]
                and 0 <= u < labels.shape[1]
                and labels[v, u] == 0
                and joins(y, x, v, u)
            ):
                labels[v, u] = labels[y, x]
                queue.append((v, u))
    return labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_pixel_group_assigns_pixels_to_the_first_kernel(seed):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((7, 8)) < 0.15, rng.integers(1, 4, (7, 8)), 0).astype(np.int32)
    mask, contour = rng.random((7, 8)) < 0.7, (rng.random((7, 8)) < 0.8).astype(np.uint8)
    embedding = rng.random((7, 8, 2)).astype(np.float32)
    score = rng.random((7, 8)).astype(np.float32)
    means = {k: embedding[labels == k].mean(0) for k in range(1, 4) if (labels == k).any()}
    grown = labels.copy()

    def joins(y, x, v, u):
        return mask[v, u] and np.linalg.norm(means[grown[y, x]] - embedding[v, u]) < 0.4

    start = [(y, x) for y, x in np.argwhere((labels > 0) & (contour > 0))]
    flood(grown, start, [(0, -1), (0, 1), (-1, 0), (1, 0)], joins)
    got = text_regions.pixel_group(
        *(torch.from_numpy(a) for a in (score, mask, embedding, labels, contour)), 4, 0.4
    )
    assert got[0] == [0, 0]
    for label in range(1, 4):
        y, x = np.nonzero(grown == label)
        assert got[label][1] == len(y)
        assert got[label][2:] == np.stack((x, y), 1).ravel().tolist()
        if len(y):
            assert got[label][0] == pytest.approx(score[y, x].mean(), abs=1e-5)


def test_contour_expand_grows_layer_by_layer(mmcv_ops):
    row = np.array(
        [[[1, 1, 1, 1, 1, 1, 1]], [[0, 1, 1, 0, 1, 1, 0]], [[0, 1, 0, 0, 0, 1, 0]]], dtype=np.uint8
    )
    seeds = np.array([[0, 1, 0, 0, 0, 2, 0]], dtype=np.int32)
    # As in PSENet's own code, a pixel added in one layer does not grow in the next: the ends stay 0.
    assert mmcv_ops.contour_expand(row, seeds, 1, 3) == [[0, 1, 1, 1, 2, 2, 0]]
    assert mmcv_ops.contour_expand(row, seeds, 2, 3) == [[0] * 7]


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "points", lambda z: rotated_features.rotated_feature_align_forward(z, z, z, 1.0, 2)),
        (
            ValueError,
            "best_bboxes",
            lambda z: rotated_features.rotated_feature_align_forward(z, z, z, 1.0, 1),
        ),
        (ValueError, "shift", lambda z: rotated_features.tin_shift_forward(z, z[0, 0].int(), z)),
        (TypeError, "shift", lambda z: rotated_features.tin_shift_forward(z, z[0, 0], z)),
        (ValueError, "input2", lambda z: rotated_features.correlation_forward(z, z[:, :1], z, *([1] * 12))),
        (ValueError, "internal_kernel_label", lambda z: text_regions.contour_expand(z[0], z[0, 0, :1], 1, 1)),
        (
            IndexError,
            "kernel_label",
            lambda z: text_regions.pixel_group(z[0, 0], z[0, 0], z[0], z[0, 0] + 5, z[0, 0], 2, 0.1),
        ),
    ],
)
def test_errors_name_the_wrong_argument(error, name, call):
    with pytest.raises(error, match=name):
        call(torch.zeros(1, 2, 2, 2))
