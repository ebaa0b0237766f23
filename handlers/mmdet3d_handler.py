"""TorchServe handler for models of MMDetection3D; its logic is in `serve.worker.handler`."""

from __future__ import annotations

from serve.worker.handler import DetectionHandler


class MMDet3DHandler(DetectionHandler):
    """Point clouds, or images with calibrations, to 3D boxes or point labels."""

    package = "mmdet3d"
