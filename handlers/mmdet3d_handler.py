"""TorchServe handler for models of MMDetection3D, whatever sensors they take. All logic is in `serve.worker.handler`."""

from __future__ import annotations

from serve.worker.handler import DetectionHandler


class MMDet3DHandler(DetectionHandler):
    """Clouds and pictures with cameras in, 3D boxes or labels of points out."""

    package = "mmdet3d"
