"""IoU and NMS of rotated boxes, and what they share with those of quadrilaterals.

A box is (x, y, width, height, angle in radians); with the angle counter-clockwise or clockwise for all of them alike,
areas are the same. The arithmetic is that of mmcv's kernels (`serve.ops.boxes.corner_hull`), on the CPU for every
device, except that Triton finds the overlaps of a suppression on a GPU: a few boxes are sooner copied than computed
there, but thousands of proposals take the processor tenths of a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.corner_hull import half_turns, pair_ious, suppress
from serve.ops.boxes.nms import scan
from serve.ops.checks import (
    as_compute_dtype,
    as_numpy,
    check_floating,
    check_indices,
    check_same_device,
    check_shape,
    check_width,
)
from serve.ops.device_kernels import uses_triton

__all__ = ["box_iou_rotated", "nms_rotated"]


def box_iou_rotated(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False
) -> None:
    """Write IoU (``mode_flag`` 0) or intersection over first area (1) into `ious`.

    Args:
        bboxes1: (N, 5).
        bboxes2: (M, 5); M = N when `aligned`.
        ious: (N * M,), or (N,) when `aligned`; written in place.
        mode_flag: 0 for IoU, 1 for IoF.
        aligned: pair row by row instead of all with all.
    """
    check_width("bboxes1", bboxes1, 5)
    check_width("bboxes2", bboxes2, 5)
    check_same_device(bboxes1=bboxes1, bboxes2=bboxes2, ious=ious)
    check_floating(bboxes1=bboxes1, bboxes2=bboxes2, ious=ious)
    n, m = bboxes1.shape[0], bboxes2.shape[0]
    if mode_flag not in (0, 1):
        raise ValueError(f"mode_flag must be 0 (iou) or 1 (iof), got {mode_flag!r}")
    if aligned and n != m:
        raise ValueError(f"bboxes1 and bboxes2 must be as many when aligned, got {n} and {m}")
    if ious.numel() != (n if aligned else n * m):
        raise ValueError(f"ious must hold {n if aligned else n * m} numbers, got {tuple(ious.shape)}")
    if n == 0 or m == 0:
        return
    ious.copy_(ious_of(bboxes1[:, :5], bboxes2[:, :5], mode_flag, aligned).reshape(ious.shape))


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> Tensor:
    """Greedy NMS of rotated boxes; a box is dropped when its IoU with a kept one reaches `iou_threshold`.

    On the CPU an IoU at the threshold drops it too, on other devices only one above: mmcv's kernels for the CPU and for
    CUDA differ so. Neither of them compares labels.

    Args:
        dets: (N, 5), or (N, 6) with the label last when `multi_label`.
        scores: (N,).
        order: (N,) int64, rows by descending score.
        dets_sorted: `dets` in that order.
        labels: unused; mmcv also appends them to `dets`.
        iou_threshold: IoU in [0, 1].
        multi_label: `dets` have a label, which is not looked at.

    Returns:
        int64 rows kept, by descending score.
    """
    check_sorted(dets, scores, order, dets_sorted, 6 if multi_label else 5)
    return order[greedy_nms(dets_sorted[:, :5], iou_threshold)]


def check_sorted(dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, width: int) -> None:
    """Raise unless the arguments of an NMS of sorted boxes are consistent."""
    check_width("dets", dets, width)
    check_shape("scores", scores, dets.shape[0])
    check_shape("order", order, dets.shape[0])
    check_shape("dets_sorted", dets_sorted, *dets.shape)
    check_floating(dets=dets, scores=scores, dets_sorted=dets_sorted)
    check_same_device(dets=dets, scores=scores, order=order, dets_sorted=dets_sorted)
    check_indices("order", order, dets.shape[0])


def ious_of(first: Tensor, second: Tensor, mode: int, aligned: bool) -> Tensor:
    """Compute IoU or IoF, (N, M) or aligned (N, 1), of boxes (N, 5) or quadrilaterals (N, 8), on the CPU."""
    a, b = _on_cpu(first), _on_cpu(second)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty((len(a), 1 if aligned else len(b)), dtype=dtype)
    pair_ious(
        as_numpy(a), _halves(a), as_numpy(b), _halves(b),
        mode, aligned, first.shape[1] == 5, first.device.type != "cpu", out.numpy(),
    )  # fmt: skip
    return out


def greedy_nms(boxes: Tensor, threshold: float) -> Tensor:
    """Return the rows of boxes (N, 5) or quadrilaterals (N, 8), best first, that greedy NMS keeps."""
    if threshold >= 0 and boxes.shape[1] == 5 and uses_triton(boxes):
        return scan(rotated_bits(boxes, threshold, bev=False))
    sorted_boxes, on_cpu = _on_cpu(boxes), boxes.device.type == "cpu"
    keep = suppress(
        as_numpy(sorted_boxes), _halves(sorted_boxes),
        float(np.float32(threshold)), on_cpu, boxes.shape[1] == 5, not on_cpu,
    )  # fmt: skip
    return torch.from_numpy(keep).to(boxes.device)


def rotated_bits(boxes: Tensor, threshold: float, *, bev: bool) -> Tensor:
    """Find by Triton which later boxes (N, 5) each drops if it is kept, as the bits of `serve.ops.boxes.nms.scan`.

    `bev` chooses the rule of mmcv's kernels for upright 3D boxes (`serve.ops.boxes.bev`), not that for rotated ones.
    """
    from serve.ops.triton.rotated import rotated_overlap_bits

    boxes = boxes.detach().float()
    angle = boxes[:, 4:].double()
    frames = torch.cat((boxes[:, :2], boxes[:, 2:4] * 0.5, angle.cos().float(), angle.sin().float()), dim=1)
    return rotated_overlap_bits(frames, threshold, bev)  # type: ignore[no-any-return]


def _on_cpu(boxes: Tensor) -> Tensor:
    """Copy to the CPU as float32, or float64 if they are."""
    if boxes.device.type == "meta":
        raise ValueError(f"boxes must be on a device that holds numbers, got {boxes.device}")
    return as_compute_dtype(boxes).cpu()


def _halves(boxes: Tensor) -> npt.NDArray[np.floating]:
    """Compute half the cosine and sine of each angle; zeros for quadrilaterals."""
    half = torch.zeros((len(boxes), 2), dtype=boxes.dtype).numpy()
    if boxes.shape[1] == 5:
        half_turns(as_numpy(boxes), half)
    return half
