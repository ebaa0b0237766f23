"""Tracks: ids of objects over a sequence of answers, in 3D and 2D.

A `Tracker` takes the detections of one frame after another and gives each the id of its track. In space (`space`) that
is AB3DMOT: constant-velocity Kalman filters (`motion`), similarity of boxes (`similarity`), one-to-one assignment per
class, birth and death. In images (`image`) it is ByteTrack of the package `trackers`. `track_answer` does it for an
answer of a server. Detections themselves are left as they are.

Ids are no part of what is equal to native PyTorch: upstream's detectors give none.
"""

from __future__ import annotations

from serve.tracking.answers import TrackedAnswer, track_answer
from serve.tracking.detections import UNTRACKED, Detections, TrackOptions
from serve.tracking.tracker import Tracker

__all__ = ["UNTRACKED", "Detections", "TrackOptions", "TrackedAnswer", "Tracker", "track_answer"]
