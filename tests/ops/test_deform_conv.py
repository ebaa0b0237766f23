"""Deformable convolution, numba and torch versions, against loops from its definition, and through mmcv."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.deform import columns as deform_columns
from serve.ops.deform import conv as deform_conv
from serve.ops.deform.columns import Geometry


def sample(plane: np.ndarray, y: float, x: float) -> float:
    """Interpolate bilinearly with zeros outside: pixels nearer than one count by distance."""
    total = 0.0
    for i in range(plane.shape[0]):
        for j in range(plane.shape[1]):
            total += plane[i, j] * max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
    return total


def naive(x, weight, bias, offset, mask, g: Geometry) -> np.ndarray:
    x, weight, offset = (t.double().numpy() for t in (x, weight, offset))
    rows, columns = g.output_size(*x.shape[2:])
    out = np.zeros((len(x), len(weight), rows, columns))
    per_group, per_deform = x.shape[1] // g.groups, x.shape[1] // g.deform_groups
    for b, o, i, j in np.ndindex(out.shape):
        group = o // (len(weight) // g.groups)
        for c in range(per_group):
            channel = group * per_group + c
            d = channel // per_deform
            for tap in range(g.taps):
                u, v = divmod(tap, g.kernel[1])
                dy, dx = offset[b, (d * g.taps + tap) * 2 : (d * g.taps + tap) * 2 + 2, i, j]
                value = sample(
                    x[b, channel],
                    i * g.stride[0] - g.padding[0] + u * g.dilation[0] + dy,
                    j * g.stride[1] - g.padding[1] + v * g.dilation[1] + dx,
                )
                factor = 1.0 if mask is None else float(mask[b, d * g.taps + tap, i, j])
                out[b, o, i, j] += weight[o, c, u, v] * value * factor
        out[b, o, i, j] += 0.0 if bias is None else float(bias[o])
    return out


def problem(seed: int, g: Geometry, batch: int = 2, size=(6, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels, out = g.groups * g.deform_groups, 2 * g.groups
    rows, columns = g.output_size(*size)
    x = random(batch, channels, *size)
    weight, bias = random(out, channels // g.groups, *g.kernel), random(out)
    # Some samples land on pixels, some far outside.
    offset = random(batch, g.deform_groups * 2 * g.taps, rows, columns) * 2
    offset = torch.where(torch.rand(offset.shape, generator=generator) < 0.2, offset.round(), offset)
    mask = torch.rand(batch, g.deform_groups * g.taps, rows, columns, generator=generator).to(dtype)
    return x, weight, bias, offset, mask


def forward_v1(x, weight, offset, g: Geometry) -> torch.Tensor:
    out = x.new_empty((len(x), len(weight), *g.output_size(*x.shape[2:])))
    deform_conv.deform_conv_forward(
        x, weight, offset, out, x.new_empty(0), x.new_empty(0), g.kernel[1], g.kernel[0], g.stride[1],
        g.stride[0], g.padding[1], g.padding[0], g.dilation[1], g.dilation[0], g.groups, g.deform_groups, 1,
    )  # fmt: skip
    return out


def forward_v2(x, weight, bias, offset, mask, g: Geometry) -> torch.Tensor:
    out = x.new_empty((len(x), len(weight), *g.output_size(*x.shape[2:])))
    deform_conv.modulated_deform_conv_forward(
        x, weight, x.new_empty(0) if bias is None else bias, x.new_empty(0), offset, mask, out,
        x.new_empty(0), *g.kernel, *g.stride, *g.padding, *g.dilation, g.groups, g.deform_groups,
        bias is not None,
    )  # fmt: skip
    return out


geometries = st.builds(
    Geometry,
    kernel=st.sampled_from([(3, 3), (1, 1), (1, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 1), (1, 3)]),
    padding=st.sampled_from([(0, 0), (1, 1), (2, 1), (0, 3)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    groups=st.sampled_from([1, 2, 3]),
    deform_groups=st.sampled_from([1, 2]),
)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), g=geometries)
def test_numba_and_torch_versions_equal_the_definition(seed, g):
    x, weight, bias, offset, mask = problem(seed, g, batch=1)
    plain, masked = naive(x, weight, None, offset, None, g), naive(x, weight, bias, offset, mask, g)
    np.testing.assert_allclose(forward_v1(x, weight, offset, g), plain, atol=2e-4)
    np.testing.assert_allclose(forward_v2(x, weight, bias, offset, mask, g), masked, atol=2e-4)
    torch_way = deform_columns.convolve_torch(x, weight, bias, offset, mask, g)
    np.testing.assert_allclose(torch_way, masked, atol=2e-4)


@pytest.mark.parametrize("deform_groups", [1, 2, 4, 12])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_convolution_groups_and_deformable_groups_are_independent(groups, deform_groups):
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, deform_groups)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 7, 9, generator=generator)
    weight = torch.randn(12, 12 // groups, 3, 3, generator=generator)
    offset = torch.randn(2, deform_groups * 18, 7, 9, generator=generator)
    mask = torch.rand(2, deform_groups * 9, 7, 9, generator=generator)
    expected = deform_columns.convolve_torch(*(t.double() for t in (x, weight)), None, offset, mask, g)
    np.testing.assert_allclose(forward_v2(x, weight, None, offset, mask, g), expected, atol=1e-4)


def test_zero_offsets_give_a_plain_convolution_across_blocks(monkeypatch):
    g = Geometry((3, 3), (2, 1), (1, 2), (1, 2), 2, 1)
    monkeypatch.setattr(deform_columns, "CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(deform_columns, "DEVICE_BLOCK_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 31, 20, generator=generator)
    weight, bias = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(6, generator=generator)
    expected = torch.nn.functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    offset = x.new_zeros((3, 18, *expected.shape[2:]))
    mask = x.new_ones((3, 9, *expected.shape[2:]))
    got = forward_v2(x, weight, bias, offset, mask, g)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    got = forward_v2(*(t.double() for t in (x, weight, bias, offset, mask)), g)
    torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=1e-4)


def test_deform_conv_accepts_float16_slices_and_empty_batches():
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 2)
    x, weight, bias, offset, mask = problem(3, g)
    expected = forward_v2(x, weight, bias, offset, mask, g)
    wide = torch.cat((x, x), 1)[:, : x.shape[1]].to(memory_format=torch.channels_last)
    assert torch.equal(forward_v2(wide, weight, bias, offset, mask, g), expected)
    halves = [t.half() for t in (x, weight, bias, offset, mask)]
    coarse = forward_v2(*halves, g)
    exact = forward_v2(*(t.float() for t in halves), g)
    assert coarse.dtype == torch.float16
    torch.testing.assert_close(coarse.float(), exact, atol=2e-2, rtol=2e-3)
    assert forward_v2(x[:0], weight, bias, offset[:0], mask[:0], g).shape == (0, 2, 6, 5)


def test_infinite_and_nan_offsets_sample_zero():
    g = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1, 1)
    x, weight = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 2, 3)
    offset[0, 0, 0, 0], offset[0, 1, 0, 1], offset[0, 0, 0, 2] = float("nan"), float("inf"), -1e30
    expected = [[[[0, 0, 0], [1, 1, 1]]]]
    assert forward_v1(x, weight, offset, g).tolist() == expected
    assert forward_v1(x.double(), weight.double(), offset.double(), g).tolist() == expected


def test_number_of_threads_does_not_change_a_bit():
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 1)
    x, weight, bias, offset, mask = problem(5, g, size=(40, 30))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = forward_v2(x, weight, bias, offset, mask, g)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(forward_v2(x, weight, bias, offset, mask, g), alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda p: p.update(weight=torch.zeros(2, 3, 3, 3))),
        ("offset", lambda p: p.update(offset=p["offset"][:, :4])),
        ("mask", lambda p: p.update(mask=p["mask"][..., :-1])),
        ("bias", lambda p: p.update(bias=torch.zeros(5))),
        ("input", lambda p: p.update(x=p["x"][0])),
        ("input", lambda p: p.update(x=p["x"].long())),
        ("stride", lambda p: p.update(g=Geometry((3, 3), (0, 1), (1, 1), (1, 1), 1, 1))),
        ("deformable_group", lambda p: p.update(g=Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 5))),
        ("output", lambda p: p.update(g=Geometry((9, 9), (1, 1), (0, 0), (1, 1), 1, 1))),
    ],
)
def test_errors_name_the_wrong_argument(name, change):
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 1)
    p = dict(zip(("x", "weight", "bias", "offset", "mask"), problem(0, g), strict=True), g=g)
    out = torch.zeros(2, 2, 6, 5)
    change(p)
    g = p["g"]
    with pytest.raises((ValueError, TypeError), match=name):
        deform_conv.modulated_deform_conv_forward(
            p["x"], p["weight"], p["bias"], out[:0], p["offset"], p["mask"], out, out[:0], *g.kernel,
            *g.stride, *g.padding, *g.dilation, g.groups, g.deform_groups, True,
        )  # fmt: skip


def test_offsets_of_a_larger_map_are_read_with_strides_of_the_output():
    """The reference does not check the shape; mmdet's DyHead relies on that."""
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1, 1)
    x, weight, bias, offset, mask = problem(0, g)
    size = g.output_size(*x.shape[2:])
    large = [torch.randn(len(x), maps.shape[1], 2 * size[0], 2 * size[1]) for maps in (offset, mask)]
    read = []
    for maps in large:
        rows = np.zeros((len(x), maps.shape[1], *size), np.float32)
        for at in np.ndindex(rows.shape):
            memory = maps[at[0]].numpy().ravel()
            rows[at] = memory[(at[1] * size[0] + at[2]) * size[1] + at[3]]
        read.append(torch.from_numpy(rows))
    expected = naive(x, weight, bias, *read, g)
    np.testing.assert_allclose(forward_v2(x, weight, bias, *large, g), expected, atol=2e-4)
    with pytest.raises(ValueError, match="offset"):
        forward_v2(x, weight, bias, offset[:, :, 1:], mask, g)


