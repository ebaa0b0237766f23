"""Non-maximum suppression of axis-aligned boxes (x1, y1, x2, y2): hard, soft, and with matches.

Sorting is stable, so results do not depend on the device. mmcv's Python separates classes by shifting their boxes. The
reference is mmcv 2.1.0 `csrc/pytorch/cpu/nms.cpp`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_integer,
    check_shape,
    check_tensor,
    check_width,
    uses_numba,
)
from serve.ops.constants import constant
from serve.ops.cpu.jit import jit
from serve.ops.device_kernels import uses_triton

# Kernels only, as `serve.ops.extension` exports them; `serve.runtime.accelerator` uses the parts for devices, too.
__all__ = ["nms", "nms_match", "softnms"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
# Candidates, of as many as there are, among which the kept ones are looked for first.
_CANDIDATES_PER_BOX = 8
SOFT_METHODS = {0: "naive", 1: "linear", 2: "gaussian"}


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Suppress boxes greedily; return the kept rows (int64) by descending score.

    Args:
        boxes: (N, 4) float.
        scores: (N,) float.
        iou_threshold: a box is dropped if its IoU with a kept one is above this.
        offset: 1 if a box includes its last pixel, else 0.
    """
    check_width("boxes", boxes, 4)
    check_floating(boxes=boxes)
    check_tensor(("boxes", boxes), "scores", scores, boxes.shape[0])
    order = torch.sort(scores, dim=0, descending=True, stable=True)[1]
    ordered = boxes[order, :4].float()
    if uses_numba(boxes):
        keep = torch.from_numpy(_nms_cpu(as_numpy(ordered), np.float32(iou_threshold), np.float32(offset)))
    else:
        keep = scan(suppression_bits(ordered, float(offset), iou_threshold))
    return order[keep]


def nms_within_labels(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int, *, across: bool = False
) -> Tensor:
    """Suppress boxes greedily among those of the same label; return the first `limit` kept rows by descending score.

    Boxes are looked at in the order of their scores, until `limit` are kept: of some ten thousand candidates a few
    hundred. Rows and order are those of `nms` label by label, of all boxes, and a stable sort of what it keeps.

    Args:
        boxes: (N, 4) float32 on the CPU.
        scores: (N,) float32.
        labels: (N,) int64, not negative.
        iou_threshold: a box is dropped if its IoU with a kept one is above this.
        limit: most rows to return.
        across: whether boxes of different labels suppress each other, too.
    """
    check_width("boxes", boxes, 4)
    check_tensor(("boxes", boxes), "scores", scores, boxes.shape[0])
    check_shape("labels", labels, boxes.shape[0])
    check_integer(labels=labels)
    count = boxes.shape[0]
    # First those that are likely to suffice; if they do not, all: what is kept of the best depends on them alone.
    for first in (_CANDIDATES_PER_BOX * limit, count):
        rows = torch.arange(count)
        if first < count:
            rows = (scores >= scores.kthvalue(count - first + 1).values).nonzero()[:, 0]
        rows = rows[torch.sort(scores[rows], descending=True, stable=True)[1]]
        keep = _first_kept(
            as_numpy(boxes[rows].float()),
            as_numpy(labels[rows]),
            int(labels.max()) + 1 if count else 0,
            np.float32(iou_threshold),
            limit,
            across,
        )
        if len(keep) == limit or len(rows) == count:
            break
    return rows[torch.from_numpy(keep)]


def suppression_bits(boxes: Tensor, offset: float, threshold: float) -> Tensor:
    """Find which later boxes each of (N, 4) float32 drops if it is kept: IoU above `threshold`; bits of `pack_bits`."""
    if uses_triton(boxes):
        from serve.ops.triton.suppression import overlap_bits

        return overlap_bits(boxes, offset, threshold)  # type: ignore[no-any-return]
    return pack_bits(hits_above(boxes, offset, threshold))


def scan(bits: Tensor) -> Tensor:
    """Select rows greedily (int64), given (N, W) bits "row i, if kept, drops row j > i" on any device."""
    keep = scan_bits(bits.cpu(), len(bits))
    return torch.from_numpy(keep).to(bits.device)


