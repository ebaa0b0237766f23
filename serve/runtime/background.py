"""Skipping of background: networks behind a point cloud compute only what differs from their answer to no points.

The dense 2D part of a LiDAR detector runs over a map of which points reach a small share. `install` replaces its
convolutions by `MaskedSequence`, which knows what each layer answers to an empty map, finds the cells that differ from
that, and computes what these can change (`serve.ops.cpu.masked_conv`). The result has the same bits as without
skipping, for any input: the background is an expectation that is compared with, not an assumption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from serve.ops.cpu.masked_conv import ConvLayer, pack_layer
from serve.runtime.background_model import BackgroundModel
from serve.runtime.masked import MaskedBranches, MaskedSequence
from serve.runtime.masked_necks import MaskedNeck, MaskedPyramid

__all__ = ["background_skipped", "install", "set_skipping"]


def install(network: nn.Module) -> BackgroundModel | None:
    """Replace the dense part behind a point cloud by one that skips background, if it is of a known kind.

    Known are mmdet3d's SECOND backbone with its SECONDFPN or mmdet's FPN as the neck, with folded batch norms, and
    behind them the convolutions of Anchor3DHead and CenterHead. Other parts stay as they are.

    Args:
        network: detector on the CPU, its batch norms folded (`serve.runtime.fusion`).

    Returns:
        The backgrounds, or None if nothing was replaced.
    """
    from mmdet3d.models.backbones import SECOND

    for prefix in ("", "pts_"):
        backbone: Any = getattr(network, f"{prefix}backbone", None)
        if type(backbone) is not SECOND:
            continue
        blocks = [_packed(block.children()) for block in backbone.blocks]
        neck = _masked_neck(getattr(network, f"{prefix}neck", None), len(blocks))
        if neck is None or any(layers is None for layers in blocks):
            continue
        sequences = [MaskedSequence(layers) for layers in blocks if layers is not None]
        backbone.blocks = nn.ModuleList(sequences)
        setattr(network, f"{prefix}neck", neck)
        found = [getattr(network, name, None) for name in ("bbox_head", "pts_bbox_head", "rpn_head")]
        heads, heads_are_masked = _replace_heads([head for head in found if head is not None])
        if _passes_maps_on(network):
            for sequence in sequences:
                sequence.writes_background = False
            neck.writes_background = not heads_are_masked
        _scatter_channels_last(network, f"{prefix}middle_encoder")
        model = BackgroundModel(sequences, neck, heads)
        object.__setattr__(network, "background", model)  # not a module
        return model
    return None


def _masked_neck(neck: Any, scales: int) -> MaskedNeck | MaskedPyramid | None:
    """Return a neck of `scales` maps that skips background, with the weights of `neck`; None for another kind."""
    from mmdet.models.necks import FPN
    from mmdet3d.models.necks import SECONDFPN

    if type(neck) is SECONDFPN:
        merged = [_packed(block.children()) for block in neck.deblocks]
        if any(layers is None or len(layers) != 1 for layers in merged):
            return None
        return MaskedNeck([layers[0] for layers in merged if layers is not None])
    if type(neck) is FPN and neck.upsample_cfg == {"mode": "nearest"}:
        laterals, outputs = _packed(neck.lateral_convs), _packed(neck.fpn_convs)
        levels = {
            scales,
            neck.num_outs,
            *(len(layers) for layers in (laterals, outputs) if layers is not None),
        }
        if laterals is not None and outputs is not None and levels == {scales}:
            return MaskedPyramid(laterals, outputs)
    return None


def set_skipping(network: nn.Module, *, enabled: bool) -> None:
    """Turn skipping on or off; all cells are computed without it, by the same loops."""
    model = getattr(network, "background", None)
    if model is not None:
        model.skipping = enabled


def background_skipped(network: nn.Module) -> bool:
    """Return whether a network has a part that skips background, turned on."""
    model = getattr(network, "background", None)
    return model is not None and bool(model.skipping)


def _passes_maps_on(network: nn.Module) -> bool:
    """Return whether only the neck of a network reads its backbone's maps, and only the head those of the neck."""
    from mmdet3d.models import detectors

    names = ("VoxelNet", "DynamicVoxelNet", "CenterPoint", "MVXFasterRCNN", "DynamicMVXFasterRCNN", "PartA2")
    return type(network) in {getattr(detectors, name) for name in names}


