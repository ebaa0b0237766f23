"""Tests of the kernels in Triton: interpreted on the CPU (`make test-triton`), or on a CUDA device (`make test-gpu`).

Triton decides by the environment, when a kernel is defined, whether it interprets; so on the CPU these tests have a
process of their own, which `tests/ops/test_triton_kernels.py` starts. Any other passes them over.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USABLE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
collect_ignore_glob = [] if USABLE else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as needing a device, unless they are interpreted."""
    for item in items:
        if not INTERPRETED and "tests/ops/triton" in str(item.path):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels run on."""
    return torch.device("cpu" if INTERPRETED else "cuda:0")
