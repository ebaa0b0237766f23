"""Bits of overlaps in Triton against whole tensors of torch, and what is kept against the loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serve.ops.boxes import bev, corner_hull, nms
from serve.ops.boxes.rotated import rotated_bits
from serve.ops.triton.suppression import overlap_bits


def unpack(bits: torch.Tensor, count: int) -> torch.Tensor:
    """(N, N) bool."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1, bitorder="little")[:, :count]).bool()


def upright(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 30), dim=1)
    boxes[count // 2 :: 5] = boxes[: len(boxes[count // 2 :: 5])].clone()  # the same box twice
    return boxes


def rotated(seed: int, count: int, reach: float = 40.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, generator=generator) * torch.tensor([reach, reach, 9, 4, 6.3])
    boxes[:, 2:4] += 0.5
    boxes[count // 2 :: 5] = boxes[: len(boxes[count // 2 :: 5])].clone()
    boxes[count // 3 :: 7, 4] = 0.0
    return boxes


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 64, 65, 150])
def test_bits_of_upright_boxes_are_those_of_whole_tensors(count, offset, device):
    boxes = upright(count, count)
    got = unpack(overlap_bits(boxes.to(device), offset, 0.4), count)
    overlap, union = nms._overlap_and_union(boxes, offset)
    assert torch.equal(got, (overlap > 0.4 * union).triu(1))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_upright_boxes_kept_are_those_of_the_loops(threshold, device):
    boxes = upright(7, 120)
    keep = nms.scan(overlap_bits(boxes.to(device), 0.0, threshold)).cpu()
    assert torch.equal(keep, nms.nms(boxes, torch.arange(120.0).flip(0), threshold, 0))


def test_box_at_the_threshold_is_kept_and_row_of_bits_is_of_whole_words(device):
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 1.01]])  # overlaps of 0.5 and 0.505
    bits = overlap_bits(boxes.to(device), 0.0, 0.5)
    assert bits.shape == (3, 8) and bits.dtype == torch.uint8
    assert unpack(bits, 3)[0].tolist() == [False, False, True]


def hull_ious(boxes: torch.Tensor) -> torch.Tensor:
    array = boxes.numpy()
    half = np.zeros((len(boxes), 2), np.float32)
    corner_hull.half_turns(array, half)
    out = np.zeros((len(boxes), len(boxes)), np.float32)
    corner_hull.pair_ious(array, half, array, half, 0, False, True, True, out)
    return torch.from_numpy(out)


def bev_ious(boxes: torch.Tensor) -> torch.Tensor:
    upright3d = torch.zeros(len(boxes), 7)
    upright3d[:, [0, 1, 3, 4, 6]] = boxes
    array = upright3d.numpy()
    corners, frames = np.empty((len(boxes), 4, 2), np.float32), np.empty((len(boxes), 7), np.float32)
    bev.bev_corners(array, corners, frames)
    out = np.zeros((len(boxes), len(boxes)), np.float32)
    bev.bev_overlaps(corners, frames, corners, frames, out)
    shared = torch.from_numpy(out)
    area = boxes[:, 2] * boxes[:, 3]
    return shared / (area[:, None] + area[None, :] - shared).clamp(min=1e-8)


@pytest.mark.parametrize("is_bev", [False, True], ids=["rotated", "bev"])
@pytest.mark.parametrize("count", [0, 1, 2, 33, 70])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 0.7])
def test_bits_of_rotated_boxes_are_those_of_the_loops(count, threshold, is_bev, device):
    boxes = rotated(count + 1, count)
    got = unpack(rotated_bits(boxes.to(device), threshold, bev=is_bev), count)
    ious = (bev_ious if is_bev else hull_ious)(boxes)
    # An overlap within rounding of the threshold may fall on either side of it.
    clear = (ious - threshold).abs() > 2e-5
    wanted = (ious > threshold).triu(1)
    assert torch.equal(got & clear, wanted & clear)
    assert not (got & ~torch.ones_like(got).triu(1)).any()
    assert count < 33 or (wanted & clear).sum() > 2 or threshold == 0.7


@pytest.mark.parametrize("is_bev", [False, True], ids=["rotated", "bev"])
def test_boxes_that_touch_are_equal_or_have_no_area(is_bev, device):
    boxes = torch.tensor(
        [
            [0.0, 0, 4, 2, 0],
            [0, 0, 4, 2, 0],  # the same
            [0, 0, 4, 2, torch.pi],  # half a turn
            [4, 0, 4, 2, 0],  # side by side
            [4, 2, 4, 2, 0],  # a corner in common
            [0, 0, 2, 1, 0.3],  # inside
            [0, 0, 0, 0, 0.3],  # no area
            [1000, 1000, 4, 2, 0.7],
            [1000, 1000, 4, 2, 0.7],
        ]
    )
    ious = (bev_ious if is_bev else hull_ious)(boxes)
    for threshold in (0.2, 0.9):
        got = unpack(rotated_bits(boxes.to(device), threshold, bev=is_bev), len(boxes))
        assert torch.equal(got, (ious > threshold).triu(1))
