"""3 x 3 convolution for inference on a CPU with fused bias and ReLU, by Winograd's filtering."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from serve.ops.cpu import winograd
from serve.ops.cpu.gemm import CHANNELS, LANES
from serve.ops.cpu.masked_conv import convolve, pack_layer

__all__ = ["FusedConv", "supports"]


class FusedConv(nn.Module):
    """Fused convolution with an optional ReLU. Not trainable, CPU only."""

    def __init__(self, layer: nn.Conv2d, *, relu: bool) -> None:
        """Copy the weights of `layer`, for which `supports` must be true."""
        super().__init__()
        self.layer = pack_layer(layer.weight, layer.bias, stride=1, padding=1, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H, W), channels-last in memory.

        Raises:
            TypeError: not float32 on the CPU.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")
        cells = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
        out = np.empty((*cells.shape[:3], self.layer.outputs), np.float32)
        convolve(cells, self.layer, out)
        return torch.from_numpy(out).permute(0, 3, 1, 2)


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
