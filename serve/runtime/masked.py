"""Modules that skip background: convolutions that compute the cells which differ from the answer to no points.

Each module knows the backgrounds of its layers for some sizes of map (`record`), and passes on where its output differs
from the last of them as an attribute `changes` of the tensor, so that the next module need not compare. A module of
which only such modules read the output does not even write the background (`writes_background`). With skipping
turned off, or without a background, all cells are computed, by the same loops and to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve.ops.cpu import masked_conv
from serve.ops.cpu.masked_conv import (
    Background,
    ConvLayer,
    Mask,
    add_upsampled,
    compress,
    fill,
    find_changed,
    inputs_of,
)

__all__ = [
    "MASKED",
    "MAX_SIZES",
    "BackgroundModel",
    "MaskedBranches",
    "MaskedNeck",
    "MaskedPyramid",
    "MaskedSequence",
]

# Sizes of maps whose backgrounds are kept; a model has one, or one per scale of test-time augmentation.
MAX_SIZES = 4

F32 = np.ndarray[Any, np.dtype[np.float32]]
I64 = np.ndarray[Any, np.dtype[np.int64]]


class MaskedSequence(nn.Module):
    """Sequence of convolutions with fused biases and ReLUs that skips background. CPU only, not trainable."""

    def __init__(self, layers: Sequence[ConvLayer]) -> None:
        """Take packed layers, in order; without a background all cells are computed."""
        super().__init__()
        self.layers = tuple(layers)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[int, int], list[Background]] = {}
        self.writes_background = True

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H', W'), channels-last in memory."""
        known = self._known(x)
        if known is None:
            cells, _ = _read(x)
            for layer in self.layers:
                cells = _run(cells, layer)[0]
            return _tensor(cells)
        cells, changed = _read(x, known[0])
        for layer, before, after in zip(self.layers, known, known[1:], strict=False):
            cells, changed = _run(cells, layer, changed, before, after)
        assert changed is not None
        if self.writes_background:
            fill(cells, changed, known[-1], 0, cells.shape[3])
        return _tensor(cells, Changes(changed, known[-1], self.writes_background))

    def record(self, before: Background) -> Background:
        """Keep the backgrounds behind a map without points; return that of the output."""
        found = [before]
        cells = before.expand()[None]
        for layer in self.layers:
            cells = _run(cells, layer)[0]
            found.append(compress(cells[0]))
        self.backgrounds[before.index.shape] = found
        return found[-1]

    def known_output(self, size: tuple[int, int]) -> Background | None:
        """Return the background of the output behind a map of `size`, if it is kept."""
        return self.backgrounds[size][-1] if size in self.backgrounds else None

    def _known(self, x: Tensor) -> list[Background] | None:
        size = x.shape[2], x.shape[3]
        if self.model is None or not self.model.skipping:
            return None
        if size not in self.backgrounds:
            self.model.record(self, size)
        return self.backgrounds.get(size)


