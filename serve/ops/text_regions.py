"""Growth of text kernels to text instances: pixel aggregation and progressive scale expansion.

Wang et al., PAN (ICCV 2019) and PSENet (CVPR 2019): breadth-first flood fill from labelled kernels, on CPU as in the
references, mmcv 2.1.0 `csrc/pytorch/cpu/pixel_group.cpp` and `csrc/pytorch/contour_expand.cpp`. For text detection
only: no detector of mmdet or mmdet3d calls them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_rank
from serve.ops.cpu.jit import jit

__all__ = ["contour_expand", "pixel_group"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


def pixel_group(
    score: Tensor,
    mask: Tensor,
    embedding: Tensor,
    kernel_label: Tensor,
    kernel_contour: Tensor,
    kernel_region_label: int,
    distance_threshold: float,
) -> list[list[float]]:
    """Flood text pixels from kernel contours while their embedding stays near the kernel's mean.

    Args:
        score: (H, W) text scores, on CPU.
        mask: (H, W) bool text pixels.
        embedding: (H, W, D).
        kernel_label: (H, W) int labels, 0 for none.
        kernel_contour: (H, W) non-zero on contours.
        kernel_region_label: number of labels, 0 included.
        distance_threshold: Euclidean distance of embeddings below which a pixel joins.

    Returns:
        For each label: mean score, number of pixels, then x and y of each, row by row. Label 0 has none.

    Raises:
        ValueError: a shape does not fit, or a tensor is not on CPU.
        IndexError: a label is out of range.
    """
    check_rank("score", score, 2)
    check_rank("embedding", embedding, 3)
    for name, tensor in (
        ("score", score),
        ("mask", mask),
        ("embedding", embedding[..., 0] if embedding.shape[2] else score),
        ("kernel_label", kernel_label),
        ("kernel_contour", kernel_contour),
    ):
        if tensor.shape != score.shape or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {tuple(score.shape)} on cpu, got {tuple(tensor.shape)} on {tensor.device}"
            )
    count = int(kernel_region_label)
    if kernel_label.numel() and not 0 <= int(kernel_label.min()) <= int(kernel_label.max()) < max(count, 1):
        raise IndexError(f"kernel_label must lie in 0..{count - 1}")
    labels = as_numpy(kernel_label.to(torch.int32)).copy()
    _aggregate(
        as_numpy(mask.to(torch.uint8)),
        as_numpy(embedding.float()),
        as_numpy((kernel_contour != 0).to(torch.uint8)),
        labels,
        count,
        np.float32(distance_threshold) * np.float32(distance_threshold),
    )
    scores = as_numpy(score.float())
    groups: list[list[float]] = [[0.0, 0.0] for _ in range(count)]
    for label in range(1, count):
        y, x = np.nonzero(labels == label)
        if len(y):
            # Added one by one in float32, as in the reference.
            mean = float(np.add.accumulate(scores[y, x])[-1] / np.float32(len(y)))
            groups[label] = [mean, float(len(y)), *np.stack((x, y), axis=1).ravel().astype(float).tolist()]
    return groups


def contour_expand(
    kernel_mask: Tensor, internal_kernel_label: Tensor, min_kernel_area: int, kernel_num: int
) -> list[list[int]]:
    """Flood labels from the smallest kernels through ever larger ones.

    Args:
        kernel_mask: (K, H, W) on CPU, non-zero inside; the largest kernel first.
        internal_kernel_label: (H, W) int labels of the smallest kernel, 0 for none.
        min_kernel_area: labels of fewer pixels are dropped.
        kernel_num: number of labels without 0.

    Returns:
        (H, W) labels.

    Raises:
        ValueError: a shape does not fit, or a tensor is not on CPU.
        IndexError: a label is negative.
    """
    check_rank("kernel_mask", kernel_mask, 3)
    if kernel_mask.shape[1:] != internal_kernel_label.shape:
        raise ValueError(
            f"internal_kernel_label must be {tuple(kernel_mask.shape[1:])}, "
            f"got {tuple(internal_kernel_label.shape)}"
        )
    if kernel_mask.device.type != "cpu" or internal_kernel_label.device.type != "cpu":
        raise ValueError("kernel_mask and internal_kernel_label must be on cpu")
    labels = as_numpy(internal_kernel_label.to(torch.int32)).copy()
    if labels.size:
        if int(labels.min()) < 0:
            raise IndexError("internal_kernel_label must be at least 0")
        area = np.bincount(labels.ravel())
        labels[area[labels] < min_kernel_area] = 0
        _expand(as_numpy((kernel_mask != 0).to(torch.uint8)), labels)
    rows: list[list[int]] = labels.tolist()
    return rows


@jit
def _aggregate(
    mask: U8, embedding: F32, contour: U8, labels: I32, count: int, limit: np.float32
) -> None:  # pragma: no cover - compiled
    height, width, size = embedding.shape
    mean = np.zeros((max(count, 1), size), dtype=np.float32)
    members = np.zeros(max(count, 1), dtype=np.float32)
    queue = np.empty(height * width, dtype=np.int64)
    filled = 0
    for y in range(height):
        for x in range(width):
            label = labels[y, x]
            if label > 0:
                mean[label] += embedding[y, x]
                members[label] += np.float32(1)
                if contour[y, x]:
                    queue[filled] = y * width + x
                    filled += 1
    for label in range(1, count):
        if members[label] > 0:
            mean[label] /= members[label]
    taken = 0
    while taken < filled:
        y, x = queue[taken] // width, queue[taken] % width
        taken += 1
        label = labels[y, x]
        for side in range(4):
            v = y + (-1 if side == 2 else (1 if side == 3 else 0))
            u = x + (-1 if side == 0 else (1 if side == 1 else 0))
            if v < 0 or v >= height or u < 0 or u >= width or not mask[v, u] or labels[v, u] > 0:
                continue
            distance = np.float32(0)
            for d in range(size):
                step = np.float64(mean[label, d] - embedding[v, u, d])
                distance = np.float32(distance + step * step)
            if distance < limit:
                labels[v, u] = label
                queue[filled] = v * width + u
                filled += 1


@jit
def _expand(masks: U8, labels: I32) -> None:  # pragma: no cover - compiled
    height, width = labels.shape
    queue = np.empty(height * width, dtype=np.int64)
    edge = np.empty(height * width, dtype=np.int64)
    filled = 0
    for place in range(height * width):
        if labels[place // width, place % width] > 0:
            queue[filled] = place
            filled += 1
    for kernel in range(masks.shape[0] - 2, -1, -1):
        taken, kept = 0, 0
        while taken < filled:
            y, x = queue[taken] // width, queue[taken] % width
            taken += 1
            last = True
            for side in range(4):
                v = y + (-1 if side == 0 else (1 if side == 1 else 0))
                u = x + (-1 if side == 2 else (1 if side == 3 else 0))
                if v < 0 or v >= height or u < 0 or u >= width:
                    continue
                if not masks[kernel, v, u] or labels[v, u] > 0:
                    continue
                labels[v, u] = labels[y, x]
                queue[filled] = v * width + u
                filled += 1
                last = False
            if last:
                edge[kept] = y * width + x
                kept += 1
        queue, edge = edge, queue
        filled = kept