def pack_bits(hits: Tensor) -> Tensor:
    """Pack (..., M) bool to (..., W) uint8 with W a multiple of 8: bit j of byte i is element 8 i + j."""
    width = -(-hits.shape[-1] // 64) * 64
    padded = functional.pad(hits, (0, width - hits.shape[-1])).view(*hits.shape[:-1], width // 8, 8)
    weights = constant(tuple(1 << bit for bit in range(8)), torch.uint8, hits.device)
    return (padded * weights).sum(dim=-1, dtype=torch.uint8)


def scan_bits(bits: Tensor, count: int, limit: int | None = None) -> I64:
    """Select rows greedily, given (N, W) bits of `pack_bits` on the CPU: "row i, if kept, drops row j > i".

    Args:
        bits: rows by descending score.
        count: look at the first `count` rows only.
        limit: stop at so many selected rows.
    """
    words = bits.contiguous().numpy().view(np.uint64)
    return _scan_words(words, count, count if limit is None else limit)


def _check_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on cpu, got {tensor.device}")


def hits_above(boxes: Tensor, offset: float, threshold: float) -> Tensor:
    """(N, N) bool: IoU above `threshold`, by division as mmcv does on the CPU, by multiplication as it does on CUDA."""
    overlap, union = _overlap_and_union(boxes, offset)
    if boxes.device.type == "cpu":
        return overlap / union > threshold
    return overlap > threshold * union


def _iou(boxes: Tensor, offset: float) -> Tensor:
    overlap, union = _overlap_and_union(boxes, offset)
    return overlap / union


def _overlap_and_union(boxes: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    side = (bottom_right - top_left + offset).clamp(min=0)
    overlap = side[..., 0] * side[..., 1]
    extent = boxes[:, 2:] - boxes[:, :2] + offset
    area = extent[:, 0] * extent[:, 1]
    return overlap, area[:, None] + area[None, :] - overlap


@jit
def _nms_cpu(boxes: F32, threshold: np.float32, offset: np.float32) -> I64:  # pragma: no cover - compiled
    n = boxes.shape[0]
    left, top = boxes[:, 0].copy(), boxes[:, 1].copy()
    right, bottom = boxes[:, 2].copy(), boxes[:, 3].copy()
    area = (right - left + offset) * (bottom - top + offset)
    dropped = np.zeros(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.int64)
    zero = np.float32(0)
    kept = 0
    for i in range(n):
        if dropped[i]:
            continue
        keep[kept] = i
        kept += 1
        x1, y1, x2, y2, own = left[i], top[i], right[i], bottom[i], area[i]
        # Without branches, also for boxes that are dropped already: vectors compute eight or sixteen at a time.
        for j in range(i + 1, n):
            w = max(zero, min(x2, right[j]) - max(x1, left[j]) + offset)
            h = max(zero, min(y2, bottom[j]) - max(y1, top[j]) + offset)
            overlap = w * h
            dropped[j] |= overlap / (own + area[j] - overlap) > threshold
    return keep[:kept]


@jit
def _first_kept(
    boxes: F32, labels: I64, kinds: int, threshold: np.float32, limit: int, across: bool
) -> I64:  # pragma: no cover - compiled
    """Return the first `limit` kept of `boxes`, by descending score; the kept ones of a label are a linked list."""
    n = boxes.shape[0]
    keep, before = np.empty(min(n, limit), np.int64), np.empty(min(n, limit), np.int64)
    latest = np.full(max(kinds, 1), -1, np.int64)
    zero = np.float32(0)
    kept = 0
    for j in range(n):
        if kept >= limit:
            break
        label = np.int64(0) if across else labels[j]
        x1, y1, x2, y2 = boxes[j, 0], boxes[j, 1], boxes[j, 2], boxes[j, 3]
        area = (x2 - x1) * (y2 - y1)
        dropped = False
        at = latest[label]
        while at >= 0 and not dropped:
            i = keep[at]
            w = max(zero, min(boxes[i, 2], x2) - max(boxes[i, 0], x1))
            h = max(zero, min(boxes[i, 3], y2) - max(boxes[i, 1], y1))
            overlap = w * h
            own = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
            dropped = overlap / (own + area - overlap) > threshold
            at = before[at]
        if not dropped:
            keep[kept], before[kept] = j, latest[label]
            latest[label] = kept
            kept += 1
    return keep[:kept]


@jit
def _scan_words(words: npt.NDArray[np.uint64], count: int, limit: int) -> I64:  # pragma: no cover - compiled
    dropped = np.zeros(words.shape[1], dtype=np.uint64)
    keep = np.empty(count, dtype=np.int64)
    kept = 0
    for i in range(count):
        if kept >= limit:
            break
        if (dropped[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
            continue
        keep[kept] = i
        kept += 1
        for w in range(i >> 6, words.shape[1]):
            dropped[w] |= words[i, w]
    return keep[:kept]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of overlapping boxes instead of dropping them (Soft-NMS, Bodla et al., ICCV 2017).

    Args:
        boxes: (N, 4) on CPU.
        scores: (N,) on CPU.
        dets: (N, 5) on CPU, filled in place with the boxes in order of choice and their new scores.
        iou_threshold: overlap from which methods 0 and 1 act.
        sigma: width of the Gaussian of method 2.
        min_score: boxes below are dropped.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0 or 1, as in `nms`.

    Returns:
        int64 rows in order of choice.
    """
    check_width("boxes", boxes, 4)
    check_floating(boxes=boxes)
    check_tensor(("boxes", boxes), "scores", scores, boxes.shape[0])
    check_tensor(("boxes", boxes), "dets", dets, boxes.shape[0], 5)
    _check_cpu("boxes", boxes)
    if method not in SOFT_METHODS:
        raise ValueError(f"method must be one of {SOFT_METHODS}, got {method}")
    if not dets.is_contiguous() or dets.dtype != torch.float32:
        raise ValueError("dets must be contiguous float32: it is written in place")
    left = np.concatenate((as_numpy(boxes[:, :4].float()), as_numpy(scores.float())[:, None]), axis=1)
    chosen = _softnms_cpu(
        left,
        dets.detach().numpy(),
        np.float32(iou_threshold),
        np.float32(sigma),
        np.float32(min_score),
        method,
        np.float32(offset),
    )
    return torch.from_numpy(chosen)


@jit
def _softnms_cpu(
    left: F32,
    dets: F32,
    threshold: np.float32,
    sigma: np.float32,
    min_score: np.float32,
    method: int,
    offset: np.float32,
) -> I64:  # pragma: no cover - compiled
    zero, one = np.float32(0), np.float32(1)
    n = left.shape[0]
    rows = np.arange(n)
    i = 0
    while i < n:
        best = i
        for j in range(i + 1, n):
            if left[j, 4] > left[best, 4]:
                best = j
        for c in range(5):
            left[i, c], left[best, c] = left[best, c], left[i, c]
            dets[i, c] = left[i, c]
        rows[i], rows[best] = rows[best], rows[i]
        area = (left[i, 2] - left[i, 0] + offset) * (left[i, 3] - left[i, 1] + offset)
        j = i + 1
        while j < n:
            w = max(zero, min(left[i, 2], left[j, 2]) - max(left[i, 0], left[j, 0]) + offset)
            h = max(zero, min(left[i, 3], left[j, 3]) - max(left[i, 1], left[j, 1]) + offset)
            overlap = w * h
            other = (left[j, 2] - left[j, 0] + offset) * (left[j, 3] - left[j, 1] + offset)
            iou = overlap / (area + other - overlap)
            weight = one
            if method == 2:
                weight = np.exp(-(iou * iou) / sigma)
            elif iou >= threshold:
                weight = zero if method == 0 else one - iou
            left[j, 4] *= weight
            if left[j, 4] < min_score:
                # Dropped: the last box moves here and is processed next.
                n -= 1
                for c in range(5):
                    left[j, c] = left[n, c]
                rows[j] = rows[n]
            else:
                j += 1
        i += 1
    return rows[:n].copy()


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group rows: each kept box, then the boxes it suppresses (IoU >= threshold), by descending score.

    Args:
        dets: (N, 5) on CPU: box and score.
        iou_threshold: IoU in [0, 1].
    """
    check_width("dets", dets, 5)
    check_floating(dets=dets)
    _check_cpu("dets", dets)
    order = torch.sort(dets[:, 4], dim=0, descending=True, stable=True)[1]
    hits = (_iou(dets[order, :4].float(), 0.0) >= iou_threshold).numpy()
    rows: list[int] = order.tolist()
    free = np.ones(len(rows), dtype=bool)
    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        if free[i]:
            taken = np.flatnonzero(hits[i] & free)
            taken = taken[taken > i]
            free[taken] = False
            groups.append([row, *(rows[j] for j in taken)])
    return groups
