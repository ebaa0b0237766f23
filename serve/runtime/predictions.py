"""Postprocessing: OpenMMLab's data samples become answers, plain dictionaries with OpenMMLab's names.

Field names are those of `Det3DInferencer.pred2dict` and `DetInferencer.pred2dict`; `serve.compare.labels` defines the
encoding of point and pixel labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serve.compare.labels import encode_labels, encode_segments

__all__ = ["empty_detections", "empty_labels", "postprocess"]

UNITS_3D = {
    "LiDAR": {"length": "m", "angle": "rad", "frame": "x forward, y left, z up", "origin": "bottom centre"},
    "Camera": {
        "length": "m",
        "angle": "rad",
        "frame": "x right, y down, z forward",
        "origin": "bottom centre",
    },
    "Depth": {"length": "m", "angle": "rad", "frame": "x right, y forward, z up", "origin": "bottom centre"},
}
UNITS_2D = {"length": "px", "frame": "x right, y down, from the top left of the original image"}


def postprocess(
    sample: Any, classes: Sequence[str], box_type_3d: str | None, model: dict[str, str]
) -> dict[str, Any]:
    """Convert a prediction to an answer with all detections by descending score.

    Args:
        sample: `Det3DDataSample` or `DetDataSample` with predictions.
        classes: class names by label.
        box_type_3d: ``"LiDAR"``, ``"Camera"`` or ``"Depth"``; None for 2D and for labels.
        model: name and version, copied to the answer.
    """
    if "pred_pts_seg" in sample:
        return _labels(sample.pred_pts_seg.pts_semantic_mask.cpu().numpy(), classes, model)
    if "pred_panoptic_seg" in sample:
        segments = sample.pred_panoptic_seg.sem_seg
        array = segments.cpu().numpy() if isinstance(segments, torch.Tensor) else np.asarray(segments)
        return {
            **encode_segments(array.reshape(array.shape[-2:]), classes),
            "classes": list(classes),
            "units": UNITS_2D,
            "model": model,
        }
    if box_type_3d is not None:
        found = sample.pred_instances_3d
        boxes, scores, labels = found.bboxes_3d.tensor, found.scores_3d, found.labels_3d
    else:
        found = sample.pred_instances
        boxes, scores, labels = found.bboxes, found.scores, found.labels.long()  # CrowdDet's are floats
        boxes = boxes if isinstance(boxes, torch.Tensor) else boxes.tensor
    order = torch.argsort(scores, descending=True, stable=True)
    boxes, scores, labels = (t[order].cpu().numpy() for t in (boxes.float(), scores.float(), labels))
    answer = _assemble(boxes, scores, labels, classes, box_type_3d, model)
    if box_type_3d is None and "masks" in found:
        answer["masks"] = _run_lengths(_reorder(found.masks, order).cpu().numpy())
    return answer


def empty_detections(
    classes: Sequence[str], box_type_3d: str | None, model: dict[str, str], width: int
) -> dict[str, Any]:
    """Return the answer without detections, for boxes of `width` numbers."""
    boxes = np.zeros((0, width), dtype=np.float32)
    none = np.zeros(0, dtype=np.float32)
    return _assemble(boxes, none, none.astype(np.int64), classes, box_type_3d, model)


def empty_labels(classes: Sequence[str], model: dict[str, str]) -> dict[str, Any]:
    """Return the answer of a segmentor to a point cloud without points."""
    return _labels(np.zeros(0, dtype=np.uint8), classes, model)


def _labels(labels: npt.NDArray[Any], classes: Sequence[str], model: dict[str, str]) -> dict[str, Any]:
    return {"pts_semantic_mask": encode_labels(labels), "classes": list(classes), "model": model}


def _assemble(
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    box_type_3d: str | None,
    model: dict[str, str],
) -> dict[str, Any]:
    suffix = "" if box_type_3d is None else "_3d"
    answer: dict[str, Any] = {
        f"bboxes{suffix}": boxes,
        f"scores{suffix}": scores,
        f"labels{suffix}": labels,
        "names": [classes[label] if 0 <= label < len(classes) else str(label) for label in labels.tolist()],
    }
    if box_type_3d is not None:
        answer["box_type_3d"] = box_type_3d
    answer["classes"] = list(classes)
    answer["units"] = UNITS_2D if box_type_3d is None else UNITS_3D[box_type_3d]
    answer["model"] = model
    return answer


def _reorder(masks: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder masks, on the CPU without a copy if they are in order, as most heads return them."""
    in_order = order.device.type == "cpu" and torch.equal(order, torch.arange(len(masks)))
    return masks if in_order else masks[order]


def _run_lengths(masks: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Encode (N, H, W) bool masks as compressed COCO run lengths."""
    from serve.ops.cpu.run_lengths import encode_masks

    size = [int(n) for n in masks.shape[1:]]
    return [{"size": size, "counts": counts} for counts in encode_masks(masks)]
