"""Necks that skip background: SECONDFPN and the feature pyramid.

The modules of one scale are in `serve.runtime.masked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from serve.ops.cpu import masked_conv
from serve.ops.cpu.masked_conv import Background, ConvLayer, Mask, add_upsampled, compress, fill
from serve.runtime.masked_maps import (
    F32,
    Changes,
    background_sizes,
    map_sizes,
    read_map,
    run_layer,
    to_tensor,
)

if TYPE_CHECKING:
    from serve.runtime.background_model import BackgroundModel

__all__ = ["MaskedNeck", "MaskedPyramid"]


class MaskedNeck(nn.Module):
    """SECONDFPN that skips background: each scale is brought to one size and written into its channels of one map."""

    def __init__(self, layers: Sequence[ConvLayer]) -> None:
        """Take one packed layer per scale."""
        super().__init__()
        self.layers = tuple(layers)
        self.outputs = sum(layer.outputs for layer in layers)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[tuple[int, int], ...], tuple[list[Background], Background]] = {}
        self.writes_background = True

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Merge maps (B, Ci, Hi, Wi) to one of (B, sum of Cout, H, W), channels-last in memory."""
        skipping = self.model is not None and self.model.skipping
        known = self.backgrounds.get(map_sizes(x)) if skipping else None
        if known is None:
            return [to_tensor(self._merge([read_map(one)[0] for one in x]))]
        befores, after = known
        read = [read_map(one, before) for one, before in zip(x, befores, strict=True)]
        out = self._empty([cells for cells, _ in read])
        masks: list[Mask] = []
        channel = 0
        for (cells, changed), layer, before in zip(read, self.layers, befores, strict=True):
            marks = masked_conv.convolve(
                cells, layer, out, channel, changed=changed, before=before, after=after
            )
            assert marks is not None
            masks.append(marks)
            channel += layer.outputs
        total = np.logical_or.reduce(masks)
        channel = 0
        for marks, layer in zip(masks, self.layers, strict=True):
            # A cell that one scale has changed is read in all channels.
            fill(out, marks if self.writes_background else marks | ~total, after, channel, layer.outputs)
            channel += layer.outputs
        return [to_tensor(out, Changes(total, after, self.writes_background))]

    def record(self, befores: Sequence[Background]) -> list[Background]:
        """Keep the background behind scales without points; return that of the output, in a list."""
        after = compress(self._merge([before.expand()[None] for before in befores])[0])
        self.backgrounds[background_sizes(befores)] = (list(befores), after)
        return [after]

    def _merge(self, maps: Sequence[F32]) -> F32:
        """Compute all cells."""
        out = self._empty(maps)
        channel = 0
        for cells, layer in zip(maps, self.layers, strict=True):
            masked_conv.convolve(cells, layer, out, channel)
            channel += layer.outputs
        return out

    def _empty(self, maps: Sequence[F32]) -> F32:
        shapes = {layer.out_shape(*cells.shape[1:3]) for layer, cells in zip(self.layers, maps, strict=True)}
        if len(shapes) != 1:
            raise ValueError(f"the scales of the neck have different sizes: {sorted(shapes)}")
        return np.empty((len(maps[0]), *shapes.pop(), self.outputs), np.float32)


class MaskedPyramid(nn.Module):
    """Feature pyramid (mmdet's FPN, nearest upsampling) that skips background."""

    def __init__(self, laterals: Sequence[ConvLayer], outputs: Sequence[ConvLayer]) -> None:
        """Take the packed lateral and output convolution of each scale, finest first."""
        super().__init__()
        self.laterals, self.outputs = tuple(laterals), tuple(outputs)
        self.layers = (*self.laterals, *self.outputs)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[tuple[int, int], ...], tuple[_Level, ...]] = {}
        self.writes_background = True

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Merge maps (B, Ci, Hi, Wi), finest first, to as many (B, Cout, Hi, Wi), channels-last in memory."""
        skipping = self.model is not None and self.model.skipping
        known = self.backgrounds.get(map_sizes(x)) if skipping else None
        if known is None:
            return [to_tensor(cells) for cells in self._merge([read_map(one)[0] for one in x])[1]]
        levels: list[tuple[F32, Mask]] = []
        for one, layer, level in zip(x, self.laterals, known, strict=True):
            cells, changed = read_map(one, level.before)
            lateral, marks = run_layer(cells, layer, changed, level.before, level.lateral)
            assert marks is not None
            levels.append((lateral, marks))
        for i in range(len(levels) - 1, 0, -1):
            (fine, fine_changed), (coarse, coarse_changed) = levels[i - 1], levels[i]
            marks = add_upsampled(
                fine,
                coarse,
                (fine_changed, coarse_changed),
                (known[i - 1].lateral, known[i].merged),
                known[i - 1].merged,
            )
            assert marks is not None
            levels[i - 1] = fine, marks
        results = []
        for (cells, fine_changed), layer, level in zip(levels, self.outputs, known, strict=True):
            out, marks = run_layer(cells, layer, fine_changed, level.merged, level.after)
            assert marks is not None
            if self.writes_background:
                fill(out, marks, level.after, 0, out.shape[3])
            results.append(to_tensor(out, Changes(marks, level.after, self.writes_background)))
        return results

    def record(self, befores: Sequence[Background]) -> list[Background]:
        """Keep the backgrounds behind scales without points; return those of the outputs."""
        maps = [before.expand()[None] for before in befores]
        laterals = [
            compress(run_layer(cells, layer)[0][0]) for cells, layer in zip(maps, self.laterals, strict=True)
        ]
        merged, outputs = self._merge(maps)
        levels = tuple(
            _Level(before, lateral, compress(sums[0]), compress(out[0]))
            for before, lateral, sums, out in zip(befores, laterals, merged, outputs, strict=True)
        )
        self.backgrounds[background_sizes(befores)] = levels
        return [level.after for level in levels]

    def _merge(self, maps: Sequence[F32]) -> tuple[list[F32], list[F32]]:
        """Compute all cells; returns the merged laterals and the outputs."""
        merged = [run_layer(cells, layer)[0] for cells, layer in zip(maps, self.laterals, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            add_upsampled(merged[i - 1], merged[i])
        return merged, [run_layer(cells, layer)[0] for cells, layer in zip(merged, self.outputs, strict=True)]


@dataclass(frozen=True)
class _Level:
    """Backgrounds of one scale of a pyramid: its input, lateral, sum with the coarser scale, and output."""

    before: Background
    lateral: Background
    merged: Background
    after: Background
