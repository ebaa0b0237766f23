"""An answer as a prediction of Label Studio."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from serve.client import Result
from serve.labelling.label_config import Control
from serve.labelling.masks import brush_rle, polygons

__all__ = ["make_prediction"]


def make_prediction(
    result: Result, controls: Sequence[Control], size: tuple[int, int], model_version: str
) -> dict[str, Any]:
    """Build the prediction of one task: boxes, masks and polygons for the controls that have their labels.

    Args:
        result: answer of a model in 2D.
        controls: of the labelling configuration.
        size: width and height of the image, pixels.
        model_version: name under which Label Studio shows the prediction.

    Returns:
        ``{"model_version", "score", "result"}``; lengths are percent of the image, as Label Studio has them.
    """
    regions = [region for control in controls for region in _regions(result, control, size)]
    score = float(np.mean([region["score"] for region in regions])) if regions else 0.0
    return {"model_version": model_version, "score": score, "result": regions}


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
                "to_name": control.to_name,
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
