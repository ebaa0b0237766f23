"""IoU and NMS of quadrilaterals (x1, y1, …, x4, y4), corners in order, in either direction.

The arithmetic is that of mmcv's kernels (`serve.ops.boxes.corner_hull`). It is right for rectangles; what it gives for
other quadrilaterals is not the IoU of geometry, but it is what models were trained with.
"""

from __future__ import annotations

from torch import Tensor

from serve.ops.boxes.rotated import check_sorted, greedy_nms, ious_of
from serve.ops.checks import check_floating, check_same_device, check_width

__all__ = ["box_iou_quadri", "nms_quadri"]


def box_iou_quadri(
    boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False
) -> None:
    """Write IoU (``mode_flag`` 0) or intersection over first area (1) into `ious`.

    Args:
        boxes1: (N, 8) float.
        boxes2: (M, 8) float; M = N when `aligned`.
        ious: (N * M,), or (N,) when `aligned`; written in place.
        mode_flag: 0 for IoU, 1 for IoF.
        aligned: pair row by row instead of all with all.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device; an unknown mode.
    """
    check_width("boxes1", boxes1, 8)
    check_width("boxes2", boxes2, 8)
    check_floating(boxes1=boxes1, boxes2=boxes2, ious=ious)
    check_same_device(boxes1=boxes1, boxes2=boxes2, ious=ious)
    n, m = boxes1.shape[0], boxes2.shape[0]
    if mode_flag not in (0, 1):
        raise ValueError(f"mode_flag must be 0 (iou) or 1 (iof), got {mode_flag!r}")
    if aligned and n != m:
        raise ValueError(f"aligned boxes must be as many on both sides, got {n} and {m}")
    if ious.numel() != (n if aligned else n * m):
        raise ValueError(f"ious must hold {n if aligned else n * m} numbers, got {tuple(ious.shape)}")
    if ious.numel() == 0:
        return
    ious.copy_(ious_of(boxes1[:, :8], boxes2[:, :8], mode_flag, aligned).reshape(ious.shape))


def nms_quadri(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> Tensor:
    """Greedy NMS of quadrilaterals; one is dropped when its IoU with a kept one reaches `iou_threshold`.

    At the threshold, and with labels, it does as `serve.ops.boxes.rotated.nms_rotated`.

    Args:
        dets: (N, 8), or (N, 9) with the label last when `multi_label`.
        scores: (N,).
        order: (N,) int64, rows by descending score.
        dets_sorted: `dets` in that order.
        iou_threshold: IoU in [0, 1].
        multi_label: `dets` have a label, which is not looked at.

    Returns:
        int64 rows kept, by descending score.

    Raises:
        ValueError: a tensor of wrong shape or device.
    """
    check_sorted(dets, scores, order, dets_sorted, 9 if multi_label else 8)
    return order[greedy_nms(dets_sorted[:, :8], iou_threshold)]
