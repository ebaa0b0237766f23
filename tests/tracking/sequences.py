"""Detections of the moving scene: the true boxes with noise, hidden where the LiDAR has no return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.moving import FRAMES, MOVERS, RATE, true_boxes
from serve.tracking import UNTRACKED, Detections, Tracker
from serve.tracking.clear_mot import ClearMot

LABELS = np.array([mover.label for mover in MOVERS])
CYCLIST = next(k for k, mover in enumerate(MOVERS) if mover.name.startswith("cyclist"))


@dataclass
class Followed:
    """What a tracker made of a sequence: per frame the true ids of its detections, and their tracks."""

    frames: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    score: ClearMot

    def tracks_of(self, mover: int) -> list[int]:
        """The ids that an object had, each once, in order."""
        found = [int(t) for true, tracks in self.frames for t in tracks[true == mover] if t != UNTRACKED]
        return list(dict.fromkeys(found))


def detections_at(time_s: float, seen: NDArray[np.int64], rng: np.random.Generator) -> Detections:
    """The objects `seen` at a time, with a detector's errors: 0.1 m of place, 3 degrees, 5 % of size."""
    boxes = true_boxes(time_s)[seen]
    boxes[:, :3] += rng.normal(0, 0.1, (len(seen), 3))
    boxes[:, 3:6] *= rng.normal(1, 0.05, (len(seen), 3))
    boxes[:, 6] += rng.normal(0, 0.05, len(seen))
    return Detections(boxes, rng.uniform(0.4, 0.95, len(seen)), LABELS[seen])


def follow(
    tracker: Tracker,
    *,
    numbers: Sequence[int] = range(FRAMES),
    seen_at: Callable[[int], NDArray[np.int64]] = lambda number: np.arange(len(MOVERS)),
    change: Callable[[Detections], Detections] = lambda found: found,
    timed: bool = True,
    seed: int = 0,
) -> Followed:
    """Run a tracker over frames of the moving scene."""
    rng = np.random.default_rng(seed)
    followed = Followed([], ClearMot())
    for number in numbers:
        seen = seen_at(number)
        found = change(detections_at(number / RATE, seen, rng))
        tracks = tracker.update(found, number / RATE if timed else None)
        followed.frames.append((seen, tracks))
        shown = tracks != UNTRACKED
        followed.score.update(
            seen, true_boxes(number / RATE)[seen, :3], tracks[shown], found.boxes[shown, :3]
        )
    return followed
