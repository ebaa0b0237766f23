"""Tracks: ids of objects over a sequence of answers, in 3D and 2D.

A `Tracker` takes the detections of one frame after another and gives each the id of its track: constant-velocity
Kalman filters (`motion`), similarity of boxes (`similarity`), one-to-one assignment per class, birth and death
(`tracker`). `track_answer` does it for an answer of a server. Detections themselves are left as they are.

Ids are no part of what is equal to native PyTorch: upstream's detectors give none.
"""

from __future__ import annotations

from serve.tracking.answers import TrackedAnswer, track_answer
from serve.tracking.tracker import UNTRACKED, Detections, Tracker, TrackOptions

__all__ = ["UNTRACKED", "Detections", "TrackOptions", "TrackedAnswer", "Tracker", "track_answer"]
