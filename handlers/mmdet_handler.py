"""TorchServe handler for models of MMDetection. All logic is in `handlers.detection`."""

from __future__ import annotations

from handlers.detection import DetectionHandler


class MMDetHandler(DetectionHandler):
    """Images in; 2D boxes, masks or panoptic maps out."""

    package = "mmdet"
