"""The best scores of a dense head, without a sigmoid of every logit and without a sort of every score.

A sigmoid is monotonous but for its rounding, so the best scores are among the best logits and those next to them. They
are found in one pass, which keeps a cut that rises as better logits are met: nearly all logits are only compared with
it, which vectors do.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.cpu.jit import jit

__all__ = ["select_best"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

# Logits that are compared with the cut at once.
_STRIDE = 64
# Relative error of a sigmoid that is allowed for; that of torch is a few roundings of 6e-8.
_MARGIN = 2e-6
# Sigmoids at a time, whole vectors: torch gives fewer than 32,768 numbers to one thread.
_PIECE = 1 << 14


def select_best(logits: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest sigmoids above `threshold`; among equal ones those that come first.

    Args:
        logits: (N,) float32 on the CPU.
        threshold: lower bound of the scores, exclusive.
        count: most scores to return.

    Returns:
        Scores in descending order and their indices (int64): those of a stable sort of all scores.
    """
    values = np.ascontiguousarray(logits.detach().numpy())
    if count == 0 or len(values) == 0:
        return logits.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    found = torch.from_numpy(_above_cut(values, _lowest_logit(threshold), count))
    scores = _sigmoid(logits[found])
    kept = scores > threshold
    if not bool(kept.all()):
        scores, found = scores[kept], found[kept]
    scores, order = scores.sort(descending=True, stable=True)
    return scores[:count], found[order[:count]]


def _sigmoid(logits: Tensor) -> Tensor:
    """Compute sigmoids in full vectors: torch rounds what does not fill one, of each thread, by another function."""
    padded = functional.pad(logits, (0, -len(logits) % _STRIDE))
    return torch.cat([piece.sigmoid() for piece in torch.split(padded, _PIECE)])[: len(logits)]


def _lowest_logit(threshold: float) -> np.float32:
    """Return a logit below all those whose sigmoid may be above `threshold`."""
    lowered = threshold * (1 - _MARGIN)
    if lowered <= 0:
        return np.float32(-np.inf)
    return np.float32(np.inf) if lowered >= 1 else np.float32(math.log(lowered / (1 - lowered)) - 1e-5)


@jit
def _above_cut(values: F32, lowest: np.float32, count: int) -> I64:  # pragma: no cover - compiled
    """Return the indices, ascending, of the `count` largest values from `lowest` on, and of those close to them."""
    size = values.shape[0]
    room = min(size, 4 * count + _STRIDE)
    found, kept = np.empty(room, np.int64), np.empty(room, np.float32)
    number = 0
    cut = lowest
    compacted = 0
    for first in range(0, size, _STRIDE):
        last = min(first + _STRIDE, size)
        above = 0
        for i in range(first, last):
            above += values[i] >= cut
        if above == 0:
            continue
        if number + above > room:
            room = min(size, max(2 * room, number + above))
            more, larger = np.empty(room, np.int64), np.empty(room, np.float32)
            more[:number], larger[:number] = found[:number], kept[:number]
            found, kept = more, larger
        for i in range(first, last):
            if values[i] >= cut:
                found[number], kept[number] = i, values[i]
                number += 1
        if number >= max(2 * count, 2 * compacted):
            cut = max(cut, _nearly(np.partition(kept[:number], number - count)[number - count]))
            number = _drop_below(found, kept, number, cut)
            compacted = number
    if number > count:
        cut = max(cut, _nearly(np.partition(kept[:number], number - count)[number - count]))
        number = _drop_below(found, kept, number, cut)
    return found[:number].copy()


@jit
def _nearly(logit: np.float32) -> np.float32:  # pragma: no cover - compiled
    """Return a logit below all those whose sigmoid may round to that of `logit`, or above."""
    score = 1 / (1 + np.exp(-np.float64(logit))) * (1 - _MARGIN)
    if score <= 0:
        return np.float32(-np.inf)
    return np.float32(np.log(score / (1 - score)) - 1e-5)


@jit
def _drop_below(found: I64, kept: F32, number: int, cut: np.float32) -> int:  # pragma: no cover - compiled
    left = 0
    for i in range(number):
        if kept[i] >= cut:
            found[left], kept[left] = found[i], kept[i]
            left += 1
    return left
