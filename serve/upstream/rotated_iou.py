"""Rotated IoU of KITTI's metric by the kernels of this project, in place of mmdet3d's for numba.cuda.

mmdet3d compiles `rotate_iou_gpu_eval` for CUDA when its module is imported, so that the metric exists on machines with
a GPU and numba's CUDA target only (mmdetection3d#2817, #513, #1042).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["rotate_iou_gpu_eval"]

Boxes = npt.NDArray[np.floating[Any]]


def rotate_iou_gpu_eval(
    boxes: Boxes, query_boxes: Boxes, criterion: int = -1, device_id: int = 0
) -> npt.NDArray[np.float32]:
    """Overlap of every box with every query box, in the plane.

    Args:
        boxes: (N, 5) centre x, y, size x, y, and angle in radians, clockwise (the camera frame's).
        query_boxes: (K, 5) in the same form.
        criterion: -1 for the IoU, 0 for the intersection over the query box's area, 1 for the intersection over the
            box's area, any other number for the intersection's area: the order of upstream's kernel.
        device_id: not used; upstream's number of a GPU.

    Returns:
        (N, K) float32.
    """
    from serve.ops.boxes.rotated import box_iou_rotated

    first, second = _counter_clockwise(boxes), _counter_clockwise(query_boxes)
    overlaps = torch.zeros((len(first), len(second)), dtype=torch.float32)
    if overlaps.numel() == 0:
        return overlaps.numpy()
    box_iou_rotated(first, second, overlaps.view(-1), mode_flag=0 if criterion == -1 else 1)
    if criterion not in (-1, 1):  # from the intersection over the box's area
        overlaps *= (first[:, 2] * first[:, 3])[:, None]
    if criterion == 0:
        overlaps /= second[:, 2] * second[:, 3]
    return overlaps.numpy()


def _counter_clockwise(boxes: Boxes) -> torch.Tensor:
    turned = torch.tensor(np.asarray(boxes), dtype=torch.float32)
    turned[:, 4] *= -1
    return turned
