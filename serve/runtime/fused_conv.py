"""3 x 3 convolution for inference on a CPU with fused bias and ReLU, by Winograd's filtering."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serve.ops.cpu import winograd
from serve.ops.cpu.gemm import CHANNELS, LANES

__all__ = ["FusedConv", "supports"]


class FusedConv(nn.Module):
    """Fused convolution with an optional ReLU. Not trainable, CPU only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, *, relu: bool) -> None:
        """Copy the weights of `layer`, for which `supports` must be true."""
        super().__init__()
        self.register_buffer("weight", winograd.transform_weight(layer.weight), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias, persistent=False)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H, W), channels-last in memory."""
        return winograd.convolve_3x3(x, self.weight, self.bias, relu=self.relu)


def supports(layer: nn.Conv2d) -> bool:
    """Return whether `FusedConv` can replace `layer`, and is faster on this machine."""
    return (
        winograd.PREFERRED
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and tuple(layer.kernel_size) == (3, 3)
        and tuple(layer.stride) == tuple(layer.dilation) == (1, 1)
        and layer.padding in ((1, 1), 1)
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and layer.in_channels % LANES == 0
        and layer.out_channels % CHANNELS == 0
    )
