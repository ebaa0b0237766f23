"""An answer as a prediction of Label Studio."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from serve.client import Result
from serve.labelling.label_config import Control
from serve.labelling.masks import brush_rle, polygons

__all__ = ["join_predictions", "make_regions"]


def join_predictions(regions: Sequence[dict[str, Any]], model_version: str) -> dict[str, Any]:
    """Build the prediction of one task of its regions.

    Args:
        regions: of all its images.
        model_version: name under which Label Studio shows the prediction.

    Returns:
        ``{"model_version", "score", "result"}``; the score is the mean of the regions'.
    """
    score = float(np.mean([region["score"] for region in regions])) if regions else 0.0
    return {"model_version": model_version, "score": score, "result": list(regions)}


def make_regions(
    result: Result, controls: Sequence[Control], size: tuple[int, int], item_index: int | None = None
) -> list[dict[str, Any]]:
    """Build the regions of one image: boxes, masks and polygons for the controls that have their labels.

    Args:
        result: answer of a model in 2D.
        controls: of the labelling configuration, for this image.
        size: width and height of the image, pixels.
        item_index: number of the image in its list; None for an image that is in none.

    Returns:
        Regions; lengths are percent of the image, as Label Studio has them.
    """
    found = [region for control in controls for region in _regions(result, control, size)]
    return found if item_index is None else [{**region, "item_index": item_index} for region in found]


def _regions(result: Result, control: Control, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    width, height = size
    masks = result.masks if control.kind != "rectanglelabels" and "masks" in result else None
    for i, (name, score) in enumerate(zip(result.names, result.scores.tolist(), strict=True)):
        label = control.labels.get(name)
        if label is None:
            continue
        if control.kind == "rectanglelabels":
            left, top, right, bottom = _clip(result.boxes[i].tolist(), size)
            value: dict[str, Any] = {
                "x": 100 * left / width,
                "y": 100 * top / height,
                "width": 100 * (right - left) / width,
                "height": 100 * (bottom - top) / height,
                "rotation": 0,
            }
            shapes = [value] if right > left and bottom > top else []
        elif masks is None or not masks[i].any():
            shapes = []
        elif control.kind == "brushlabels":
            shapes = [{"format": "rle", "rle": brush_rle(masks[i])}]
        else:
            scale = np.array([100 / width, 100 / height])
            shapes = [
                {"points": ((outline + 0.5) * scale).tolist(), "closed": True}
                for outline in polygons(masks[i])
            ]
        for shape in shapes:
            yield {
                "id": uuid.uuid4().hex[:10],
                "from_name": control.from_name,
                "to_name": control.image.name,
                "type": control.kind,
                "origin": "prediction",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": score,
                "value": {**shape, control.kind: [label]},
            }


def _clip(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box (x1, y1, x2, y2) to the image."""
    width, height = size
    left, right = (min(max(x, 0.0), width) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0.0), height) for y in (box[1], box[3]))
    return left, top, right, bottom
