"""Skipping of background: networks behind a point cloud compute only what differs from their answer to no points.

The dense 2D part of a LiDAR detector runs over a map of which points reach a small share. `install` replaces its
convolutions by `MaskedSequence`, which knows what each layer answers to an empty map, finds the cells that differ from
that, and computes what these can change (`serve.ops.cpu.masked_conv`). The result has the same bits as without
skipping, for any input: the background is an expectation that is compared with, not an assumption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve.ops.cpu import masked_conv
from serve.ops.cpu.masked_conv import Background, ConvLayer, Mask, compress, fill, find_changed, pack_layer
from serve.runtime.fused_conv import FusedConv

__all__ = [
    "MAX_SIZES",
    "BackgroundModel",
    "MaskedNeck",
    "MaskedSequence",
    "background_skipped",
    "install",
    "set_skipping",
]

# Sizes of maps whose backgrounds are kept; a model has one, or one per scale of test-time augmentation.
MAX_SIZES = 4


class MaskedSequence(nn.Module):
    """Sequence of convolutions with fused biases and ReLUs that skips background. CPU only, not trainable."""

    def __init__(self, layers: Sequence[ConvLayer]) -> None:
        """Take packed layers, in order; without a background all cells are computed."""
        super().__init__()
        self.layers = tuple(layers)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[int, int], list[Background]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H', W'), channels-last in memory."""
        cells = _cells(x)
        known = self._known(x)
        if known is None:
            for layer in self.layers:
                cells = _run(cells, layer)[0]
            return _tensor(cells)
        changed: Mask | None = _changed(x, cells, known[0])
        for layer, before, after in zip(self.layers, known, known[1:], strict=False):
            cells, changed = _run(cells, layer, changed, before, after)
        assert changed is not None
        fill(cells, changed, known[-1], 0, cells.shape[3])
        return _tensor(cells, changed, known[-1])

    def record(self, before: Background) -> Background:
        """Keep the backgrounds behind a map without points; return that of the output."""
        found = [before]
        cells = before.expand()[None]
        for layer in self.layers:
            cells = _run(cells, layer)[0]
            found.append(compress(cells[0]))
        self.backgrounds[before.index.shape] = found
        return found[-1]

    def _known(self, x: Tensor) -> list[Background] | None:
        size = x.shape[2], x.shape[3]
        if self.model is None or not self.model.skipping:
            return None
        if size not in self.backgrounds:
            self.model.record(self, size)
        return self.backgrounds.get(size)


