"""TorchServe handler for models of MMDetection; its logic is in `serve.worker.handler`."""

from __future__ import annotations

from serve.worker.handler import DetectionHandler


class MMDetHandler(DetectionHandler):
    """Images to 2D boxes, masks or panoptic maps."""

    package = "mmdet"