class MaskedBranches(nn.Module):
    """Branches of two convolutions each, side by side behind one map, that skip background.

    The first ones are one convolution of all their outputs, of which each second one reads its own channels.
    """

    def __init__(self, names: Sequence[str], first: ConvLayer, seconds: Sequence[ConvLayer]) -> None:
        """Take the name and the second layer of each branch, and the first layer of all."""
        super().__init__()
        self.names, self.layers = tuple(names), (first, *seconds)
        self.model: BackgroundModel | None = None
        self.backgrounds: dict[tuple[int, int], _Branches] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Convolve (B, Cin, H, W) to a map (B, Cout, H', W') for each branch, channels-last in memory."""
        known = self._known(x)
        cells, changed = _read(x, known.before if known else None)
        first, *seconds = self.layers
        before, between = (known.before, known.between) if known else (None, None)
        cells, changed = _run(cells, first, changed, before, between)
        maps: dict[str, Tensor] = {}
        for i, (name, layer) in enumerate(zip(self.names, seconds, strict=True)):
            out, marks = _run(cells, layer, changed, between, known.afters[i] if known else None)
            if known and marks is not None:
                fill(out, marks, known.afters[i], 0, out.shape[3])
            maps[name] = _tensor(out)
        return maps

    def compute_rows(self, x: Tensor, places: I64) -> dict[str, F32]:
        """Compute single cells of the outputs, with the bits of `forward`.

        Args:
            x: (B, Cin, H, W).
            places: (N, 3), image, row and column of each cell of the outputs.

        Returns:
            (N, Cout) for each branch.
        """
        known = self._known(x)
        cells, changed = _read(x, known.before if known else None)
        first, *seconds = self.layers
        before, between = (known.before, known.between) if known else (None, None)
        size = first.out_shape(*cells.shape[1:3])
        wanted = np.zeros((len(cells), *seconds[0].out_shape(*size)), np.bool_)
        where = tuple(places.T)
        wanted[where] = True
        cells, changed = _run(cells, first, changed, before, between, inputs_of(seconds[0], wanted, *size))
        found: dict[str, F32] = {}
        for i, (name, layer) in enumerate(zip(self.names, seconds, strict=True)):
            out, marks = _run(cells, layer, changed, between, known.afters[i] if known else None, wanted)
            found[name] = out[where]
            if known and marks is not None:
                same = ~marks[where]
                after = known.afters[i]
                found[name][same] = after.rows[after.index[where[1:]][same]]
        return found

    def record(self, before: Background) -> Background:
        """Keep the backgrounds behind a map without points; return that of the last branch."""
        first, *seconds = self.layers
        cells = _run(before.expand()[None], first)[0]
        afters = tuple(compress(_run(cells, layer)[0][0]) for layer in seconds)
        self.backgrounds[before.index.shape] = _Branches(before, compress(cells[0]), afters)
        return afters[-1]

    def known_output(self, size: tuple[int, int]) -> Background | None:
        """Return the background of the last branch behind a map of `size`, if it is kept."""
        return self.backgrounds[size].afters[-1] if size in self.backgrounds else None

    def _known(self, x: Tensor) -> _Branches | None:
        if self.model is None or not self.model.skipping:
            return None
        return self.backgrounds.get((x.shape[2], x.shape[3]))


@dataclass(frozen=True)
class _Branches:
    """Backgrounds of branches: the input, what the first convolution answers, and the output of each."""

    before: Background
    between: Background
    afters: tuple[Background, ...]


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
        known = self.backgrounds.get(_sizes(x)) if skipping else None
        if known is None:
            return [_tensor(self._merge([_read(one)[0] for one in x]))]
        befores, after = known
        read = [_read(one, before) for one, before in zip(x, befores, strict=True)]
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
        return [_tensor(out, Changes(total, after, self.writes_background))]

    def record(self, befores: Sequence[Background]) -> list[Background]:
        """Keep the background behind scales without points; return that of the output, in a list."""
        after = compress(self._merge([before.expand()[None] for before in befores])[0])
        self.backgrounds[_background_sizes(befores)] = (list(befores), after)
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
        known = self.backgrounds.get(_sizes(x)) if skipping else None
        if known is None:
            return [_tensor(cells) for cells in self._merge([_read(one)[0] for one in x])[1]]
        levels: list[tuple[F32, Mask]] = []
        for one, layer, level in zip(x, self.laterals, known, strict=True):
            cells, changed = _read(one, level.before)
            lateral, marks = _run(cells, layer, changed, level.before, level.lateral)
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
            out, marks = _run(cells, layer, fine_changed, level.merged, level.after)
            assert marks is not None
            if self.writes_background:
                fill(out, marks, level.after, 0, out.shape[3])
            results.append(_tensor(out, Changes(marks, level.after, self.writes_background)))
        return results

    def record(self, befores: Sequence[Background]) -> list[Background]:
        """Keep the backgrounds behind scales without points; return those of the outputs."""
        maps = [before.expand()[None] for before in befores]
        laterals = [
            compress(_run(cells, layer)[0][0]) for cells, layer in zip(maps, self.laterals, strict=True)
        ]
        merged, outputs = self._merge(maps)
        levels = tuple(
            _Level(before, lateral, compress(sums[0]), compress(out[0]))
            for before, lateral, sums, out in zip(befores, laterals, merged, outputs, strict=True)
        )
        self.backgrounds[_background_sizes(befores)] = levels
        return [level.after for level in levels]

    def _merge(self, maps: Sequence[F32]) -> tuple[list[F32], list[F32]]:
        """Compute all cells; returns the merged laterals and the outputs."""
        merged = [_run(cells, layer)[0] for cells, layer in zip(maps, self.laterals, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            add_upsampled(merged[i - 1], merged[i])
        return merged, [_run(cells, layer)[0] for cells, layer in zip(merged, self.outputs, strict=True)]


@dataclass(frozen=True)
class _Level:
    """Backgrounds of one scale of a pyramid: its input, lateral, sum with the coarser scale, and output."""

    before: Background
    lateral: Background
    merged: Background
    after: Background


#: Modules with packed `layers`.
MASKED = (MaskedSequence, MaskedBranches, MaskedNeck, MaskedPyramid)


class BackgroundModel:
    """Backgrounds of all parts of one network, recorded for each size of map when it is first seen."""

    def __init__(
        self,
        blocks: Sequence[MaskedSequence],
        neck: MaskedNeck | MaskedPyramid,
        heads: Sequence[Sequence[MaskedSequence | MaskedBranches]],
    ) -> None:
        """Connect the blocks of a backbone, the neck behind them, and chains of sequences behind the neck."""
        self.blocks, self.neck, self.heads = tuple(blocks), neck, tuple(tuple(chain) for chain in heads)
        self.skipping = True
        self._seen: list[tuple[int, int]] = []
        neck.model = self
        part: MaskedSequence | MaskedBranches
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
        for merged in self.neck.record(scales):
            for chain in self.heads:
                known = merged
                for one in chain:
                    known = one.known_output(known.index.shape) or one.record(known)


def _run(
    cells: F32,
    layer: ConvLayer,
    changed: Mask | None = None,
    before: Background | None = None,
    after: Background | None = None,
    wanted: Mask | None = None,
) -> tuple[F32, Mask | None]:
    out = np.empty((len(cells), *layer.out_shape(*cells.shape[1:3]), layer.outputs), np.float32)
    marks = masked_conv.convolve(
        cells, layer, out, changed=changed, before=before, after=after, wanted=wanted
    )
    return out, marks


@dataclass
class Changes:
    """Where a map differs from its background.

    Attributes:
        mask: (B, H, W), cells that differ.
        background: background of the map.
        is_written: whether the other cells hold the background in memory, too.
        version: torch's count of modifications at which this held.
    """

    mask: Mask
    background: Background
    is_written: bool
    version: int = 0


def _tensor(cells: F32, changes: Changes | None = None) -> Tensor:
    """Return an array (B, H, W, C) as a tensor (B, C, H, W) that remembers where it differs from its background."""
    x = torch.from_numpy(cells).permute(0, 3, 1, 2)
    if changes is not None:
        changes.version = x._version
        x.changes = changes  # type: ignore[attr-defined]
    return x


def _read(x: Tensor, background: Background | None = None) -> tuple[F32, Mask | None]:
    """Return a map (B, C, H, W) as an array (B, H, W, C), a copy unless channels-last in memory, and its changes.

    Args:
        x: map on the CPU, float32.
        background: background to name the changes from: as remembered, unless the tensor was modified, or compared.

    Raises:
        TypeError: `x` has another type or device.
        RuntimeError: `x` was modified by a part that cannot know that its background is not in memory.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")
    cells: F32 = x.detach().permute(0, 2, 3, 1).contiguous().numpy()
    changes: Changes | None = getattr(x, "changes", None)
    if changes is not None and changes.version == x._version:
        if changes.background is background:
            return cells, changes.mask
        if not changes.is_written:
            fill(cells, changes.mask, changes.background, 0, cells.shape[3])
    elif changes is not None and not changes.is_written:
        raise RuntimeError("a map was modified of which the background is not in memory")
    return cells, None if background is None else find_changed(cells, background)


def _sizes(x: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((one.shape[2], one.shape[3]) for one in x)


def _background_sizes(backgrounds: Sequence[Background]) -> tuple[tuple[int, int], ...]:
    return tuple((one.index.shape[0], one.index.shape[1]) for one in backgrounds)
