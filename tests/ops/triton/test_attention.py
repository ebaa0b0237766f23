"""Deformable attention in Triton against the loops on the CPU."""

from __future__ import annotations

import pytest
import torch

from serve.ops.deform.attention import ms_deform_attn_forward
from serve.ops.triton.attention import attend_samples
from tests.ops.test_deform_attention import problem


@pytest.mark.parametrize(
    ("batch", "queries", "heads", "shapes", "points", "channels"),
    [
        (2, 33, 8, [(7, 5), (4, 3), (1, 2)], 4, 32),
        (1, 1, 1, [(1, 1)], 1, 1),
        (1, 32, 2, [(6, 4)], 3, 5),
        (1, 40, 1, [(3, 3), (2, 2)], 2, 70),
    ],
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_attention_equals_the_loops(batch, queries, heads, shapes, points, channels, index, device):
    value, sizes, starts, places, weights = problem(1, batch, queries, heads, shapes, points, channels)
    wanted = ms_deform_attn_forward(value, sizes, starts, places, weights, 64)
    arguments = (value, sizes.to(index), starts.to(index), places, weights)
    got = attend_samples(*(one.to(device) for one in arguments))
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=1e-5)


def test_half_precision_is_summed_in_float32(device):
    arguments = problem(2, 1, 20, 4, [(8, 8), (4, 4)], 4, 32, dtype=torch.float16)
    wanted = ms_deform_attn_forward(
        *(one.float() if one.is_floating_point() else one for one in arguments), 64
    )
    got = attend_samples(*(one.to(device) for one in arguments))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.cpu().float(), wanted, atol=2e-3, rtol=1e-3)


def test_samples_that_are_outside_or_no_numbers_are_zero_and_no_queries_give_no_rows(device):
    value, sizes, starts, places, weights = problem(3, 1, 4, 2, [(4, 4)], 2, 8)
    places[0, 0], places[0, 1], places[0, 2] = torch.nan, 5.0, -torch.inf
    got = attend_samples(*(one.to(device) for one in (value, sizes, starts, places, weights))).cpu()
    assert not got[0, :3].any() and got[0, 3].any()
    none = attend_samples(*(one.to(device) for one in (value, sizes, starts, places[:, :0], weights[:, :0])))
    assert none.shape == (1, 0, 16)


def test_level_beyond_the_keys_reads_nothing_there(device):
    value, sizes, starts, places, weights = problem(4, 1, 30, 2, [(4, 4)], 2, 8)
    got = attend_samples(*(one.to(device) for one in (value, sizes * 3, starts + 2, places, weights))).cpu()
    assert got.isfinite().all()
    beyond = attend_samples(*(one.to(device) for one in (value, sizes, starts + 16, places, weights)))
    assert not beyond.any()