def test_mmcv_layers_run_with_gradients_equal_to_finite_differences(mmcv_ops):
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2, 1)
    x, weight, bias, offset, mask = problem(11, g, dtype=torch.float64, batch=1, size=(3, 3))
    leaves = [t.requires_grad_() for t in (x, offset * 0.7 + 0.013, mask, weight, bias)]

    def v2(x, offset, mask, weight, bias):
        return mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 2, 1)

    np.testing.assert_allclose(
        v2(*leaves).detach(),
        naive(*(t.detach() for t in (x, weight, bias, leaves[1], mask)), g),
        atol=1e-9,
    )
    assert torch.autograd.gradcheck(v2, leaves, atol=1e-5)

    def v1(x, offset, weight):
        return mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 1)

    assert torch.autograd.gradcheck(v1, [leaves[0], leaves[1], leaves[3]], atol=1e-5)


def test_mmcv_layer_pads_an_input_smaller_than_its_kernel(mmcv_ops):
    layer = mmcv_ops.DeformConv2d(2, 3, 3, padding=1)
    with torch.no_grad():
        got = layer(torch.ones(1, 2, 2, 2), torch.zeros(1, 18, 2, 2))
    expected = torch.nn.functional.conv2d(torch.ones(1, 2, 2, 2), layer.weight, padding=1)
    torch.testing.assert_close(got, expected)
