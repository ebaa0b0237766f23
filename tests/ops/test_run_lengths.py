"""Run lengths of masks are those of pycocotools, character by character."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from serve.ops.cpu.run_lengths import encode_masks


def expected(masks: np.ndarray) -> list[str]:
    packed = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return [one["counts"].decode("ascii") for one in coco.encode(packed)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 40),
    width=st.sampled_from([1, 2, 63, 64, 65, 150]),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
)
def test_noise_is_encoded_as_pycocotools_does(seed, height, width, share):
    masks = np.random.default_rng(seed).random((3, height, width)) < share
    assert encode_masks(masks) == expected(masks)


def test_shapes_at_every_border_are_encoded_as_pycocotools_does():
    rows, columns = np.mgrid[:200, :300]
    discs = [
        (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        for y, x, radius in ((100, 150, 70), (0, 0, 50), (199, 299, 90), (199, 0, 10), (100, 150, 400))
    ]
    masks = np.stack([*discs, discs[0] & ~discs[4], rows % 2 == 0, columns % 2 == 1])
    assert encode_masks(masks) == expected(masks)


def test_a_view_in_another_order_is_encoded_like_its_copy():
    masks = np.random.default_rng(0).random((30, 20, 4)) < 0.3
    assert encode_masks(masks.transpose(2, 0, 1)) == expected(masks.transpose(2, 0, 1))


def test_no_masks_give_no_strings_and_other_ranks_are_refused():
    assert encode_masks(np.zeros((0, 4, 5), np.bool_)) == []
    with pytest.raises(ValueError, match="masks must be"):
        encode_masks(np.zeros((4, 5), np.bool_))
