"""Transfers between the processor and an accelerator: many tensors at once, by pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["download", "pin", "upload"]


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the processor's memory, waiting for the device once.

    Args:
        tensors: of any shapes and dtypes.

    Returns:
        Copies on the CPU.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    # By descending size of an element, so that each part starts at a multiple of its own.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = [tensors[i].detach().reshape(-1).view(torch.uint8) for i in order]
    packed = parts[0] if len(parts) == 1 else torch.cat(parts)
    held = _to_processor(packed)
    found: list[Tensor] = list(tensors)
    start = 0
    for i, part in zip(order, parts, strict=True):
        found[i] = held[start : start + len(part)].view(tensors[i].dtype).view(tensors[i].shape)
        start += len(part)
    return found


def _to_processor(packed: Tensor) -> Tensor:
    if not (packed.device.type == "cuda" and torch.cuda.is_available()):
        return packed.cpu()
    pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    pinned.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return pinned


def pin(value: Any) -> Any:
    """Return `value` with the CPU tensors in its lists and dictionaries copied to pinned memory, if CUDA is there.

    From pinned memory a network's preprocessor uploads without waiting, while the processor goes on.
    """
    if not torch.cuda.is_available():
        return value
    if isinstance(value, Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        return {key: pin(one) for key, one in value.items()}
    return [pin(one) for one in value] if isinstance(value, list) else value


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device` without waiting for it."""
    if device.type == "cuda" and torch.cuda.is_available() and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
