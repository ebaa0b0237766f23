"""Kernels of a CUDA device run by the stand-in, interpreted: chosen, counted, and equal to the loops."""

from __future__ import annotations

import pytest
import torch

from serve.ops import extension
from serve.ops.checks import torch_only
from serve.ops.device_kernels import device_kernels, uses_triton, without_triton
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device
from tests.ops.test_devices import TOLERANCE, tensors_of
from tools.bench.kernels.inputs import Inputs
from tools.bench.ops import CASES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

# Kernels of mmcv, and the operators behind them.
OPERATORS = {
    "hard_voxelize_forward": "write_voxels",
    "ms_deform_attn_forward": "attend_samples",
    "nms": "overlap_bits",
    "nms_rotated": "rotated_overlap_bits",
    "iou3d_nms3d_forward": "rotated_overlap_bits",
}


def test_kernels_are_chosen_on_a_device_alone_and_not_for_other_numbers():
    assert device_kernels(0).triton and "interpreted" in device_kernels(0).description
    assert not uses_triton(torch.ones(1))
    with stand_in_device():
        assert uses_triton(torch.ones(1, device=DEVICE))
        assert not uses_triton(torch.ones(1, device=DEVICE).double())
        for context in (torch_only, without_triton):
            with context():
                assert not uses_triton(torch.ones(1, device=DEVICE))


@pytest.mark.parametrize("name", OPERATORS)
def test_kernel_of_mmcv_launches_the_operator_and_equals_the_loops(name):
    kernel = extension.kernels()[name]
    expected_arguments = CASES[name](Inputs(False))
    expected = kernel(*expected_arguments)
    with stand_in_device() as device:
        arguments = CASES[name](Inputs(False, str(DEVICE)))
        device.reset()
        got = kernel(*arguments)
        assert device.counts.operators[OPERATORS[name]] == 1
        for one, other in zip(
            tensors_of([expected, expected_arguments]), tensors_of([got, arguments]), strict=True
        ):
            torch.testing.assert_close(other, one, **TOLERANCE, equal_nan=True)
