"""Sparse convolution for inference with fused bias and ReLU.

mmcv's layer adds the bias, and another layer the ReLU: two more passes over all features. It also repacks its weights
on every call and converts the shared pairs to a table in every layer. `serve.runtime.fusion` replaces all sparse
convolutions of a network by this one. Layers share their geometry through ``indice_dict`` like mmcv's, but as a
neighbour table. This module imports mmcv and mmdet3d.

On an accelerator all voxels of all layers are found when the first strided layer runs, so that the processor waits
once: a `VoxelPlan` remembers from earlier runs which layers follow.
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
from mmdet3d.models.layers import SparseBasicBlock
from torch import Tensor, nn

from serve.ops.checks import uses_numba
from serve.ops.sparse.conv import convolve
from serve.ops.sparse.device_table import (
    ConvGeometry,
    gather_convolve,
    invert_rows,
    neighbour_rows,
    reached_voxels,
)
from serve.ops.sparse.neighbour_table import invert_table, submanifold_table
from serve.ops.sparse.strided_table import strided_table
from serve.ops.sparse.table_conv import PackedFilters, convolve_table, pack_filters

__all__ = ["FusedSparseBasicBlock", "FusedSparseConv", "SparseMap", "VoxelPlan"]

Chain = tuple[ConvGeometry, ...]
# Chains that a plan keeps; a network has as many as it has strided layers.
MAX_CHAINS = 32


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
        partners: (M, K) neighbour table (`serve.ops.sparse.device_table`) on other devices, else None.
        pairs: (K, 2, N) pairs of mmcv's rulebook, if there is no table.
        counts: (K,) counts of mmcv's rulebook, if there is no table.
    """

    rows: Tensor
    inputs: Tensor
    in_shape: Any
    table: npt.NDArray[np.int32] | None = None
    partners: Tensor | None = None
    pairs: Tensor | None = None
    counts: Tensor | None = None


class VoxelPlan:
    """Chains of strided layers of one network, by which their voxels are found with one synchronisation.

    In the first run each strided layer waits for its own; then all chains are known.
    """

    def __init__(self) -> None:
        """Know no chain."""
        self.chains: dict[Chain, None] = {}


class _Voxels:
    """Voxels of all layers of one run, kept in its ``indice_dict``."""

    def __init__(self, root: Tensor, batch_size: int) -> None:
        self._root, self._batch_size = root, batch_size
        self._rows: dict[Chain, Tensor] = {(): root}
        self._chains: dict[int, Chain] = {id(root): ()}
        self._tables: dict[tuple[int, ConvGeometry], Tensor] = {}

    def around(self, voxels: Tensor, geometry: ConvGeometry) -> Tensor:
        """Return the neighbour table of a submanifold layer; layers without a key share it too."""
        if id(voxels) not in self._chains:  # its id may become another's
            return self.table(voxels, voxels, geometry)
        key = id(voxels), geometry
        if key not in self._tables:
            self._tables[key] = self.table(voxels, voxels, geometry)
        return self._tables[key]

    def table(self, inputs: Tensor, outputs: Tensor, geometry: ConvGeometry) -> Tensor:
        """Return the neighbour table between two sets of voxels."""
        found_here = bool(self._chains.get(id(inputs)))  # then they ascend
        return neighbour_rows(inputs, outputs, geometry, ascending=found_here)

    def behind(self, voxels: Tensor, geometry: ConvGeometry, plan: VoxelPlan) -> Tensor:
        """Return the output voxels (M, 1 + D) of a strided layer with input `voxels`."""
        known = self._chains.get(id(voxels))
        if known is None:  # made by a layer of another kind
            return reached_voxels(voxels, self._batch_size, [(geometry,)])[0]
        chain = (*known, geometry)
        if chain not in self._rows:
            shape = chain[0].in_shape
            missing = [one for one in plan.chains if one[0].in_shape == shape and one not in self._rows]
            if chain not in missing:
                missing.append(chain)
                if len(plan.chains) < MAX_CHAINS:
                    plan.chains[chain] = None
            for one, rows in zip(missing, reached_voxels(self._root, self._batch_size, missing), strict=True):
                self._rows[one] = rows
                self._chains[id(rows)] = one
        return self._rows[chain]


_VOXELS = object()  # key of `_Voxels`, which no layer has


