"""Load a detector from an archive and run lists of frames: one outcome per frame, whatever its neighbours do.

Knows nothing about HTTP, TorchServe or the environment.
"""

from serve.runtime.detector import Detector, Outcome, load_detector
from serve.runtime.model import device_for

__all__ = ["Detector", "Outcome", "device_for", "load_detector"]
