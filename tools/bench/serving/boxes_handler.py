"""TorchServe handler of the sleep model whose answers have boxes, so that two versions can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.protocol.batch import body_bytes
from serve.protocol.worker import EncodedFrame, Outcome
from serve.worker.handler import Handler
from tools.bench.serving import sleep_model

__all__ = ["BOXES", "BoxesHandler"]

BOXES = 40
_CLASSES = ["Pedestrian", "Cyclist", "Car"]
_ANSWER = {
    "bboxes_3d": [[1.5 * k, (k % 7) - 3.0, -1.0, 3.9, 1.6, 1.5, 0.1 * k] for k in range(BOXES)],
    "scores_3d": [round(0.95 - k / 60, 4) for k in range(BOXES)],
    "labels_3d": [k % 3 for k in range(BOXES)],
    "names": [_CLASSES[k % 3] for k in range(BOXES)],
    "box_type_3d": "LiDAR",
    "classes": _CLASSES,
}


class BoxesHandler(Handler):
    """Handler that sleeps as long as a batch takes; answers `BOXES` boxes, the size of a frame and of its batch."""

    def describe(self) -> dict[str, Any]:
        """Describe a detector of point clouds."""
        return {"modality": "lidar", "load_dim": 4, "classes": _CLASSES}

    def infer(self, frames: Sequence[EncodedFrame]) -> Sequence[Outcome]:
        """Sleep."""
        return [
            {**_ANSWER, **found}
            for found in sleep_model.answers([body_bytes(frame.body) for frame in frames])
        ]
