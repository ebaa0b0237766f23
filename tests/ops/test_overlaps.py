"""Box overlaps against their definition and through mmcv."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.boxes import overlaps


def boxes(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 10
    return torch.cat((corner, corner + torch.rand(n, 2, generator=generator) * 8), 1)


def naive(a, b, mode: int, offset: int) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.tolist(), b.tolist()
    w = max(0.0, min(ax2, bx2) - max(ax1, bx1) + offset)
    h = max(0.0, min(ay2, by2) - max(ay1, by1) + offset)
    first = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
    second = (bx2 - bx1 + offset) * (by2 - by1 + offset)
    return w * h / (first if mode == 1 else first + second - w * h)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    mode=st.sampled_from([0, 1]),
    offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_overlaps_follow_their_definition(seed, n, m, mode, offset, dtype):
    first, second = boxes(seed, n).to(dtype), boxes(seed + 1, m).to(dtype)
    ious = torch.zeros(n, m, dtype=dtype)
    overlaps.bbox_overlaps(first, second, ious, mode, False, offset)
    expected = [[naive(a, b, mode, offset) for b in second] for a in first]
    np.testing.assert_allclose(ious, np.array(expected).reshape(n, m), atol=1e-5)
    pairs = min(n, m)
    aligned = torch.zeros(pairs, dtype=dtype)
    overlaps.bbox_overlaps(first[:pairs], second[:pairs], aligned, mode, True, offset)
    np.testing.assert_allclose(aligned, ious.diagonal()[:pairs], atol=1e-6)


def test_mmcv_overlaps_accept_float16_and_slices_in_blocks(mmcv_ops, monkeypatch):
    monkeypatch.setattr(overlaps, "PAIRS_PER_BLOCK", 7)
    first, second = boxes(0, 9), boxes(1, 5)
    expected = mmcv_ops.bbox._bbox_overlaps_cpu(first, second)
    torch.testing.assert_close(mmcv_ops.bbox_overlaps(first, second), expected)
    wide = torch.cat((first, first), 1)[:, :4]
    torch.testing.assert_close(mmcv_ops.bbox_overlaps(wide, second), expected)
    coarse = mmcv_ops.bbox_overlaps(first.half(), second.half())
    assert coarse.dtype == torch.float16
    torch.testing.assert_close(coarse.float(), expected, atol=1e-2, rtol=1e-2)


def test_overlap_of_boxes_without_area_is_nan():
    ious = torch.zeros(1, 1)
    overlaps.bbox_overlaps(torch.zeros(1, 4), torch.zeros(1, 4), ious, 0, False, 0)
    assert ious.isnan().all()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("bboxes1", (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 2), 0, False, 0)),
        ("bboxes2", (torch.zeros(2, 4), torch.zeros(4), torch.zeros(2, 2), 0, False, 0)),
        ("ious", (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3), 0, False, 0)),
        ("aligned", (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2), 0, True, 0)),
        ("mode", (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 2), 2, False, 0)),
        ("offset", (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 2), 0, False, 2)),
    ],
)
def test_errors_name_the_wrong_argument(name, args):
    with pytest.raises(ValueError, match=name):
        overlaps.bbox_overlaps(*args)
