"""Answers of a server as upstream's data samples, in the form that upstream's metrics read predictions in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.errors import BackendBroken

__all__ = ["with_answer"]


def with_answer(
    sample: Any, answer: Mapping[str, Any], classes: int, *, with_masks: bool, with_pixels: bool = False
) -> Any:
    """Copy a data sample with an answer as its predictions.

    Args:
        sample: ``DetDataSample`` or ``Det3DDataSample`` with annotations; not changed.
        answer: an answer with boxes (docs/answers.md). 3D boxes are in the frame of ``box_type_3d``, metres and
            radians, origin at the bottom centre; 2D boxes are x1, y1, x2, y2 in pixels of the original image; masks
            are COCO RLE.
        classes: number of classes, above every label.
        with_masks: give the predictions masks, none if the answer has none.
        with_pixels: give them as a (N, height, width) tensor of bool instead of run lengths.

    Raises:
        BackendBroken: the answer is malformed.
    """
    copy = sample.clone()
    try:
        labels = answer["labels_3d" if "bboxes_3d" in answer else "labels"]
        if not all(0 <= label < classes for label in labels):
            raise ValueError(f"a label is not below {classes}")
        if "bboxes_3d" in answer:
            copy.pred_instances_3d, copy.pred_instances = _instances_3d(answer)
        else:
            copy.pred_instances = _instances(answer, with_masks=with_masks)
            if with_pixels:
                copy.pred_instances.masks = _pixels(copy.pred_instances.masks, sample)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BackendBroken(f"the answer holds no detections that can be evaluated: {error!r}") from error
    return copy


def _instances(answer: Mapping[str, Any], *, with_masks: bool) -> Any:
    import torch
    from mmengine.structures import InstanceData

    found = InstanceData(
        bboxes=torch.tensor(answer["bboxes"], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(answer["scores"], dtype=torch.float32),
        labels=torch.tensor(answer["labels"], dtype=torch.int64),
    )
    if with_masks:
        found.masks = [dict(mask) for mask in answer.get("masks", ())]
    return found


def _pixels(masks: list[dict[str, Any]], sample: Any) -> Any:
    """Decode run lengths; (N, height, width) bool."""
    import torch
    from pycocotools import mask as coco

    size = tuple(sample.ori_shape[:2])
    if any(tuple(mask["size"]) != size for mask in masks):
        raise ValueError(f"a mask is not of the image's size {size}")
    pixels = [torch.from_numpy(coco.decode(mask).astype(bool)) for mask in masks]
    return torch.stack(pixels) if pixels else torch.zeros((0, *size), dtype=torch.bool)


def _instances_3d(answer: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    from mmdet3d.structures import get_box_type
    from mmengine.structures import InstanceData

    box_class, _ = get_box_type(answer["box_type_3d"])
    boxes = torch.tensor(answer["bboxes_3d"], dtype=torch.float32)
    width = boxes.shape[1] if boxes.ndim == 2 else 7
    found = InstanceData(
        bboxes_3d=box_class(boxes.reshape(-1, width), box_dim=width),
        scores_3d=torch.tensor(answer["scores_3d"], dtype=torch.float32),
        labels_3d=torch.tensor(answer["labels_3d"], dtype=torch.int64),
    )
    return found, InstanceData()
