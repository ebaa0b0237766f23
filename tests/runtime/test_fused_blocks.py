"""Fused parts of image networks answer as upstream's do, and have the same bits in any batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from serve import ops

ops.install("portable")

from serve.runtime import fusion  # noqa: E402
from serve.runtime.fused_conv import FusedConv, supports  # noqa: E402
from serve.runtime.model import suppress_warnings  # noqa: E402
from tests.runtime.test_fusion import prepare  # noqa: E402

# Upstream calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def build(kind: str, **settings: Any) -> nn.Module:
    with suppress_warnings():
        import mmdet.models  # noqa: F401
        from mmdet.registry import MODELS

        # A test of mmdet3d's parts may have left its scope as the default.
        with torch.random.fork_rng(), DefaultScope.overwrite_default_scope("mmdet"):
            torch.manual_seed(0)
            network = MODELS.build({"type": kind, **settings})
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    fan_in = module.weight[0].numel()
                    nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
                    if module.bias is not None:
                        nn.init.normal_(module.bias, std=0.1)
    return network


class Part(nn.Module):
    """A part of a detector in a network of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Any) -> list[Tensor]:
        found = self.part(x)
        return flatten(found)


def flatten(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for one in found for tensor in flatten(one)]


def fuse(part: nn.Module, x: Any, *, with_norm: bool = True) -> tuple[Part, Part]:
    """Return a network as upstream has it, and a fused one; without norms, beside a pair that is only there to fold."""
    plain = Part(prepare(part))
    if not with_norm:
        plain.beside = prepare(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    fused = copy.deepcopy(plain)

    def run() -> None:
        plain(x)
        if not with_norm:
            plain.beside(torch.zeros(1, 1, 2, 2))

    with torch.no_grad():
        fusion.fuse(fused, fusion.find_fusable(plain, run))
    return plain, fused


def features(batch: int, *shapes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def check(plain: Part, fused: Part, x: Any) -> None:
    with torch.no_grad():
        expected, got = plain(x), fused(x)
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
    for one, other in zip(got, expected, strict=True):
        # Roundings of fifty layers, relative to what they round.
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_a_fused_resnet_equals_the_unfused_one(depth, style):
    network = build("mmdet.ResNet", depth=depth, style=style)
    (x,) = features(2, (3, 70, 90))
    plain, fused = fuse(network, x)
    check(plain, fused, x)
    left = [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left and sum(isinstance(module, FusedConv) for module in fused.modules()) > depth // 2


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("mmdet.ResNeXt", {"depth": 50, "groups": 32, "base_width": 4}),
        ("mmdet.Res2Net", {"depth": 50, "scales": 4, "base_width": 26, "style": "pytorch"}),
        ("mmdet.ResNetV1d", {"depth": 50}),
        ("mmdet.RegNet", {"arch": "regnetx_400mf"}),
        ("mmdet.CSPNeXt", {"deepen_factor": 0.33, "widen_factor": 0.5}),
        ("mmdet.Darknet", {"depth": 53}),
    ],
)
def test_backbones_of_other_kinds_are_unchanged_in_what_they_answer(kind, settings):
    (x,) = features(1, (3, 64, 96))
    plain, fused = fuse(build(kind, **settings), x)
    check(plain, fused, x)


@pytest.mark.parametrize(
    "extra",
    [{}, {"add_extra_convs": "on_output"}, {"add_extra_convs": "on_input", "relu_before_extra_convs": True}],
)
@pytest.mark.parametrize("sizes", [((20, 28), (10, 14), (5, 7)), ((21, 27), (11, 14), (6, 7))])
def test_a_fused_pyramid_equals_the_unfused_one(extra, sizes):
    from serve.runtime.fused_blocks import FusedFPN

    maps = features(2, *((channels, *size) for channels, size in zip((32, 48, 64), sizes, strict=True)))
    neck = build("mmdet.FPN", in_channels=[32, 48, 64], out_channels=32, num_outs=5, **extra)
    plain, fused = fuse(neck, maps, with_norm=False)
    assert isinstance(fused.part, FusedFPN)
    check(plain, fused, maps)


def test_a_pyramid_with_another_resampling_is_left_as_it_is():
    maps = features(1, (32, 8, 8), (32, 4, 4))
    neck = build(
        "mmdet.FPN", in_channels=[32, 32], out_channels=32, num_outs=2, upsample_cfg={"mode": "bilinear"}
    )
    plain, fused = fuse(neck, maps, with_norm=False)
    assert type(fused.part) is type(plain.part)
    check(plain, fused, maps)


RETINA = {"type": "mmdet.RetinaHead", "num_classes": 5, "in_channels": 32, "feat_channels": 32}
PROPOSALS = {"type": "mmdet.RPNHead", "in_channels": 32, "feat_channels": 32}
RTMDET = {
    "type": "mmdet.RTMDetSepBNHead", "num_classes": 5, "in_channels": 32, "feat_channels": 32, "stacked_convs": 2,
    "anchor_generator": {"type": "mmdet.MlvlPointGenerator", "offset": 0, "strides": [8, 16, 32]},
    "bbox_coder": {"type": "mmdet.DistancePointBBoxCoder"}, "share_conv": True, "pred_kernel_size": 1,
    "with_objectness": False, "norm_cfg": {"type": "BN"}, "act_cfg": {"type": "SiLU"},
    "loss_cls": {"type": "mmdet.QualityFocalLoss", "use_sigmoid": True}, "loss_bbox": {"type": "mmdet.GIoULoss"},
}  # fmt: skip
FCOS = {"type": "mmdet.FCOSHead", "num_classes": 5, "in_channels": 32, "feat_channels": 32,
        "norm_cfg": {"type": "GN", "num_groups": 4}}  # fmt: skip


@pytest.mark.parametrize("head", [RETINA, PROPOSALS, RTMDET, FCOS], ids=lambda head: head["type"])
def test_fused_heads_equal_the_unfused_ones(head):
    maps = features(2, (32, 20, 24), (32, 10, 12), (32, 5, 6))
    if head is FCOS:
        maps += features(2, (32, 3, 3), (32, 2, 2))
    plain, fused = fuse(build(**{"kind": head["type"], **{k: v for k, v in head.items() if k != "type"}}), maps,
                        with_norm=head is RTMDET)  # fmt: skip
    check(plain, fused, maps)
    assert any(isinstance(module, FusedConv) for module in fused.part.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.part.modules())


def test_a_shared_convolution_becomes_one_for_each_norm():
    shared = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    levels = nn.ModuleList(
        nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(3)
    )
    for level in levels:
        level[0] = shared

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = levels

        def forward(self, x: Tensor) -> list[Tensor]:
            return [level(x) for level in self.levels]

    (x,) = features(1, (32, 9, 11))
    plain, fused = fuse(Levels(), x)
    check(plain, fused, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert len({id(level[0]) for level in fused.part.levels}) == 3


def test_a_fused_mask_head_equals_the_unfused_one_and_takes_no_regions():
    head = build("mmdet.FCNMaskHead", num_convs=2, in_channels=32, conv_out_channels=32, num_classes=5)
    (x,) = features(3, (32, 14, 14))
    plain, fused = fuse(head, x, with_norm=False)
    check(plain, fused, x)
    assert fused(x[:0])[0].shape == (0, 5, 28, 28)


def test_an_image_has_the_same_bits_in_any_batch_and_with_any_number_of_threads():
    network = build("mmdet.ResNet", depth=18)
    (x,) = features(4, (3, 64, 80))
    _, fused = fuse(network, x)
    convolutions = [module for module in fused.modules() if isinstance(module, FusedConv)]
    threads = torch.get_num_threads()
    (maps,) = features(4, (convolutions[0].in_channels, 19, 23))
    try:
        for convolution in convolutions[:1]:
            torch.set_num_threads(1)
            together = convolution(maps)
            torch.set_num_threads(3)
            for k in range(4):
                assert torch.equal(convolution(maps[k : k + 1]), together[k : k + 1])
    finally:
        torch.set_num_threads(threads)


def test_what_transforms_its_weight_or_is_strided_or_grouped_is_not_supported():
    from mmcv.cnn.bricks.conv_module import ConvModule  # noqa: F401

    class Standardized(nn.Conv2d):
        pass

    assert supports(nn.Conv2d(32, 32, 3, padding=1)) and supports(nn.Conv2d(5, 7, 1, stride=2))
    assert supports(nn.ConvTranspose2d(8, 8, 2, stride=2))
    for other in (
        Standardized(32, 32, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, (3, 1), padding=(1, 0)), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 8, 3, stride=2), nn.Conv2d(32, 32, 3, padding=1).double(), nn.ReLU(),
    ):  # fmt: skip
        assert not supports(other), other
