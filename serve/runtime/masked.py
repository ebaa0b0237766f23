"""Modules that skip background: convolutions that compute the cells which differ from the answer to no points.

Each module knows the backgrounds of its layers for some sizes of map (`record`), and passes on where its output differs
from the last of them as an attribute `changes` of the tensor, so that the next module need not compare. A module of
which only such modules read the output does not even write the background (`writes_background`). With skipping
turned off, or without a background, all cells are computed, by the same loops and to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from serve.ops.cpu.masked_conv import Background, ConvLayer, compress, fill, inputs_of
from serve.runtime.masked_maps import F32, Changes, read_map, run_layer, to_tensor

if TYPE_CHECKING:
    from serve.runtime.background_model import BackgroundModel

__all__ = ["MaskedBranches", "MaskedSequence"]

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
            cells, _ = read_map(x)
            for layer in self.layers:
                cells = run_layer(cells, layer)[0]
            return to_tensor(cells)
        cells, changed = read_map(x, known[0])
        for layer, before, after in zip(self.layers, known, known[1:], strict=False):
            cells, changed = run_layer(cells, layer, changed, before, after)
        assert changed is not None
        if self.writes_background:
            fill(cells, changed, known[-1], 0, cells.shape[3])
        return to_tensor(cells, Changes(changed, known[-1], self.writes_background))

    def record(self, before: Background) -> Background:
        """Keep the backgrounds behind a map without points; return that of the output."""
        found = [before]
        cells = before.expand()[None]
        for layer in self.layers:
            cells = run_layer(cells, layer)[0]
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
        cells, changed = read_map(x, known.before if known else None)
        first, *seconds = self.layers
        before, between = (known.before, known.between) if known else (None, None)
        cells, changed = run_layer(cells, first, changed, before, between)
        maps: dict[str, Tensor] = {}
        for i, (name, layer) in enumerate(zip(self.names, seconds, strict=True)):
            out, marks = run_layer(cells, layer, changed, between, known.afters[i] if known else None)
            if known and marks is not None:
                fill(out, marks, known.afters[i], 0, out.shape[3])
            maps[name] = to_tensor(out)
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
        cells, changed = read_map(x, known.before if known else None)
        first, *seconds = self.layers
        before, between = (known.before, known.between) if known else (None, None)
        size = first.out_shape(*cells.shape[1:3])
        wanted = np.zeros((len(cells), *seconds[0].out_shape(*size)), np.bool_)
        where = tuple(places.T)
        wanted[where] = True
        cells, changed = run_layer(
            cells, first, changed, before, between, inputs_of(seconds[0], wanted, *size)
        )
        found: dict[str, F32] = {}
        for i, (name, layer) in enumerate(zip(self.names, seconds, strict=True)):
            out, marks = run_layer(cells, layer, changed, between, known.afters[i] if known else None, wanted)
            found[name] = out[where]
            if known and marks is not None:
                same = ~marks[where]
                after = known.afters[i]
                found[name][same] = after.rows[after.index[where[1:]][same]]
        return found

    def record(self, before: Background) -> Background:
        """Keep the backgrounds behind a map without points; return that of the last branch."""
        first, *seconds = self.layers
        cells = run_layer(before.expand()[None], first)[0]
        afters = tuple(compress(run_layer(cells, layer)[0][0]) for layer in seconds)
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
