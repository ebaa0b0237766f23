"""Parts of image networks that compute convolution, bias, residual and ReLU in one pass on a CPU.

Upstream's modules become subclasses of their own classes in place, so that code that looks at them finds what it knows;
their convolutions, whose batch norms have been folded, become `FusedConv`. Modules of other classes, and of classes
with a `forward` of their own, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.necks.fpn import FPN
from mmdet.models.roi_heads.bbox_heads.convfc_bbox_head import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import FCNMaskHead
from torch import Tensor, nn
from torch.nn import functional

from serve.runtime.fused_conv import FusedConv, FusedLinear, supports

__all__ = ["fuse_blocks"]

# Convolutions that heads call by themselves: their own `forward_single` or `forward` needs nothing but their output.
_PREDICTORS = ("retina_cls", "retina_reg", "rpn_cls", "rpn_reg", "rtm_cls", "rtm_reg", "conv_logits")


def fuse_blocks(network: nn.Module) -> None:
    """Replace the parts of `network` for which there are fused ones, in place."""
    for module in list(network.modules()):
        forward = getattr(type(module), "forward", None)
        if forward is ConvModule.forward:
            _fuse_conv_module(module)
        elif forward in (BasicBlock.forward, Bottleneck.forward):
            _fuse_residual_block(module)
        elif forward is ResNet.forward:
            _fuse_stem(module)
        elif forward is FCNMaskHead.forward:
            _fuse_mask_head(module)
        elif forward is ConvFCBBoxHead.forward:
            _fuse_box_head(module)
        if isinstance(module, RPNHead) and type(module).forward_single is RPNHead.forward_single:
            _fuse_proposals(module)
        for name in _PREDICTORS:
            _fuse_predictor(module, name)
    for module in network.modules():
        if type(module).forward is FPN.forward:
            _fuse_pyramid(module)


class FusedConvModule(ConvModule):  # type: ignore[misc]
    """ConvModule without a norm, or with a folded one, whose ReLU is part of its convolution."""

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        """Convolve, with the ReLU if `activate`; a folded norm cannot be left out."""
        result: Tensor = self.conv(x, activate=activate)
        return result


class FusedBasicBlock(BasicBlock):  # type: ignore[misc]
    """BasicBlock whose residual is added within its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for (B, C, H, W)."""
        identity = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.conv2(self.conv1(x), identity)
        return result


class FusedBottleneck(Bottleneck):  # type: ignore[misc]
    """Bottleneck whose residual is added within its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for (B, C, H, W)."""
        identity = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.conv3(self.conv2(self.conv1(x)), identity)
        return result


class FusedFPN(FPN):  # type: ignore[misc]
    """FPN whose coarser maps are added within the lateral convolutions."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Merge the maps of a backbone, finest first."""
        laterals: list[Tensor] = []
        for i in reversed(range(len(self.lateral_convs))):
            coarser = laterals[0] if laterals else None
            laterals.insert(0, self.lateral_convs[i].conv(inputs[i + self.start_level], coarser))
        maps = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        sources = {
            "on_input": inputs[self.backbone_end_level - 1],
            "on_lateral": laterals[-1],
            "on_output": maps[-1],
        }
        source = sources[self.add_extra_convs] if self.add_extra_convs else maps[-1]
        for i in range(len(laterals), self.num_outs):
            if not self.add_extra_convs:
                maps.append(functional.max_pool2d(maps[-1], 1, stride=2))
                continue
            maps.append(self.fpn_convs[i](source))
            source = functional.relu(maps[-1]) if self.relu_before_extra_convs else maps[-1]
        return tuple(maps)