def _replace_heads(heads: Sequence[Any]) -> tuple[list[list[MaskedSequence | MaskedBranches]], bool]:
    """Replace convolutions of heads; returns their chains, and whether only these read the neck's map."""
    from mmdet3d.models.dense_heads import Anchor3DHead, CenterHead

    chains: list[list[MaskedSequence | MaskedBranches]] = []
    are_masked = True
    for head in heads:
        if isinstance(head, Anchor3DHead) and type(head).forward_single is Anchor3DHead.forward_single:
            for name in ("conv_cls", "conv_reg", "conv_dir_cls"):
                layer = getattr(head, name, None)
                layers = None if layer is None else _packed([layer])
                if layers is not None:
                    setattr(head, name, MaskedSequence(layers))
                    chains.append([getattr(head, name)])
                are_masked &= layer is None or layers is not None
            are_masked &= type(head).forward is Anchor3DHead.forward
        elif isinstance(head, CenterHead):
            replaced = _replace_center_head(head)
            chains += replaced
            are_masked &= bool(replaced) and not head.shared_conv.writes_background
        else:
            are_masked = False
    return chains, are_masked


def _replace_center_head(head: Any) -> list[list[MaskedSequence | MaskedBranches]]:
    from mmdet3d.models.dense_heads.centerpoint_head import CenterHead, SeparateHead

    from serve.runtime import center_head

    shared = _packed([head.shared_conv])
    if shared is None:
        return []
    head.shared_conv = MaskedSequence(shared)
    tasks = list(head.task_heads)
    if center_head.is_known(head):
        heatmaps = [_packed(task.heatmap.children()) for task in tasks]
        boxes = [
            _branches({name: getattr(task, name) for name in task.heads if name != "heatmap"})
            for task in tasks
        ]
        maps = [MaskedSequence(layers) for layers in heatmaps if layers is not None]
        known = [one for one in boxes if one is not None]
        if len(maps) == len(known) == len(tasks):
            head.shared_conv.writes_background = False
            center_head.replace_tasks(head, maps, known)
            parts: list[MaskedSequence | MaskedBranches] = [*maps, *known]
            return [[head.shared_conv, part] for part in parts]
    chains: list[list[MaskedSequence | MaskedBranches]] = []
    are_masked = type(head).forward_single is CenterHead.forward_single
    for task in tasks:
        if type(task) is not SeparateHead:
            are_masked = False
            continue
        for name in task.heads:
            layers = _packed(getattr(task, name).children())
            if layers is not None:
                masked = MaskedSequence(layers)
                setattr(task, name, masked)
                chains.append([head.shared_conv, masked])
            are_masked &= layers is not None
    head.shared_conv.writes_background = not are_masked
    return chains or [[head.shared_conv]]


def _branches(sequences: dict[str, nn.Module]) -> MaskedBranches | None:
    """Merge sequences of two convolutions that read one map; None if they are anything else, or differ."""
    chains = [_convolutions(sequence.children()) for sequence in sequences.values()]
    pairs = [chain for chain in chains if chain is not None and len(chain) == 2]
    if not pairs or len(pairs) < len(chains):
        return None
    firsts: list[Any] = [first for (first, _), _ in pairs]
    alike = {
        (one.in_channels, one.out_channels, one.kernel_size, one.stride, one.padding, relu, one.bias is None)
        for one, (_, relu) in zip(firsts, (first for first, _ in pairs), strict=True)
    }
    seconds = [_pack(second, relu=relu) for _, (second, relu) in pairs]
    whole = all(isinstance(one, nn.Conv2d) for one in firsts) and firsts[0].bias is not None
    if len(alike) > 1 or not whole or not {one.kind for one in seconds} <= {"narrow", "direct"}:
        return None
    first = pack_layer(
        torch.cat([one.weight for one in firsts]),
        torch.cat([one.bias for one in firsts]),
        stride=firsts[0].stride[0],
        padding=firsts[0].padding[0],
        relu=pairs[0][0][1],
        tile=2,
    )
    hidden = firsts[0].out_channels
    return MaskedBranches(
        tuple(sequences), first, [replace(one, origin=i * hidden) for i, one in enumerate(seconds)]
    )


