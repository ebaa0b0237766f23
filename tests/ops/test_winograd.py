"""Weights of convolutions by minimal filtering; `test_masked_conv` has the convolutions."""

from __future__ import annotations

import pytest
import torch

from serve.ops.cpu import winograd
from serve.ops.cpu.gemm import CHANNELS, LANES


def test_errors_name_the_wrong_argument():
    weight = torch.zeros(CHANNELS, LANES, 3, 3)
    for wrong in (weight[..., :1], weight[:, :1]):
        with pytest.raises(ValueError, match="weight must be"):
            winograd.transform_weight(wrong, 4)
    assert [len(winograd.transform_weight(weight, tile)) for tile in (2, 4)] == [16, 36]