class FusedRPNHead(RPNHead):  # type: ignore[misc]
    """RPNHead whose ReLU is part of its convolution."""

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the scores and deltas of one level."""
        x = self.rpn_conv(x)
        return self.rpn_cls(x), self.rpn_reg(x)


def _fuse_predictor(head: nn.Module, name: str) -> None:
    """Fuse a convolution with its bias, or one for each level."""
    found: Any = getattr(head, name, None)
    if isinstance(found, nn.ModuleList):
        layer: Any
        for i, layer in enumerate(found):
            found[i] = FusedConv(layer, relu=False) if supports(layer) else layer
    elif found is not None and supports(found):
        setattr(head, name, FusedConv(found, relu=False))


def _fuse_conv_module(module: Any) -> None:
    plain = module.order == ("conv", "norm", "act") and not module.with_explicit_padding
    if not plain or module.with_spectral_norm or module.efficient_conv_bn_eval_forward is not None:
        return
    if not supports(module.conv):
        return
    has_norm = module.with_norm and type(module.norm) is not nn.Identity
    relu = module.with_activation and type(module.activate) is nn.ReLU
    whole = not has_norm and (relu or not module.with_activation)
    module.conv = FusedConv(module.conv, relu=relu and whole)
    if whole and type(module) is ConvModule:
        module.__class__ = FusedConvModule


def _fuse_residual_block(block: Any) -> None:
    """Fuse a block with folded norms around its convolutions, but for the second of three, which may be of any kind."""
    has_three = isinstance(block, Bottleneck)
    names = ("conv1", "conv2", "conv3") if has_three else ("conv1", "conv2")
    norms = [getattr(block, f"norm{i + 1}") for i in range(len(names))]
    last = names[-1]
    if getattr(block, "with_plugins", False) or not supports(getattr(block, last)):
        return
    if type(block.relu) is not nn.ReLU or type(norms[-1]) is not nn.Identity:
        return
    for name, norm in zip(names[:-1], norms, strict=False):
        setattr(block, name, _with_relu(getattr(block, name), norm, block.relu))
    setattr(block, last, FusedConv(getattr(block, last), relu=True))
    block.__class__ = FusedBottleneck if has_three else FusedBasicBlock


def _with_relu(conv: nn.Module, norm: nn.Module, relu: nn.Module) -> nn.Module:
    if type(norm) is nn.Identity and supports(conv):
        return FusedConv(conv, relu=True)  # type: ignore[arg-type]
    return nn.Sequential(conv, norm, relu)


def _fuse_stem(network: Any) -> None:
    if not network.deep_stem and type(network.norm1) is nn.Identity and supports(network.conv1):
        network.conv1 = FusedConv(network.conv1, relu=type(network.relu) is nn.ReLU)
        network.relu = nn.Identity() if type(network.relu) is nn.ReLU else network.relu


def _fuse_pyramid(neck: Any) -> None:
    linear = all(
        type(conv) is FusedConvModule and conv.conv.layer.kind == "cellwise" and not conv.conv.layer.relu
        for conv in neck.lateral_convs
    )
    if linear and type(neck) is FPN and dict(neck.upsample_cfg) == {"mode": "nearest"}:
        neck.__class__ = FusedFPN


def _fuse_proposals(head: Any) -> None:
    if supports(head.rpn_conv) and type(head) is RPNHead:
        head.rpn_conv = FusedConv(head.rpn_conv, relu=True)
        head.__class__ = FusedRPNHead


def _fuse_mask_head(head: Any) -> None:
    if head.upsample_method == "deconv" and supports(head.upsample) and type(head.relu) is nn.ReLU:
        head.upsample = FusedConv(head.upsample, relu=True)
        head.relu = nn.Identity()


def _fuse_box_head(head: Any) -> None:
    if type(head.relu) is not nn.ReLU:
        return
    chains = [getattr(head, name) for name in ("shared_fcs", "cls_fcs", "reg_fcs")]
    layers = [layer for chain in chains for layer in chain]
    if not layers or not all(map(_is_plain_linear, layers)):
        return
    for chain in chains:
        for i, layer in enumerate(chain):
            chain[i] = FusedLinear(layer, relu=True)
    for name in ("fc_cls", "fc_reg"):
        if _is_plain_linear(getattr(head, name, None)):
            setattr(head, name, FusedLinear(getattr(head, name), relu=False))
    head.relu = nn.Identity()


def _is_plain_linear(layer: Any) -> bool:
    if type(layer) not in (nn.Linear, wrappers.Linear):
        return False
    return bool(layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu")
