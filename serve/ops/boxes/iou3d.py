"""Bird's-eye-view overlap and NMS of upright 3D boxes (x, y, z, dx, dy, dz, heading in radians).

mmcv's Python multiplies by the heights and sorts boxes by score. The reference is mmcv 2.1.0
`csrc/common/cuda/iou3d_cuda_kernel.cuh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.boxes.rotated import overlap_areas, suppress_rotated
from serve.ops.checks import (
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    check_width,
)

__all__ = ["iou3d_boxes_overlap_bev_forward", "iou3d_nms3d_forward", "iou3d_nms3d_normal_forward"]


def iou3d_boxes_overlap_bev_forward(boxes_a: Tensor, boxes_b: Tensor, ans_iou: Tensor) -> None:
    """Write into `ans_iou` (N, M) the overlap areas in square metres of (N, 7) and (M, 7) boxes."""
    check_width("boxes_a", boxes_a, 7)
    check_width("boxes_b", boxes_b, 7)
    check_floating(boxes_a=boxes_a, boxes_b=boxes_b)
    check_same_device(boxes_a=boxes_a, boxes_b=boxes_b)
    check_tensor(("boxes_a", boxes_a), "ans_iou", ans_iou, boxes_a.shape[0], boxes_b.shape[0])
    ans_iou.copy_(overlap_areas(_to_bev(boxes_a), _to_bev(boxes_b)).to(ans_iou.dtype))


def iou3d_nms3d_forward(boxes: Tensor, keep: Tensor, num_out: Tensor, nms_overlap_thresh: float) -> None:
    """Suppress boxes greedily by rotated overlap (dropped above the threshold).

    Args:
        boxes: (N, 7), by descending score.
        keep: (N,) int64, filled in place with the surviving rows.
        num_out: scalar int64, set to their number.
        nms_overlap_thresh: IoU in [0, 1].
    """
    _suppress(boxes, keep, num_out, nms_overlap_thresh, turned=True)


def iou3d_nms3d_normal_forward(
    boxes: Tensor, keep: Tensor, num_out: Tensor, nms_overlap_thresh: float
) -> None:
    """Run `iou3d_nms3d_forward` with all headings set to zero."""
    _suppress(boxes, keep, num_out, nms_overlap_thresh, turned=False)


def _to_bev(boxes: Tensor) -> Tensor:
    return boxes[:, [0, 1, 3, 4, 6]].double()


def _suppress(boxes: Tensor, keep: Tensor, num_out: Tensor, threshold: float, *, turned: bool) -> None:
    check_width("boxes", boxes, 7)
    check_floating(boxes=boxes)
    check_shape("keep", keep, boxes.shape[0])
    check_integer(keep=keep, num_out=num_out)
    if num_out.numel() != 1:
        raise ValueError(f"num_out must hold one number, got shape {tuple(num_out.shape)}")
    for name, tensor in (("boxes", boxes), ("keep", keep), ("num_out", num_out)):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} must have values, got a tensor on {tensor.device}")
    flat = _to_bev(boxes)
    if not turned:
        flat[:, 4] = 0
    rows = suppress_rotated(flat, torch.zeros_like(flat[:, 0]), float(threshold), False)
    keep[: rows.numel()] = rows.to(keep.device)
    num_out.fill_(rows.numel())
