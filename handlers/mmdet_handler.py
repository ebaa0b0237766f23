"""TorchServe handler for models of MMDetection. All logic is in `serve.worker.handler`."""

from __future__ import annotations

from serve.worker.handler import DetectionHandler


class MMDetHandler(DetectionHandler):
    """Images in; 2D boxes, masks or panoptic maps out."""

    package = "mmdet"
