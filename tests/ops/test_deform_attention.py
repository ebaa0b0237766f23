"""Multi-scale deformable attention against loops from its definition and against mmcv's torch function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.deform import attention as deform_attention


def problem(seed, batch, queries, heads, shapes, points, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = sum(h * w for h, w in shapes)
    starts = np.cumsum([0, *(h * w for h, w in shapes)])[:-1]
    value = torch.randn(batch, keys, heads, channels, generator=generator).to(dtype)
    # Some positions are outside.
    places = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=generator)
    return value, torch.tensor(shapes), torch.tensor(starts), places.to(dtype), weights.to(dtype)


def naive(value, shapes, starts, places, weights) -> np.ndarray:
    batch, queries, heads, levels, points, _ = places.shape
    out = np.zeros((batch, queries, heads, value.shape[3]))
    for b, q, h, level, p in np.ndindex(batch, queries, heads, levels, points):
        height, width = shapes[level].tolist()
        x = float(places[b, q, h, level, p, 0]) * width - 0.5
        y = float(places[b, q, h, level, p, 1]) * height - 0.5
        for i in range(height):
            for j in range(width):
                near = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                row = value[b, int(starts[level]) + i * width + j, h].double().numpy()
                out[b, q, h] += float(weights[b, q, h, level, p]) * near * row
    return out.reshape(batch, queries, heads * value.shape[3])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    queries=st.integers(0, 4),
    heads=st.integers(1, 3),
    points=st.integers(1, 3),
    channels=st.sampled_from([1, 4, 5]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_numba_and_torch_versions_equal_the_definition(seed, batch, queries, heads, points, channels, index):
    value, shapes, starts, places, weights = problem(
        seed, batch, queries, heads, [(4, 3), (1, 2)], points, channels
    )
    expected = naive(value, shapes, starts, places, weights)
    got = deform_attention.ms_deform_attn_forward(
        value, shapes.to(index), starts.to(index), places, weights, 64
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    doubles = (value.double(), shapes, starts, places.double(), weights.double())
    np.testing.assert_allclose(deform_attention.ms_deform_attn_forward(*doubles, 64), expected, atol=1e-6)


@pytest.fixture
def mmcv_attention(mmcv_ops):
    import mmcv.ops.multi_scale_deform_attn as module

    return module


def test_attention_equals_the_torch_function_of_mmcv(mmcv_attention, monkeypatch):
    args = problem(1, 2, 50, 8, [(20, 30), (10, 15), (5, 8)], 4, 32)
    value, shapes, _, places, weights = args
    expected = mmcv_attention.multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    apply = mmcv_attention.MultiScaleDeformableAttnFunction.apply
    torch.testing.assert_close(apply(*args, 64), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(deform_attention, "SAMPLES_PER_BLOCK", 1)
    blocked = deform_attention._attend_torch(
        value, [(0, 20, 30), (600, 10, 15), (750, 5, 8)], places, weights
    )
    torch.testing.assert_close(blocked, expected, atol=1e-5, rtol=1e-5)


def test_attend_replaces_the_cpu_function_of_mmcv(mmcv_attention, monkeypatch):
    layer = mmcv_attention.MultiScaleDeformableAttention(16, 4, 2, 2, batch_first=True).eval()
    torch.nn.init.normal_(layer.attention_weights.weight)
    shapes = torch.tensor([(4, 3), (2, 2)])
    query = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    points = torch.rand(2, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    args = {"reference_points": points, "spatial_shapes": shapes, "level_start_index": torch.tensor([0, 12])}
    expected = layer(query, **args)
    (slope,) = torch.autograd.grad(expected.sum(), layer.value_proj.weight)
    monkeypatch.setattr(mmcv_attention, "multi_scale_deformable_attn_pytorch", deform_attention.attend)
    got = layer(query, **args)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), layer.value_proj.weight)[0], slope, atol=1e-4, rtol=1e-4
    )
    with torch.inference_mode():
        torch.testing.assert_close(layer(query, **args), expected.detach(), atol=1e-5, rtol=1e-5)


def test_gradients_equal_finite_differences(mmcv_attention):
    value, shapes, starts, places, weights = problem(2, 1, 2, 2, [(3, 4), (2, 2)], 2, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (value, places, weights)]

    def attend(value, places, weights):
        return mmcv_attention.MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, places, weights, 64
        )

    assert torch.autograd.gradcheck(attend, leaves, atol=1e-5)


def test_attention_accepts_float16_slices_and_nan():
    value, shapes, starts, places, weights = problem(3, 1, 3, 2, [(3, 4)], 2, 4)
    expected = deform_attention.ms_deform_attn_forward(value, shapes, starts, places, weights, 1)
    wide = torch.cat((value, value), -1)[..., :4]
    assert torch.equal(
        deform_attention.ms_deform_attn_forward(wide, shapes, starts, places, weights, 1), expected
    )
    coarse = deform_attention.ms_deform_attn_forward(
        value.half(), shapes, starts, places.half(), weights.half(), 1
    )
    assert coarse.dtype == torch.float16
    torch.testing.assert_close(coarse.float(), expected, atol=3e-2, rtol=3e-2)
    for dtype in (torch.float32, torch.float64):
        nowhere = torch.full_like(places, float("nan")).to(dtype)
        got = deform_attention.ms_deform_attn_forward(
            value.to(dtype), shapes, starts, nowhere, weights.to(dtype), 1
        )
        assert not got.any()


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("value", 0, lambda t: t[0]),
        ("floating point", 0, lambda t: t.long()),
        ("value_spatial_shapes", 1, lambda t: t * 2),
        ("value_spatial_shapes", 1, lambda t: t[:1]),
        ("value_level_start_index", 2, lambda t: t[:1]),
        ("sampling_locations", 3, lambda t: t[:, :, :1]),
        ("attention_weights", 4, lambda t: t[..., :1]),
    ],
)
def test_errors_name_the_wrong_argument(name, place, change):
    args = list(problem(0, 1, 2, 2, [(3, 4), (2, 2)], 2, 3))
    args[place] = change(args[place])
    with pytest.raises((ValueError, TypeError), match=name):
        deform_attention.ms_deform_attn_forward(*args, 64)
