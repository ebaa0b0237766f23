"""Argument checks that the point-cloud kernels share, and the working precision of their coordinates.

A wrong shape, dtype or index becomes an exception that names the argument. Knows no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import check_same_device

__all__ = [
    "check_floating",
    "check_holds",
    "check_indices",
    "check_integer",
    "check_shape",
    "check_tensor",
    "working",
]


def check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; None stands for any size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected)
    if not fits or any(want is not None and want != got for want, got in zip(expected, shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {shape}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_holds(name: str, tensor: Tensor, source_name: str, source: Tensor) -> None:
    """Raise TypeError where `tensor` is of integers and `source`, to be written to it, is of something else."""
    if not tensor.is_floating_point() and tensor.dtype != source.dtype:
        raise TypeError(f"{name} must be {source.dtype} as {source_name} is, got {tensor.dtype}")


def check_tensor(like: tuple[str, Tensor], name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise unless `tensor` is floating point, of `shape`, and on the device of the other, named tensor."""
    check_shape(name, tensor, *shape)
    check_floating(**{name: tensor})
    check_same_device(**{like[0]: like[1], name: tensor})


def check_indices(name: str, indices: Tensor, limit: int, least: int = 0) -> None:
    """Raise TypeError unless `indices` are int32 or int64, IndexError unless all lie in [least, limit).

    One reduction and one transfer for the whole tensor; an index out of range would otherwise stop the
    process on CPU or poison the CUDA context.
    """
    check_integer(**{name: indices})
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(indices)).tolist())
    if low < least or high >= limit:
        raise IndexError(f"{name} must lie in [{least}, {limit}), got values from {low} to {high}")


def working(tensor: Tensor) -> Tensor:
    """`tensor` in the precision the kernels compute in: float64 as it is, all else float32."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
