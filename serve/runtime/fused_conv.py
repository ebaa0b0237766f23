"""Convolutions and fully connected layers for inference on a CPU in one pass with bias, addend and ReLU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from serve.ops.cpu.masked_conv import convolve, pack_layer
from serve.runtime.fusion import plain_convolutions

__all__ = ["FusedConv", "FusedLinear", "supports"]


# Input channels from which Winograd's larger tiles save more than their transforms take; they round more coarsely.
_CHANNELS_OF_LARGE_TILES = 128
# Input channels from which Winograd's tiles are faster than oneDNN's direct convolution: transforms of fewer take
# longer than the products that they save (16 to 16 channels, 320 x 320 cells: 5.5 ms and 2.1 of one core).
_CHANNELS_OF_TILES = 32


class FusedConv(nn.Module):
    """Convolution with an optional ReLU. Not trainable, CPU only."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, *, relu: bool) -> None:
        """Copy the weights of `layer`, for which `supports` must be true."""
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.layer = pack_layer(
            layer.weight,
            layer.bias,
            stride=layer.stride[0],
            padding=layer.padding[0] if isinstance(layer.padding, tuple) else 0,
            relu=relu,
            transposed=isinstance(layer, nn.ConvTranspose2d),
            tile=4 if layer.in_channels >= _CHANNELS_OF_LARGE_TILES else 2,
        )

    def forward(self, x: Tensor, addend: Tensor | None = None, *, activate: bool = True) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H', W'), channels-last in memory.

        Args:
            x: input.
            addend: (B, Cout, H'', W''), added before the ReLU; resampled to the nearest cell if of another size.
            activate: whether to apply the ReLU, if there is one.

        Raises:
            TypeError: not float32 on the CPU.
        """
        _check(x)
        layer = self.layer if activate or not self.layer.relu else replace(self.layer, relu=False)
        cells = _cells(x)
        shape = layer.out_shape(*cells.shape[1:3])
        # torch aligns its memory to cache lines, which a vector must not cross.
        out = torch.empty((len(cells), *shape, layer.outputs))
        convolve(cells, layer, out.numpy(), addend=None if addend is None else _cells(addend))
        return out.permute(0, 3, 1, 2)


class FusedLinear(nn.Module):
    """Fully connected layer with an optional ReLU. Not trainable, CPU only."""

    def __init__(self, layer: nn.Linear, *, relu: bool) -> None:
        """Copy the weights of `layer`, float32 on the CPU."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight[:, :, None, None]
        self.layer = pack_layer(weight, layer.bias, stride=1, padding=0, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (…, Cin) to (…, Cout).

        Raises:
            TypeError: not float32 on the CPU.
        """
        _check(x)
        rows = x.detach().reshape(1, 1, -1, self.in_features).contiguous()
        out = torch.empty((1, 1, rows.shape[2], self.out_features))
        convolve(rows.numpy(), self.layer, out.numpy())
        return out.view(*x.shape[:-1], self.out_features)


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")


def supports(layer: nn.Module) -> bool:
    """Return whether `FusedConv` can replace `layer`."""
    if type(layer) not in plain_convolutions() or layer.weight.device.type != "cpu":
        return False
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    square = len({*layer.kernel_size}) == len({*layer.stride}) == 1
    if (
        not square
        or layer.weight.dtype != torch.float32
        or layer.groups != 1
        or {*layer.dilation} != {1}
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
        or len({*layer.padding}) != 1
    ):
        return False
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    if isinstance(layer, nn.ConvTranspose2d):
        return kernel == stride and padding == 0 and {*layer.output_padding} == {0}
    tiled = (kernel, stride, padding) == (3, 1, 1) and layer.in_channels >= _CHANNELS_OF_TILES
    return tiled or (kernel, padding) == (1, 0)


def _cells(x: Tensor) -> npt.NDArray[np.float32]:
    cells: npt.NDArray[np.float32] = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
    return cells
