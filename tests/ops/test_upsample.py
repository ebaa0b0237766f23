"""CARAFE, masked convolution and PSA masks against loops from their definitions, and through mmcv."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops import carafe
from serve.ops import masks as pixel_masks


def naive_carafe(features, masks, kernel, groups, scale):
    batch, channels, height, width = features.shape
    out = np.zeros((batch, channels, height * scale, width * scale))
    for b, c, y, x in np.ndindex(*out.shape):
        g = c // (channels // groups)
        for u, v in np.ndindex(kernel, kernel):
            i, j = y // scale + u - kernel // 2, x // scale + v - kernel // 2
            if 0 <= i < height and 0 <= j < width:
                weight = masks[b, (g * kernel + u) * kernel + v, y, x]
                out[b, c, y, x] += float(features[b, c, i, j]) * float(weight)
    return out


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(0, 2),
    kernel=st.sampled_from([1, 3, 5]),
    groups=st.sampled_from([1, 2]),
    scale=st.integers(1, 3),
)
def test_carafe_versions_equal_the_definition(seed, batch, kernel, groups, scale):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 4, 3, 2, generator=generator)
    masks = torch.randn(batch, groups * kernel**2, 3 * scale, 2 * scale, generator=generator)
    expected = naive_carafe(features, masks, kernel, groups, scale)
    for dtype in (torch.float32, torch.float64):
        output = torch.full(expected.shape, 7.0, dtype=dtype)
        carafe.carafe_naive_forward(features.to(dtype), masks.to(dtype), output, kernel, groups, scale)
        np.testing.assert_allclose(output, expected, atol=1e-4)


def test_mmcv_carafe_accepts_float16_and_slices(mmcv_ops, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 6, 5, generator=generator)
    masks = torch.rand(2, 25, 12, 10, generator=generator)
    expected = naive_carafe(features, masks, 5, 1, 2)
    np.testing.assert_allclose(mmcv_ops.carafe(features, masks, 5, 1, 2), expected, atol=1e-4)
    np.testing.assert_allclose(mmcv_ops.carafe_naive(features, masks, 5, 1, 2), expected, atol=1e-4)
    wide = torch.cat((features, features), 1)[:, :4].to(memory_format=torch.channels_last)
    np.testing.assert_allclose(mmcv_ops.carafe(wide, masks, 5, 1, 2), expected, atol=1e-4)
    coarse = mmcv_ops.carafe(features.half(), masks.half(), 5, 1, 2)
    assert coarse.dtype == torch.float16
    np.testing.assert_allclose(coarse, expected, atol=5e-2)
    monkeypatch.setattr(carafe, "ELEMENTS_PER_BLOCK", 1)
    blocked = mmcv_ops.carafe(features.double(), masks.double(), 5, 1, 2)
    np.testing.assert_allclose(blocked, expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from([(3, 3), (1, 1), (3, 5)]),
    share=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_masked_convolution_equals_convolution_within_the_mask(mmcv_ops, seed, kernel, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 6, 7, generator=generator)
    mask = (torch.rand(1, 6, 7, generator=generator) < share).float()
    padding = (kernel[0] // 2, kernel[1] // 2)
    layer = mmcv_ops.MaskedConv2d(3, 2, kernel, padding=padding)
    with torch.no_grad():
        got = layer(x, mask)
        expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=padding) * mask
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "name", "rows", "columns"),
    [
        (IndexError, "mask_h_idx", [4], [0]),
        (IndexError, "mask_w_idx", [0], [-1]),
        (ValueError, "mask_w_idx", [0], [0, 1]),
    ],
)
def test_pixels_out_of_range_raise_errors_that_name_them(error, name, rows, columns):
    rows, columns = torch.tensor(rows), torch.tensor(columns)
    with pytest.raises(error, match=name):
        pixel_masks.masked_im2col_forward(
            torch.zeros(1, 1, 4, 4), rows, columns, torch.zeros(9, len(rows)), 3, 3, 1, 1
        )
    with pytest.raises(error, match=name):
        pixel_masks.masked_col2im_forward(
            torch.zeros(1, len(rows)), rows, columns, torch.zeros(1, 1, 4, 4), 4, 4, 1
        )


def test_masked_kernels_accept_int32_pixels():
    rows = torch.tensor([1], dtype=torch.int32)
    image = torch.zeros(1, 1, 2, 2)
    pixel_masks.masked_col2im_forward(torch.ones(1, 1), rows, rows, image, 2, 2, 1)
    assert image.flatten().tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["collect", "distribute"])
@pytest.mark.parametrize("size", [(3, 5), (5, 3), (1, 1)])
def test_psa_masks_cover_the_map(mmcv_ops, kind, size):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, size[0] * size[1], 3, 4, generator=generator, dtype=torch.float64)
    expected = np.zeros((2, 12, 3, 4))
    for b, y, x, u, v in np.ndindex(2, 3, 4, *size):
        i, j = y + u - (size[0] - 1) // 2, x + v - (size[1] - 1) // 2
        if 0 <= i < 3 and 0 <= j < 4:
            value = masks[b, u * size[1] + v, y, x]
            if kind == "collect":
                expected[b, i * 4 + j, y, x] = value
            else:
                expected[b, y * 4 + x, i, j] = value
    layer = mmcv_ops.PSAMask(kind, size)
    np.testing.assert_array_equal(layer(masks), expected)
    assert torch.autograd.gradcheck(layer, [masks.requires_grad_()])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("kernel_size", (torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), 2, 1, 2)),
        ("features", (torch.zeros(1, 4, 2, 2), torch.zeros(1, 9, 4, 4), torch.zeros(1, 4, 4, 4), 3, 3, 2)),
        ("masks", (torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 4, 4), 3, 1, 2)),
        ("output", (torch.zeros(1, 4, 2, 2), torch.zeros(1, 9, 4, 4), torch.zeros(1, 4, 4, 2), 3, 1, 2)),
    ],
)
def test_carafe_errors_name_the_wrong_argument(name, args):
    with pytest.raises(ValueError, match=name):
        carafe.carafe_naive_forward(*args)
