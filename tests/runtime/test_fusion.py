"""Fused networks compute the same in fewer passes."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from serve import ops

ops.install("portable")

from serve.ops.checks import torch_only  # noqa: E402
from serve.runtime import fusion  # noqa: E402
from serve.runtime.model import suppress_warnings  # noqa: E402


def prepare(network: nn.Module, seed: int = 0) -> nn.Module:
    """Switch to evaluation mode with random norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    network.eval()  # returns nothing in some of upstream's classes
    return network.requires_grad_(False)


def sparse_input(shape: tuple[int, int, int], channels: int):
    from mmcv.ops import SparseConvTensor

    rng = np.random.default_rng(0)
    places = np.argwhere(rng.random((2, *shape)) < 0.2).astype(np.int32)
    features = rng.standard_normal((len(places), channels)).astype(np.float32)
    return SparseConvTensor(torch.from_numpy(features), torch.from_numpy(places), list(shape), 2)


def sparse_network() -> nn.Module:
    from mmcv.ops import SparseConv3d, SparseInverseConv3d, SparseSequential, SubMConv3d

    def block(conv: nn.Module, channels: int) -> nn.Module:
        return SparseSequential(conv, nn.BatchNorm1d(channels), nn.ReLU(inplace=True))

    return SparseSequential(
        block(SubMConv3d(4, 16, 3, padding=1, bias=False, indice_key="subm1"), 16),
        block(SubMConv3d(16, 16, 3, padding=1, bias=False, indice_key="subm1"), 16),
        block(SparseConv3d(16, 24, 3, stride=2, padding=1, bias=False, indice_key="down"), 24),
        SparseSequential(SubMConv3d(24, 24, 3, indice_key="subm2"), nn.ReLU()),  # no norm to fuse, but a ReLU
        block(SparseInverseConv3d(24, 16, 3, bias=False, indice_key="down"), 16),
    )


def test_fused_sparse_network_equals_the_unfused_one():
    from serve.runtime.fused_sparse_conv import FusedSparseConv

    plain = prepare(sparse_network())
    folded = copy.deepcopy(plain)
    pairs = fusion.find_fusable(plain, lambda: plain(sparse_input((9, 8, 7), 4)))
    assert len(pairs) == 4
    fusion.fuse(folded, pairs)
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(FusedSparseConv) == 5 and nn.ReLU not in kinds
    expected, got = plain(sparse_input((9, 8, 7), 4)), folded(sparse_input((9, 8, 7), 4))
    assert torch.equal(got.indices, expected.indices) and list(got.spatial_shape) == [9, 8, 7]
    torch.testing.assert_close(got.features, expected.features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["numba", "torch"])
def test_fused_sparse_block_equals_the_unfused_one(path):
    with suppress_warnings():
        from mmdet3d.models.layers import SparseBasicBlock

    from serve.runtime.fused_sparse_conv import FusedSparseBasicBlock

    plain = prepare(nn.Sequential(SparseBasicBlock(16, 16, norm_cfg={"type": "BN1d"}, indice_key="key")))
    fused = copy.deepcopy(plain)
    fusion.fuse(fused, fusion.find_fusable(plain, lambda: plain(sparse_input((9, 8, 7), 16))))
    assert type(fused[0]) is FusedSparseBasicBlock
    with torch_only() if path == "torch" else nullcontext():
        expected, got = plain(sparse_input((9, 8, 7), 16)), fused(sparse_input((9, 8, 7), 16))
    assert (expected.features == 0).any()  # the last ReLU cuts something
    torch.testing.assert_close(got.features, expected.features, atol=1e-4, rtol=1e-4)


def test_inverse_convolution_without_geometry_names_its_key():
    from mmcv.ops import SparseInverseConv3d

    from serve.runtime.fused_sparse_conv import FusedSparseConv

    layer = FusedSparseConv(SparseInverseConv3d(4, 4, 3, indice_key="nowhere"), relu=False)
    with pytest.raises(ValueError, match="nowhere"):
        layer(sparse_input((4, 4, 4), 4))


def test_sparse_map_equals_mmcvs_dense_tensor():
    from serve.runtime.fused_sparse_conv import SparseMap

    x = sparse_input((3, 5, 4), 6)
    laid_out = SparseMap(x.features, x.indices, x.spatial_shape, x.batch_size)
    assert torch.equal(laid_out.dense(), x.dense())
    assert torch.equal(laid_out.dense(channels_first=False), x.dense(channels_first=False))
    dense = laid_out.dense().view(2, 6 * 3, 5, 4)
    assert torch.equal(dense, x.dense().view(2, 6 * 3, 5, 4))
    assert dense.is_contiguous(memory_format=torch.channels_last)


class Tapped(nn.Sequential):
    """Sequence that returns the input of its ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x))


def test_fused_backbone_equals_the_unfused_one_and_other_sequences_are_unchanged():
    from serve.runtime.fused_conv import FusedConv

    def layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    plain = prepare(
        nn.Sequential(
            nn.Sequential(*layer(32, 64, 2), *layer(64, 64), *layer(64, 48)), Tapped(*layer(48, 64))
        )
    )
    folded = copy.deepcopy(plain)
    x = torch.randn(2, 32, 17, 22, generator=torch.Generator().manual_seed(0))
    fusion.fuse(folded, fusion.find_fusable(plain, lambda: plain(x)))
    kinds = [type(module) for module in folded[0]]
    # The first layer has stride 2.
    assert kinds.count(FusedConv) == 2 and kinds.count(nn.ReLU) == 1
    assert not any(isinstance(module, FusedConv) for module in folded[1])
    torch.testing.assert_close(folded(x), plain(x), atol=1e-4, rtol=1e-4)


class NormWithActivation(nn.BatchNorm2d):
    """A batch norm that does more, as timm's ``BatchNormAct2d``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(super().forward(x), inplace=True)


def test_a_norm_that_holds_an_activation_is_not_fused_and_others_beside_it_are():
    plain = prepare(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), NormWithActivation(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
    )
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert fusion.find_fusable(plain, lambda: plain(x)) == (("2", "3"),)
