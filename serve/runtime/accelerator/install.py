"""Replacement of the parts of a network that launch or wait too often on an accelerator."""

from __future__ import annotations

from typing import Any

from torch import nn

from serve import ops
from serve.runtime.accelerator.graphs import graphs_of
from serve.runtime.model import suppress_warnings

__all__ = ["install"]


def install(network: nn.Module, *, cuda_graphs: bool = False) -> None:
    """Replace parts of a network on an accelerator in place; parts of other kinds stay as they are.

    Args:
        network: network on the device.
        cuda_graphs: record the launches of parts with static shapes, and replay them.
    """
    preprocessor: Any = getattr(network, "data_preprocessor", None)
    if hasattr(preprocessor, "_non_blocking"):
        preprocessor._non_blocking = True  # frames come in pinned memory
    if ops.kernels_in_use() != "portable":  # a compiled extension has kernels of its own
        return
    graphs = graphs_of(network) if cuda_graphs else None
    with suppress_warnings():
        if type(network).__module__.startswith("mmdet3d."):
            from serve.runtime.accelerator import heads3d, points

            points.install(network, graphs)
            heads3d.install(network, graphs)
        from serve.runtime.accelerator import images, single_stage

        images.install(network, graphs)
        single_stage.install(network, graphs)