class FusedSparseConv(SparseModule):  # type: ignore[misc]
    """Fused sparse convolution with an optional ReLU. Not trainable."""

    def __init__(self, layer: Any, *, relu: bool, plan: VoxelPlan | None = None) -> None:
        """Share the parameters of `layer`, a ``SparseConvolution`` with a kernel of more than one voxel.

        Args:
            layer: layer to replace.
            relu: apply a ReLU.
            plan: plan of the network, shared by its layers.
        """
        super().__init__()
        self.plan = plan or VoxelPlan()
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

    def forward(self, x: Any, addend: Tensor | None = None) -> Any:
        """Convolve a ``SparseConvTensor``; return another with the same ``indice_dict``.

        Args:
            x: input.
            addend: features of the output voxels, added before the ReLU.
        """
        on_table = uses_numba(x.features) and x.features.dtype == self.weight.dtype == torch.float32
        shape = self._out_shape(x.spatial_shape)
        geometry = self._geometry(x, shape, on_table=on_table)
        rows = geometry.rows
        if self.inverse:
            rows, shape = geometry.inputs, geometry.in_shape
        if geometry.table is not None:
            features = self._convolve_table(x.features, geometry, len(rows), addend)
        elif geometry.partners is not None:
            features = self._gather(x.features, geometry, len(rows), relu=self.relu and addend is None)
        else:
            assert geometry.pairs is not None and geometry.counts is not None
            features = convolve(
                x.features, self.weight, self.bias, geometry.pairs.to(x.features.device), geometry.counts,
                rows.shape[0], int(self.inverse), int(self.subm), relu=self.relu and addend is None,
            )  # fmt: skip
        if addend is not None and geometry.table is None:
            features += addend
            features = features.relu_() if self.relu else features
        out = (SparseMap if self.ends_in_map else SparseConvTensor)(features, rows, shape, x.batch_size)
        out.indice_dict, out.grid = x.indice_dict, x.grid
        return out

    def _gather(self, features: Tensor, geometry: _Geometry, outputs: int, *, relu: bool) -> Tensor:
        assert geometry.partners is not None
        self._check_inputs(features, geometry)
        partners = invert_rows(geometry.partners, outputs) if self.inverse else geometry.partners
        weight = self.weight.reshape(-1, *self.weight.shape[-2:])
        return gather_convolve(features, weight, self.bias, partners, relu=relu)

    def _check_inputs(self, features: Tensor, geometry: _Geometry) -> None:
        inputs = geometry.rows if self.inverse else geometry.inputs
        if len(features) != len(inputs):
            raise ValueError(
                f"{len(features)} rows of features for {len(inputs)} voxels of {self.indice_key!r}: layers that share "
                "a key must have the same input voxels"
            )

    def _convolve_table(
        self, features: Tensor, geometry: _Geometry, outputs: int, addend: Tensor | None
    ) -> Tensor:
        assert geometry.table is not None
        self._check_inputs(features, geometry)
        if self._filters is None:
            weight = self.weight.detach().reshape(-1, *self.weight.shape[-2:])
            self._filters = pack_filters(weight, None if self.bias is None else self.bias.detach())
        table = invert_table(geometry.table, outputs) if self.inverse else geometry.table
        return convolve_table(features, self._filters, table, relu=self.relu, addend=addend)

    def _geometry(self, x: Any, out_shape: Any, *, on_table: bool) -> _Geometry:
        """Look up the geometry of the layer's key, or compute and store it."""
        known: _Geometry | None = x.find_indice_pair(self.indice_key)
        if self.inverse and known is None:
            raise ValueError(f"no convolution with key {self.indice_key!r} has run before this inverse layer")
        if known is not None and (self.inverse or self.indice_key is not None):
            return known
        if on_table:
            geometry = self._table(x, out_shape)
        elif not self.transposed and len(x.indices) > 0:
            geometry = self._partners(x, out_shape)
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

    def _partners(self, x: Any, out_shape: Any) -> _Geometry:
        voxels: _Voxels = x.indice_dict.setdefault(_VOXELS, _Voxels(x.indices, int(x.batch_size)))
        ksize, dilation = tuple(self.kernel_size), tuple(self.dilation)
        stride, padding = tuple(self.stride), tuple(self.padding)
        if self.subm:
            stride = (1,) * len(ksize)
            padding = tuple(k // 2 for k in ksize)
        in_shape, out = tuple(map(int, x.spatial_shape)), tuple(map(int, out_shape))
        geometry = ConvGeometry(ksize, stride, padding, dilation, in_shape, out)
        if self.subm:
            partners = voxels.around(x.indices, geometry)
            return _Geometry(x.indices, x.indices, in_shape, partners=partners)
        rows = voxels.behind(x.indices, geometry, self.plan)
        partners = voxels.table(x.indices, rows, geometry)
        return _Geometry(rows, x.indices, in_shape, partners=partners)

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


class FusedSparseBasicBlock(SparseBasicBlock):  # type: ignore[misc]
    """SparseBasicBlock whose ReLUs and residual are part of its convolutions."""

    def forward(self, x: Any) -> Any:
        """Compute the block for a ``SparseConvTensor``."""
        identity = x.features if self.downsample is None else self.downsample(x).features
        return self.conv2(self.conv1(x), identity)
