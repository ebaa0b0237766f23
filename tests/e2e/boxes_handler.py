"""Handler for a real TorchServe without a model: a box at every 64th point, of which version 2.0 changes some.

Version 2.0 lacks the pedestrians, moves the others by 30 cm, and finds a car that is not there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from serve.protocol.worker import EncodedFrame
from serve.worker.handler import Handler

CLASSES = ["Pedestrian", "Car"]
SPEC = {"modality": "lidar", "parts": ["points"], "load_dim": 4, "box_type_3d": "LiDAR", "classes": CLASSES}


class Boxes(Handler):
    def load(self, context: Any) -> None:
        """Read the version from the manifest."""
        self._version = context.manifest["model"]["modelVersion"]

    def describe(self) -> dict[str, Any]:
        """What the gateway needs to know."""
        return SPEC

    def infer(self, frames: Any) -> list[dict[str, Any]]:
        """Answer boxes."""
        return [self._answer(frame) for frame in frames]

    def _answer(self, frame: EncodedFrame) -> dict[str, Any]:
        body = frame.join()
        assert not isinstance(body, dict)
        points = np.frombuffer(bytes(body), np.float32).reshape(-1, 4)[::64, :3].tolist()  # type: ignore[arg-type]
        rows = [[*point, 4.0, 2.0, 1.5, 0.0, k % 2, 0.9] for k, point in enumerate(points)]
        if self._version == "2.0":
            rows = [[row[0] + 0.3, *row[1:]] for row in rows if row[7]]
            rows.append([500.0, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0, 1, 0.8])
        return {
            "bboxes_3d": [row[:7] for row in rows],
            "scores_3d": [row[8] for row in rows],
            "labels_3d": [row[7] for row in rows],
            "box_type_3d": "LiDAR",
            "classes": CLASSES,
        }
