"""Bird's-eye-view overlap and NMS of upright 3D boxes (x, y, z, dx, dy, dz, heading in radians).

The heights do not enter: mmcv's Python multiplies them in. The arithmetic is that of mmcv's CUDA kernel, in float32
(`serve.ops.boxes.bev`), on the CPU for every device, except that Triton finds the overlaps of a suppression on a GPU.
Boxes come sorted by score.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.boxes.bev import bev_corners, bev_overlaps, suppress_bev, suppress_unrotated
from serve.ops.boxes.nms import scan
from serve.ops.boxes.rotated import rotated_bits
from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    check_width,
)
from serve.ops.device_kernels import uses_triton

__all__ = ["iou3d_boxes_overlap_bev_forward", "iou3d_nms3d_forward", "iou3d_nms3d_normal_forward"]


def iou3d_boxes_overlap_bev_forward(boxes_a: Tensor, boxes_b: Tensor, ans_iou: Tensor) -> None:
    """Write into `ans_iou` (N, M) the overlap areas in square metres of (N, 7) and (M, 7) boxes."""
    check_width("boxes_a", boxes_a, 7)
    check_width("boxes_b", boxes_b, 7)
    check_floating(boxes_a=boxes_a, boxes_b=boxes_b)
    check_same_device(boxes_a=boxes_a, boxes_b=boxes_b)
    check_tensor(("boxes_a", boxes_a), "ans_iou", ans_iou, boxes_a.shape[0], boxes_b.shape[0])
    areas = torch.empty(ans_iou.shape, dtype=torch.float32)
    bev_overlaps(*_in_bev(_on_cpu(boxes_a)), *_in_bev(_on_cpu(boxes_b)), areas.numpy())
    ans_iou.copy_(areas)


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


def _on_cpu(boxes: Tensor) -> npt.NDArray[np.float32]:
    """Copy boxes of any device and precision to (N, 7) float32."""
    if boxes.device.type == "meta":
        raise ValueError(f"boxes must be on a device that holds numbers, got {boxes.device}")
    return as_numpy(boxes[:, :7].detach().to("cpu", torch.float32))


def _in_bev(boxes: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compute the corners (N, 4, 2) and frames (N, 7) of the boxes."""
    corners, frames = np.empty((len(boxes), 4, 2), np.float32), np.empty((len(boxes), 7), np.float32)
    bev_corners(boxes, corners, frames)
    return corners, frames


def _suppress(boxes: Tensor, keep: Tensor, num_out: Tensor, threshold: float, *, turned: bool) -> None:
    check_width("boxes", boxes, 7)
    check_floating(boxes=boxes)
    check_shape("keep", keep, boxes.shape[0])
    check_integer(keep=keep, num_out=num_out)
    if num_out.numel() != 1:
        raise ValueError(f"num_out must hold one number, got shape {tuple(num_out.shape)}")
    for name, tensor in (("boxes", boxes), ("keep", keep), ("num_out", num_out)):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} must be on a device that holds numbers, got {tensor.device}")
    if turned and threshold >= 0 and uses_triton(boxes):
        rows = scan(rotated_bits(boxes[:, [0, 1, 3, 4, 6]], threshold, bev=True))
        keep[: rows.numel()] = rows.to(keep.device)
        num_out.fill_(rows.numel())
        return
    sorted_boxes, limit = _on_cpu(boxes), np.float32(threshold)
    if turned:
        found = suppress_bev(sorted_boxes, *_in_bev(sorted_boxes), limit)
    else:
        found = suppress_unrotated(sorted_boxes, limit)
    rows = torch.from_numpy(found)
    keep[: rows.numel()] = rows.to(keep.device)
    num_out.fill_(rows.numel())
