"""A sparse convolution for inference: its bias and its ReLU are part of the kernel's one pass.

mmcv's own layer adds the bias and leaves the ReLU to another layer: two more passes over all features. The layer
here takes the place of one of mmcv's (`serve.runtime.folding` decides where) and keeps to its protocol: it shares
rulebooks through ``indice_dict``, so both kinds may stand in one network. Imports mmcv; knows nothing about norms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmcv.ops import sparse_ops
from mmcv.ops.sparse_modules import SparseModule
from mmcv.ops.sparse_structure import SparseConvTensor
from torch import Tensor, nn

from serve.ops.sparse_conv import convolve

__all__ = ["InferenceSparseConvolution", "SparseMap"]


class SparseMap(SparseConvTensor):  # type: ignore[misc]
    """A sparse tensor whose dense form is laid out as convolutions of a bird's-eye view want it."""

    def dense(self, channels_first: bool = True) -> Tensor:
        """The dense tensor, zero where there is no voxel.

        Returns:
            (B, C, S1, …, SD); ``.view(B, C * S1, S2, …)``, which mmdet3d's encoders do with it, is channels-last
            in memory without another pass. (B, S1, …, SD, C) if not `channels_first`.
        """
        first, *others = self.spatial_shape
        features, (batch, depth, *rest) = self.features, self.indices.long().unbind(1)
        full = _zeros(features, (self.batch_size, *others, features.shape[1], first))
        full[(batch, *rest, slice(None), depth)] = features
        dims = len(others)
        if channels_first:
            return full.permute(0, dims + 1, dims + 2, *range(1, dims + 1))
        return full.permute(0, dims + 2, *range(1, dims + 1), dims + 1)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of the type of `like`; on a CPU pages of them that nobody writes to are never made."""
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return torch.from_numpy(np.zeros(shape, dtype=np.float32))
    return like.new_zeros(shape)


class InferenceSparseConvolution(SparseModule):  # type: ignore[misc]
    """One of mmcv's sparse convolutions as it stands, with a ReLU behind it if asked for. Not trainable."""

    def __init__(self, layer: Any, *, relu: bool) -> None:
        """Take over parameters and geometry of `layer`, a ``SparseConvolution`` of more than one voxel."""
        super().__init__()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.relu = relu
        self.ends_in_map = False
        self.indice_key: str | None = layer.indice_key
        self.subm, self.inverse, self.transposed = (
            bool(layer.subm),
            bool(layer.inverse),
            bool(layer.transposed),
        )
        self.kernel_size, self.stride = list(layer.kernel_size), list(layer.stride)
        self.padding, self.dilation = list(layer.padding), list(layer.dilation)
        self.output_padding = list(layer.output_padding)

    def forward(self, x: Any) -> Any:
        """Convolve the features of a ``SparseConvTensor``; another with the same ``indice_dict``."""
        rows, pairs, counts, shape = self._rulebook(x)
        features = convolve(
            x.features, self.weight, self.bias, pairs.to(x.features.device), counts, rows.shape[0],
            int(self.inverse), int(self.subm), relu=self.relu,
        )  # fmt: skip
        out = (SparseMap if self.ends_in_map else SparseConvTensor)(features, rows, shape, x.batch_size)
        out.indice_dict, out.grid = x.indice_dict, x.grid
        return out

    def _rulebook(self, x: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Output rows, pairs, their counts and the output's spatial shape: a known rulebook or a new one."""
        known = x.find_indice_pair(self.indice_key)
        if self.inverse:
            if known is None:
                raise ValueError(f"no convolution {self.indice_key!r} has run that this layer could invert")
            _, rows, pairs, counts, shape = known
            return rows, pairs, counts, shape
        shape = self._out_shape(x.spatial_shape)
        if self.indice_key is not None and known is not None:
            rows, _, pairs, counts, _ = known
        else:
            rows, pairs, counts = sparse_ops.get_indice_pairs(
                x.indices, x.batch_size, x.spatial_shape, self.kernel_size, self.stride, self.padding,
                self.dilation, self.output_padding, self.subm, self.transposed, grid=x.grid,
            )  # fmt: skip
            x.indice_dict[self.indice_key] = (rows, x.indices, pairs, counts, x.spatial_shape)
        return rows, pairs, counts, shape

    def _out_shape(self, shape: Any) -> Any:
        if self.subm:
            return shape
        if self.transposed:
            return sparse_ops.get_deconv_output_size(
                shape, self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding
            )
        return sparse_ops.get_conv_output_size(
            shape, self.kernel_size, self.stride, self.padding, self.dilation
        )