def _scatter_channels_last(network: nn.Module, name: str) -> None:
    """Let the scatter of pillars write the memory layout of the convolutions behind it."""
    from mmdet3d.models.middle_encoders import PointPillarsScatter

    encoder = getattr(network, name, None)
    if type(encoder) is PointPillarsScatter:
        setattr(network, name, ChannelsLastScatter(encoder))


class ChannelsLastScatter(nn.Module):
    """PointPillarsScatter whose map is channels-last in memory."""

    def __init__(self, scatter: Any) -> None:
        """Take extents and channels of mmdet3d's `scatter`."""
        super().__init__()
        self.ny, self.nx, self.in_channels = int(scatter.ny), int(scatter.nx), int(scatter.in_channels)

    def forward(self, voxel_features: Tensor, coors: Tensor, batch_size: int | None = None) -> Tensor:
        """Scatter (N, C) features of pillars (N, 4: batch, z, y, x) to a map (B, C, ny, nx), zero without a pillar."""
        canvas = voxel_features.new_zeros((batch_size or 1, self.ny * self.nx, self.in_channels))
        rows = coors.long()
        frames = rows[:, 0] if batch_size is not None else torch.zeros_like(rows[:, 0])
        canvas[frames, rows[:, 2] * self.nx + rows[:, 3]] = voxel_features
        return canvas.view(-1, self.ny, self.nx, self.in_channels).permute(0, 3, 1, 2)


def _packed(modules: Iterable[nn.Module]) -> list[ConvLayer] | None:
    """Pack convolutions, each with an optional ReLU behind it; None if there is anything else."""
    layers = _convolutions(modules)
    return None if layers is None else [_pack(module, relu=relu) for module, relu in layers]


def _convolutions(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, bool]] | None:
    """List convolutions, each with whether a ReLU is behind it; None if there is anything else."""
    from mmcv.cnn import ConvModule

    flat: list[nn.Module] = []
    for module in modules:
        if isinstance(module, ConvModule):
            if (
                module.order != ("conv", "norm", "act")
                or module.with_explicit_padding
                or module.with_spectral_norm
            ):
                return None
            flat.append(module.conv)
            flat += [module.norm] if module.with_norm else []
            flat += [module.activate] if module.with_activation else []
        else:
            flat.append(module)
    layers: list[tuple[nn.Module, bool]] = []
    for module in flat:
        if type(module) is nn.ReLU and layers:
            layers[-1] = (layers[-1][0], True)
        elif _is_supported(module):
            layers.append((module, False))
        elif not isinstance(module, nn.Identity):
            return None
    return layers


def _is_supported(module: Any) -> bool:
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.weight.device.type != "cpu":
        return False
    kernel, stride, padding = ({*module.kernel_size}, {*module.stride}, {*module.padding})
    plain = (
        module.weight.dtype == torch.float32
        and module.groups == 1
        and {*module.dilation} == {1}
        and module.padding_mode == "zeros"
        and len(kernel) == len(stride) == len(padding) == 1
        and not isinstance(module.padding, str)
    )
    if isinstance(module, nn.ConvTranspose2d):
        return plain and kernel == stride and padding == {0} and {*module.output_padding} == {0}
    return plain


def _pack(module: Any, *, relu: bool) -> ConvLayer:
    return pack_layer(
        module.weight,
        module.bias,
        stride=module.stride[0],
        padding=module.padding[0],
        relu=relu,
        transposed=isinstance(module, nn.ConvTranspose2d),
        tile=2,
    )
