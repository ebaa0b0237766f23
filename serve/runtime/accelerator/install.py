"""Replacement of the parts of a network that launch or wait too often on an accelerator."""

from __future__ import annotations

from typing import Any

from torch import nn

from serve import ops
from serve.runtime.model import suppress_warnings

__all__ = ["install"]


def install(network: nn.Module) -> None:
    """Replace parts of a network on an accelerator in place; parts of other kinds stay as they are."""
    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if hasattr(preprocessor, "_non_blocking"):
        preprocessor._non_blocking = True  # frames come in pinned memory
    if ops.kernels_in_use() != "portable":  # a compiled extension has kernels of its own
        return
    with suppress_warnings():
        if type(network).__module__.startswith("mmdet3d."):
            from serve.runtime.accelerator import heads3d, points

            points.install(network)
            heads3d.install(network)
        from serve.runtime.accelerator import images

        images.install(network)
