"""Argument checks shared by the kernels: a wrong tensor becomes an exception that names it; and who takes it.

A compiled kernel would read foreign memory; ours say which argument is wrong and what was expected.
Knows nothing about any kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy.typing as npt
from torch import Tensor

__all__ = ["as_numpy", "check_rank", "check_same_device", "check_width", "loops_take", "torch_only"]


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raise ValueError unless `tensor` has `rank` dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")


def check_width(name: str, tensor: Tensor, width: int) -> None:
    """Raise ValueError unless `tensor` is (N, at least `width`)."""
    check_rank(name, tensor, 2)
    if tensor.shape[1] < width:
        raise ValueError(f"{name} must be (N, >={width}), got shape {tuple(tensor.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "tensors must be on one device, got " + ", ".join(f"{n}: {d}" for n, d in devices.items())
        )


_torch_only: ContextVar[bool] = ContextVar("torch_only", default=False)


def loops_take(tensor: Tensor) -> bool:
    """Whether the compiled loops take `tensor`: it is on the CPU. Else the torch way, which every device has, does."""
    return tensor.device.type == "cpu" and not _torch_only.get()


@contextmanager
def torch_only() -> Iterator[None]:
    """Inside, kernels go the torch way on the CPU too: to compare the two."""
    before = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(before)


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A C-contiguous numpy view of a CPU tensor, a copy only where it is not contiguous."""
    array: npt.NDArray[Any] = tensor.detach().contiguous().numpy()
    return array
