"""Argument checks shared by the kernels: a wrong tensor becomes an exception that names it.

A compiled kernel would read foreign memory; ours say which argument is wrong and what was expected.
Knows nothing about any kernel.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

__all__ = ["as_numpy", "check_rank", "check_same_device", "check_width"]


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


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A C-contiguous numpy view of a CPU tensor, a copy only where it is not contiguous."""
    array: npt.NDArray[Any] = tensor.detach().contiguous().numpy()
    return array
