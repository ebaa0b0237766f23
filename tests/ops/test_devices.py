"""Every kernel on every device gives what it gives on the CPU.

The stand-in for CUDA (`serve.runtime.accelerator.stand_in`) is there on any machine: it holds its values on the CPU and
refuses what CUDA refuses. A CUDA device is used where there is one (`make test-gpu`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serve.ops import extension
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device
from tools.bench.kernels.inputs import Inputs
from tools.bench.ops import CASES

# The order of sums differs between devices.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
# mmcv's Python copies to the CPU before it calls these.
CPU_ONLY = {"nms_match", "softnms"}
NAMES = sorted(set(CASES) - CPU_ONLY)


@pytest.fixture(params=["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    if request.param == "stand-in":
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        with stand_in_device():
            yield DEVICE
    elif torch.cuda.is_available():
        yield torch.device(request.param)
    else:
        pytest.skip(f"no CUDA device: torch {torch.__version__} sees none")


def tensors_of(values: Any) -> list[torch.Tensor]:
    """All tensors in arguments or a result, as copies on the CPU."""
    if isinstance(values, torch.Tensor):
        return [values.detach().cpu().clone()]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_of(value)]
    return [torch.tensor(values)] if isinstance(values, bool | int | float) else []


@pytest.mark.parametrize("name", NAMES)
def test_kernel_on_a_device_equals_the_one_on_the_cpu(name: str, device: torch.device) -> None:
    kernel = extension.kernels()[name]
    expected_arguments, arguments = CASES[name](Inputs(False)), CASES[name](Inputs(False, str(device)))
    expected, got = kernel(*expected_arguments), kernel(*arguments)
    for one, other in zip(
        tensors_of([expected, expected_arguments]), tensors_of([got, arguments]), strict=True
    ):
        torch.testing.assert_close(other, one, **TOLERANCE, equal_nan=True)
