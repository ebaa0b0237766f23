"""Backgrounds of one network: of which parts, and for which sizes of map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve.ops.cpu.masked_conv import compress
from serve.runtime.masked import MaskedBranches, MaskedSequence
from serve.runtime.masked_necks import MaskedNeck, MaskedPyramid

__all__ = ["MASKED", "MAX_SIZES", "BackgroundModel"]

# Sizes of maps whose backgrounds are kept; a model has one, or one per scale of test-time augmentation.
MAX_SIZES = 4
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
