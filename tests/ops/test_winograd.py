"""3 x 3 convolution by minimal filtering against torch's convolution in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.cpu import winograd
from serve.ops.cpu.gemm import CHANNELS, LANES


def random_layer(seed: int, batch: int, inputs: int, outputs: int, height: int, width: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (3 * inputs**0.5)
    return x, weight, torch.randn(outputs, generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    height=st.integers(1, 11),
    width=st.sampled_from([1, 2, 3, 7, 8, 97, 100]),  # more than one block of tiles too
    channels_last=st.booleans(),
    relu=st.booleans(),
    panels=st.integers(1, 2),  # two of them form a wide panel with AVX-512
)
def test_winograd_equals_direct_convolution_at_every_size(
    seed, batch, height, width, channels_last, relu, panels
):
    x, weight, bias = random_layer(seed, batch, LANES, panels * CHANNELS, height, width)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    got = winograd.convolve_3x3(x, winograd.transform_weight(weight), bias, relu=relu)
    torch.testing.assert_close(got, (expected.relu() if relu else expected).float(), atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_batch_and_threads_do_not_change_an_images_bits():
    x, weight, bias = random_layer(3, 4, 2 * LANES, 2 * CHANNELS, 13, 30)
    transformed = winograd.transform_weight(weight)
    before = torch.get_num_threads()
    together = winograd.convolve_3x3(x, transformed, bias)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for k in range(4):
                assert torch.equal(winograd.convolve_3x3(x[k : k + 1], transformed, bias)[0], together[k])
    finally:
        torch.set_num_threads(before)


def test_relu_keeps_nan():
    x, weight, bias = random_layer(5, 1, LANES, CHANNELS, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    got = winograd.convolve_3x3(x, winograd.transform_weight(weight), bias, relu=True)
    assert got.isnan().any()


def test_errors_name_the_wrong_argument():
    x, weight, bias = random_layer(0, 1, LANES, CHANNELS, 4, 4)
    transformed = winograd.transform_weight(weight)
    with pytest.raises(ValueError, match="weight must be"):
        winograd.transform_weight(weight[:5])
    with pytest.raises(ValueError, match="weight must be"):
        winograd.transform_weight(weight[..., :1])
    with pytest.raises(TypeError, match="x must be float32"):
        winograd.convolve_3x3(x.double(), transformed, bias)
    with pytest.raises(ValueError, match="x has 1 channels"):
        winograd.convolve_3x3(x[:, :1], transformed, bias)
    with pytest.raises(ValueError, match="bias must be"):
        winograd.convolve_3x3(x, transformed, bias[:3])