class MaskedNeck(nn.Module):
    """SECONDFPN that skips background: each scale is brought to one size and written into its channels of one map."""

    def __init__(self, layers: Sequence[ConvLayer]) -> None:
        """Take one packed layer per scale."""
        super().__init__()
        self.layers = tuple(layers)
        self.outputs = sum(layer.outputs for layer in layers)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[tuple[int, int], ...], tuple[list[Background], Background]] = {}

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Merge maps (B, Ci, Hi, Wi) to one of (B, sum of Cout, H, W), channels-last in memory."""
        maps = [_cells(one) for one in x]
        skipping = self.model is not None and self.model.skipping
        known = self.backgrounds.get(_sizes(maps)) if skipping else None
        out = self._empty(maps)
        if known is None:
            channel = 0
            for cells, layer in zip(maps, self.layers, strict=True):
                masked_conv.convolve(cells, layer, out, channel)
                channel += layer.outputs
            return [_tensor(out)]
        befores, after = known
        total: Mask | None = None
        channel = 0
        for one, cells, layer, before in zip(x, maps, self.layers, befores, strict=True):
            changed = masked_conv.convolve(
                cells, layer, out, channel,
                changed=_changed(one, cells, before), before=before, after=after,
            )  # fmt: skip
            assert changed is not None
            fill(out, changed, after, channel, layer.outputs)
            total = changed if total is None else total | changed
            channel += layer.outputs
        return [_tensor(out, total, after)]

    def record(self, befores: Sequence[Background]) -> Background:
        """Keep the background behind scales without points; return that of the output."""
        maps = [before.expand()[None] for before in befores]
        out = self._empty(maps)
        channel = 0
        for cells, layer in zip(maps, self.layers, strict=True):
            masked_conv.convolve(cells, layer, out, channel)
            channel += layer.outputs
        after = compress(out[0])
        self.backgrounds[_sizes(maps)] = (list(befores), after)
        return after

    def _empty(self, maps: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        shapes = {layer.out_shape(*cells.shape[1:3]) for layer, cells in zip(self.layers, maps, strict=True)}
        if len(shapes) != 1:
            raise ValueError(f"the scales of the neck have different sizes: {sorted(shapes)}")
        return np.empty((len(maps[0]), *shapes.pop(), self.outputs), np.float32)


class BackgroundModel:
    """Backgrounds of all parts of one network, recorded for each size of map when it is first seen."""

    def __init__(
        self, blocks: Sequence[MaskedSequence], neck: MaskedNeck, heads: Sequence[Sequence[MaskedSequence]]
    ) -> None:
        """Connect the blocks of a backbone, the neck behind them, and chains of sequences behind the neck."""
        self.blocks, self.neck, self.heads = tuple(blocks), neck, tuple(tuple(chain) for chain in heads)
        self.skipping = True
        self._seen: list[tuple[int, int]] = []
        neck.model = self
        for chain in (self.blocks, *self.heads):
            for part in chain:
                part.model = self

    def record(self, part: MaskedSequence, size: tuple[int, int]) -> None:
        """Record all backgrounds for maps of `size` at the first block; do nothing for another part."""
        if part is not self.blocks[0] or len(self._seen) >= MAX_SIZES:
            return
        self._seen.append(size)
        inputs = self.blocks[0].layers[0].weight.shape[2]
        known = compress(np.zeros((*size, inputs), np.float32))
        scales = [known := block.record(known) for block in self.blocks]
        merged = self.neck.record(scales)
        for chain in self.heads:
            known = merged
            for one in chain:
                recorded = one.backgrounds.get(known.index.shape)
                known = recorded[-1] if recorded else one.record(known)


def install(network: nn.Module) -> BackgroundModel | None:
    """Replace the dense part behind a point cloud by one that skips background, if it is of a known kind.

    Known are mmdet3d's SECOND backbone and SECONDFPN neck with folded batch norms, and behind them the convolutions of
    Anchor3DHead and CenterHead. Other parts stay as they are.

    Args:
        network: detector on the CPU, its batch norms folded (`serve.runtime.fusion`).

    Returns:
        The backgrounds, or None if nothing was replaced.
    """
    from mmdet3d.models.backbones import SECOND
    from mmdet3d.models.necks import SECONDFPN

    for prefix in ("", "pts_"):
        backbone: Any = getattr(network, f"{prefix}backbone", None)
        neck: Any = getattr(network, f"{prefix}neck", None)
        if type(backbone) is not SECOND or type(neck) is not SECONDFPN:
            continue
        blocks = [_packed(block.children()) for block in backbone.blocks]
        scales = [_packed(block.children()) for block in neck.deblocks]
        if any(layers is None for layers in blocks) or any(one is None or len(one) != 1 for one in scales):
            continue
        sequences = [MaskedSequence(layers) for layers in blocks if layers is not None]
        merged = MaskedNeck([layers[0] for layers in scales if layers is not None])
        backbone.blocks = nn.ModuleList(sequences)
        setattr(network, f"{prefix}neck", merged)
        heads = _replace_heads(
            *(getattr(network, name, None) for name in ("bbox_head", "pts_bbox_head", "rpn_head"))
        )
        _scatter_channels_last(network, f"{prefix}middle_encoder")
        model = BackgroundModel(sequences, merged, heads)
        object.__setattr__(network, "background", model)  # not a module
        return model
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


def _replace_heads(*heads: Any) -> list[list[MaskedSequence]]:
    from mmdet3d.models.dense_heads import Anchor3DHead, CenterHead

    chains = []
    for head in heads:
        if isinstance(head, Anchor3DHead) and type(head).forward_single is Anchor3DHead.forward_single:
            for name in ("conv_cls", "conv_reg", "conv_dir_cls"):
                layers = _packed([layer]) if (layer := getattr(head, name, None)) is not None else None
                if layers is not None:
                    setattr(head, name, MaskedSequence(layers))
                    chains.append([getattr(head, name)])
        elif isinstance(head, CenterHead):
            chains += _replace_center_head(head)
    return chains


def _replace_center_head(head: Any) -> list[list[MaskedSequence]]:
    from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead

    shared = _packed([head.shared_conv])
    if shared is None:
        return []
    head.shared_conv = MaskedSequence(shared)
    chains = []
    for task in head.task_heads:
        if type(task) is not SeparateHead:
            continue
        for name in task.heads:
            layers = _packed(getattr(task, name).children())
            if layers is not None:
                setattr(task, name, MaskedSequence(layers))
                chains.append([head.shared_conv, getattr(task, name)])
    return chains or [[head.shared_conv]]


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
        elif isinstance(module, FusedConv) or _is_supported(module):
            layers.append((module, isinstance(module, FusedConv) and module.layer.relu))
        elif not isinstance(module, nn.Identity):
            return None
    return [_pack(module, relu=relu) for module, relu in layers]


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
    if isinstance(module, FusedConv):
        layer: ConvLayer = module.layer
        return layer
    return pack_layer(
        module.weight,
        module.bias,
        stride=module.stride[0],
        padding=module.padding[0],
        relu=relu,
        transposed=isinstance(module, nn.ConvTranspose2d),
    )


def _run(
    cells: np.ndarray[Any, Any],
    layer: ConvLayer,
    changed: Mask | None = None,
    before: Background | None = None,
    after: Background | None = None,
) -> tuple[np.ndarray[Any, Any], Mask | None]:
    out = np.empty((len(cells), *layer.out_shape(*cells.shape[1:3]), layer.outputs), np.float32)
    return out, masked_conv.convolve(cells, layer, out, changed=changed, before=before, after=after)


def _cells(x: Tensor) -> np.ndarray[Any, Any]:
    """Return (B, C, H, W) as an array (B, H, W, C), a copy unless channels-last in memory."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")
    array: np.ndarray[Any, Any] = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
    return array


def _tensor(
    cells: np.ndarray[Any, Any], changed: Mask | None = None, background: Background | None = None
) -> Tensor:
    """Return an array (B, H, W, C) as a tensor (B, C, H, W) that remembers where it differs from its background."""
    x = torch.from_numpy(cells).permute(0, 3, 1, 2)
    if changed is not None:
        x.changed = (changed, background, x._version)  # type: ignore[attr-defined]
    return x


def _changed(x: Tensor, cells: np.ndarray[Any, Any], background: Background) -> Mask:
    """Return where a map differs from `background`: as remembered, unless the tensor was modified, or compared."""
    mask, known, version = getattr(x, "changed", (None, None, None))
    if mask is not None and known is background and version == x._version:
        return mask  # type: ignore[no-any-return]
    return find_changed(cells, background)


def _sizes(maps: Sequence[np.ndarray[Any, Any]]) -> tuple[tuple[int, int], ...]:
    return tuple((cells.shape[1], cells.shape[2]) for cells in maps)
