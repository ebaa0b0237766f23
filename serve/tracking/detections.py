"""What a tracker takes: the detections of a frame, and rules of birth and death."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNTRACKED", "Detections", "Floats", "Ints", "TrackOptions", "find_objects"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Id of a detection that belongs to no confirmed track.
UNTRACKED = -1
# Boxes beyond, in metres or pixels, are no objects of a frame.
_FARTHEST = 1e6


@dataclass(frozen=True)
class TrackOptions:
    """Rules of birth and death.

    Attributes:
        min_score: lowest score of a detection that starts a track.
        low_score: lowest score of one that goes on with a track.
        min_hits: detections that confirm a track; in the first `min_hits` frames every track is confirmed.
        max_age_s: longest time that an object may be unseen, seconds.
        rate: frames per second of frames without times, and of the frame that the filter's noise is for.
        max_tracks: most tracks at a time; further detections start none.
    """

    min_score: float = 0.3
    low_score: float = 0.1
    min_hits: int = 3
    max_age_s: float = 1.0
    rate: float = 10.0
    max_tracks: int = 1024


@dataclass(frozen=True)
class Detections:
    """Detections of one frame.

    Attributes:
        boxes: (N, 7) x, y, z of the bottom centre, dx, dy, dz in metres, yaw about z in radians, z up; or (N, 4) centre
            x, centre y, width, height in pixels.
        scores: (N,).
        labels: (N,) classes, which are tracked apart from each other.
        velocities: (N, 2) along x and y in metres per second, NaN where unknown; None for all unknown.
    """

    boxes: Floats
    scores: Floats
    labels: Ints
    velocities: Floats | None = None


def find_objects(boxes: Floats) -> NDArray[np.bool_]:
    """Find the boxes that may be objects, (N,): false for NaN and for places that no frame has."""
    return np.asarray((np.abs(boxes) < _FARTHEST).all(1))
