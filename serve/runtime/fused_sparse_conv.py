"""Sparse convolution for inference with fused bias and ReLU.

mmcv's layer adds the bias, and another layer the ReLU: two more passes over all features. It also repacks its weights
on every call and converts the shared pairs to a table in every layer. `serve.runtime.fusion` replaces all sparse
convolutions of a network by this one. Layers share their geometry through ``indice_dict`` like mmcv's, but on the CPU
as a neighbour table. This module imports mmcv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmcv.ops import sparse_ops
from mmcv.ops.sparse_modules import SparseModule
from mmcv.ops.sparse_structure import SparseConvTensor
from torch import Tensor, nn

from serve.ops.checks import uses_numba
from serve.ops.sparse.conv import PackedFilters, convolve, convolve_table, pack_filters
from serve.ops.sparse.neighbour_table import invert_table, submanifold_table
from serve.ops.sparse.strided_table import strided_table

__all__ = ["FusedSparseConv", "SparseMap"]


class SparseMap(SparseConvTensor):  # type: ignore[misc]
    """Sparse tensor whose dense form has the memory layout of bird's-eye-view convolutions."""

    def dense(self, channels_first: bool = True) -> Tensor:
        """Convert to a dense tensor, zero without a voxel.

        Returns:
            (B, C, S1, …, SD); its ``.view(B, C * S1, S2, …)`` in mmdet3d's encoders is channels-last in memory without
            another pass. (B, S1, …, SD, C) if not `channels_first`.
        """
        first, *others = self.spatial_shape
        features, (batch, depth, *rest) = self.features, self.indices.long().unbind(1)
        full: Tensor = features.new_zeros((self.batch_size, *others, features.shape[1], first))
        full[(batch, *rest, slice(None), depth)] = features
        dims = len(others)
        if channels_first:
            return full.permute(0, dims + 1, dims + 2, *range(1, dims + 1))
        return full.permute(0, dims + 2, *range(1, dims + 1), dims + 1)


@dataclass(frozen=True)
class _Geometry:
    """Pairs of voxels, found by one layer and shared by all layers with its key.

    Attributes:
        rows: (M, 1 + D) output voxels.
        inputs: (N, 1 + D) input voxels.
        in_shape: D input extents, the output extents of an inverse layer.
        table: (K, M) neighbour table (`serve.ops.sparse.neighbour_table`) on the CPU, else None.
        pairs: (K, 2, N) pairs of mmcv's rulebook, if there is no table.
        counts: (K,) counts of mmcv's rulebook, if there is no table.
    """

    rows: Tensor
    inputs: Tensor
    in_shape: Any
    table: npt.NDArray[np.int32] | None = None
    pairs: Tensor | None = None
    counts: Tensor | None = None


class FusedSparseConv(SparseModule):  # type: ignore[misc]
    """Fused sparse convolution with an optional ReLU. Not trainable."""

    def __init__(self, layer: Any, *, relu: bool) -> None:
        """Share the parameters of `layer`, a ``SparseConvolution`` with a kernel of more than one voxel."""
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
        self._filters: PackedFilters | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_packed()  # weights change their device or dtype
        return super()._apply(fn, recurse)

    def drop_packed(self) -> None:
        """Pack the weights anew on the next call; call it after changing them."""
        self._filters = None

    def forward(self, x: Any) -> Any:
        """Convolve a ``SparseConvTensor``; return another with the same ``indice_dict``."""
        on_table = uses_numba(x.features) and x.features.dtype == self.weight.dtype == torch.float32
        shape = self._out_shape(x.spatial_shape)
        geometry = self._geometry(x, shape, on_table=on_table)
        rows = geometry.rows
        if self.inverse:
            rows, shape = geometry.inputs, geometry.in_shape
        if geometry.table is not None:
            features = self._convolve_table(x.features, geometry, len(rows))
        else:
            assert geometry.pairs is not None and geometry.counts is not None
            features = convolve(
                x.features, self.weight, self.bias, geometry.pairs.to(x.features.device), geometry.counts,
                rows.shape[0], int(self.inverse), int(self.subm), relu=self.relu,
            )  # fmt: skip
        out = (SparseMap if self.ends_in_map else SparseConvTensor)(features, rows, shape, x.batch_size)
        out.indice_dict, out.grid = x.indice_dict, x.grid
        return out

    def _convolve_table(self, features: Tensor, geometry: _Geometry, outputs: int) -> Tensor:
        assert geometry.table is not None
        inputs = geometry.rows if self.inverse else geometry.inputs
        if len(features) != len(inputs):
            raise ValueError(
                f"{len(features)} rows of features for {len(inputs)} voxels of {self.indice_key!r}: layers that share "
                "a key must have the same input voxels"
            )
        if self._filters is None:
            weight = self.weight.detach().reshape(-1, *self.weight.shape[-2:])
            self._filters = pack_filters(weight, None if self.bias is None else self.bias.detach())
        table = invert_table(geometry.table, outputs) if self.inverse else geometry.table
        return convolve_table(features, self._filters, table, relu=self.relu)

    def _geometry(self, x: Any, out_shape: Any, *, on_table: bool) -> _Geometry:
        """Look up the geometry of the layer's key, or compute and store it."""
        known: _Geometry | None = x.find_indice_pair(self.indice_key)
        if self.inverse and known is None:
            raise ValueError(f"no convolution with key {self.indice_key!r} has run before this inverse layer")
        if known is not None and (self.inverse or self.indice_key is not None):
            return known
        if on_table:
            geometry = self._table(x, out_shape)
        else:
            rows, pairs, counts = sparse_ops.get_indice_pairs(
                x.indices, x.batch_size, x.spatial_shape, self.kernel_size, self.stride, self.padding,
                self.dilation, self.output_padding, self.subm, self.transposed, grid=x.grid,
            )  # fmt: skip
            geometry = _Geometry(rows, x.indices, x.spatial_shape, pairs=pairs, counts=counts)
        x.indice_dict[self.indice_key] = geometry
        return geometry

    def _table(self, x: Any, out_shape: Any) -> _Geometry:
        indices, in_shape, batch = x.indices.to(torch.int32), list(x.spatial_shape), int(x.batch_size)
        if self.subm:
            table = submanifold_table(indices, batch, in_shape, self.kernel_size, self.dilation)
            return _Geometry(x.indices, x.indices, in_shape, table)
        rows, table = strided_table(
            indices, batch, in_shape, list(out_shape), self.kernel_size, self.stride, self.padding,
            self.dilation, self.transposed,
        )  # fmt: skip
        return _Geometry(rows, x.indices, in_shape, table)

    def _out_shape(self, shape: Any) -> Any:
        if self.subm or self.inverse:
            return shape
        if self.transposed:
            return sparse_ops.get_deconv_output_size(
                shape, self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding
            )
        return sparse_ops.get_conv_output_size(
            shape, self.kernel_size, self.stride, self.padding, self.dilation
        )
