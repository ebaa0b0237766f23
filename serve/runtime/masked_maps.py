"""Maps that remember where they differ from their background.

`run_layer` computes one layer of such a map; `read_map` and `to_tensor` are the way from a tensor and back to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve.ops.cpu import masked_conv
from serve.ops.cpu.masked_conv import Background, ConvLayer, Mask, fill, find_changed

__all__ = ["F32", "Changes", "background_sizes", "map_sizes", "read_map", "run_layer", "to_tensor"]

F32 = np.ndarray[Any, np.dtype[np.float32]]


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


def run_layer(
    cells: F32,
    layer: ConvLayer,
    changed: Mask | None = None,
    before: Background | None = None,
    after: Background | None = None,
    wanted: Mask | None = None,
) -> tuple[F32, Mask | None]:
    """Compute one layer of a map (B, H, W, C).

    Args:
        cells: the map.
        layer: packed layer.
        changed: cells that differ from `before`; None computes all.
        before: background of the map.
        after: background of the output.
        wanted: (B, H', W'), cells of the output that are needed; None for all.

    Returns:
        The output, and where it differs from `after`; None in place of that without `changed`.
    """
    out = np.empty((len(cells), *layer.out_shape(*cells.shape[1:3]), layer.outputs), np.float32)
    marks = masked_conv.convolve(
        cells, layer, out, changed=changed, before=before, after=after, wanted=wanted
    )
    return out, marks


def to_tensor(cells: F32, changes: Changes | None = None) -> Tensor:
    """Return an array (B, H, W, C) as a tensor (B, C, H, W) that remembers where it differs from its background."""
    x = torch.from_numpy(cells).permute(0, 3, 1, 2)
    if changes is not None:
        changes.version = x._version
        x.changes = changes  # type: ignore[attr-defined]
    return x


def read_map(x: Tensor, background: Background | None = None) -> tuple[F32, Mask | None]:
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


def map_sizes(x: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return the height and width of each map (B, C, H, W)."""
    return tuple((one.shape[2], one.shape[3]) for one in x)


def background_sizes(backgrounds: Sequence[Background]) -> tuple[tuple[int, int], ...]:
    """Return the height and width of the map of each background."""
    return tuple((one.index.shape[0], one.index.shape[1]) for one in backgrounds)
