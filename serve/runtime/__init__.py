"""Detectors loaded from archives: run lists of frames, one independent outcome per frame."""

from serve.runtime.detector import Detector, Outcome, load_detector
from serve.runtime.model import device_for

__all__ = ["Detector", "Outcome", "device_for", "load_detector"]
