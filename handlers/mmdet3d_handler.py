"""TorchServe handler for point-cloud detectors (MMDetection3D). All logic is in `handlers.detection`."""

from __future__ import annotations

from handlers.detection import DetectionHandler


class MMDet3DHandler(DetectionHandler):
    """Clouds in, 3D boxes out."""

    modality = "lidar"
