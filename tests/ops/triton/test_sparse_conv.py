"""Sparse convolution in Triton against whole tensors of torch in float64."""

from __future__ import annotations

import pytest
import torch

from serve.ops.sparse.device_table import gather_convolve
from serve.ops.triton.sparse_conv import blocks_for, convolve_rows


def problem(seed, inputs, outputs, offsets, in_channels, out_channels, fill=0.3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(inputs, in_channels, generator=generator)
    weight = torch.randn(offsets, in_channels, out_channels, generator=generator) / in_channels**0.5
    bias = torch.randn(out_channels, generator=generator)
    table = torch.full((outputs, offsets), inputs)
    if inputs:
        there = torch.rand(outputs, offsets, generator=generator) < fill
        table[there] = torch.randint(inputs, (int(there.sum()),), generator=generator)
    return features, weight, bias, table


def expected_of(features, weight, bias, table, relu):
    none = len(features)
    table = torch.where((table >= 0) & (table < none), table, none)
    return gather_convolve(
        features.double(), weight.double(), None if bias is None else bias.double(), table.long(), relu=relu
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "offsets", "in_channels", "out_channels"),
    [
        (50, 40, 27, 4, 16),  # the first layer: fewer channels than a block
        (200, 130, 27, 16, 32),  # more than one tile, the last one not full
        (64, 64, 3, 64, 128),
        (30, 33, 9, 33, 65),  # nothing divides
        (1, 1, 1, 1, 1),
        (5, 3, 27, 128, 10),
    ],
)
def test_float32_equals_the_sum_over_neighbours(
    inputs, outputs, offsets, in_channels, out_channels, with_bias, relu, device
):
    features, weight, bias, table = problem(1, inputs, outputs, offsets, in_channels, out_channels)
    bias = bias if with_bias else None
    wanted = expected_of(features, weight, bias, table, relu)
    got = convolve_rows(
        features.to(device),
        weight.to(device),
        None if bias is None else bias.to(device),
        table.to(device),
        relu,
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    features, weight, bias, table = (
        one.to(dtype) if one.is_floating_point() else one for one in problem(2, 90, 70, 27, 32, 64, fill=1.0)
    )
    wanted = expected_of(features, weight, bias, table, False)
    got = convolve_rows(features.to(device), weight.to(device), bias.to(device), table.to(device), False)
    assert got.dtype == dtype
    # Half a unit of the last place, and what sums in float32 lose. Sums in half precision would be off by far more.
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-3, rtol=0.6 * torch.finfo(dtype).eps)


def test_no_voxels_give_no_rows_and_no_neighbours_give_the_bias(device):
    features, weight, bias, table = (one.to(device) for one in problem(3, 20, 8, 27, 16, 16, fill=0.0))
    assert convolve_rows(features, weight, bias, table[:0], False).shape == (0, 16)
    assert torch.equal(convolve_rows(features, weight, bias, table, False), bias.expand(8, -1))
    assert torch.equal(convolve_rows(features[:0], weight, None, table * 0, True), bias.new_zeros(8, 16))


def test_numbers_out_of_range_are_no_neighbours(device):
    features, weight, bias, table = problem(4, 20, 40, 9, 16, 16)
    table[::3] = torch.tensor([-1, 20, 21, 1 << 40, -(1 << 40), 5, 0, 19, 7])
    wanted = expected_of(features, weight, bias, table, False)
    got = convolve_rows(*(one.to(device) for one in (features, weight, bias, table)), False)
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_table_may_be_of_either_integer_and_of_any_strides(dtype, device):
    features, weight, bias, table = problem(5, 60, 50, 27, 16, 32)
    wanted = expected_of(features, weight, bias, table, True)
    turned = table.to(dtype).t().contiguous().t().to(device)
    got = convolve_rows(features.to(device), weight.to(device), bias.to(device), turned, True)
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-5, rtol=1e-5)


def test_row_has_the_same_bits_whatever_rows_are_beside_it(device):
    features, weight, bias, table = (one.to(device) for one in problem(6, 300, 200, 27, 32, 32))
    some = torch.tensor([0, 3, 77, 150, 199], device=device)
    expected = convolve_rows(features, weight, bias, table, False)[some]
    others = torch.full_like(table, len(features))
    others[some] = table[some]
    assert torch.equal(convolve_rows(features, weight, bias, others, False)[some], expected)
    if (
        device.type != "cpu"
    ):  # numpy's products, by which kernels are interpreted, depend on the place of a row
        assert torch.equal(convolve_rows(features, weight, bias, table[some], False), expected)


def test_relu_keeps_what_is_not_a_number(device):
    features, weight, bias, table = (one.to(device) for one in problem(7, 10, 10, 1, 16, 16, fill=1.0))
    features[int(table[2, 0])] = torch.nan
    assert convolve_rows(features, weight, bias, table, True)[2].isnan().all()


def test_blocks_depend_on_channels_and_are_such_as_a_product_takes():
    for in_channels in (1, 4, 16, 48, 128, 256):
        for out_channels in (1, 16, 64, 100, 256):
            for itemsize in (2, 4):
                blocks = blocks_for(in_channels, out_channels, itemsize)
                sizes = [blocks[f"BLOCK_{axis}"] for axis in "MNK"]
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                # Two operands per stage, in shared memory: 48 KiB fit any device.
                assert (sizes[0] + sizes[1]) * sizes[2] * itemsize * blocks[
                    "num_stages"
                ] <= 48 << 10 or itemsize == 2
