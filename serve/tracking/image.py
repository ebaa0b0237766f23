"""Tracks in images: ByteTrack (Y. Zhang et al., ECCV 2022) of the package `trackers`, one tracker per class.

The package's trackers know no classes and number their tracks from 0. Here each class that has tracks has a tracker,
and tracks get their ids, from 1 on, when they are confirmed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from serve.errors import MissingPackage
from serve.tracking.detections import UNTRACKED, Detections, Floats, Ints, TrackOptions, find_objects

__all__ = ["ImageTracks"]

# Least IoU of a detection and a track, ByteTrack's.
_LEAST_IOU = 0.2
_ROW = "row"  # of a detection in its frame: a tracker returns the detections in another order


class ImageTracks:
    """The tracks of one sequence of images."""

    def __init__(self, options: TrackOptions) -> None:
        """Start without a track.

        Raises:
            MissingPackage: `trackers` is not installed.
        """
        try:
            from supervision import Detections as Boxes
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise MissingPackage(
                f"ids of boxes in images need the package trackers, which is not installed ({error}): pip install "
                "--no-deps -r requirements/tracks.lock, the lock of the extra 'tracks'"
            ) from error
        self._options = options
        self._boxes, self._tracker = Boxes, ByteTrackTracker
        self._of_classes: dict[int, Any] = {}
        self._ids: dict[tuple[int, int], int] = {}  # class and number of a track → its id
        self._next_id = 1

    def __len__(self) -> int:
        """Return the number of tracks, unconfirmed ones and those of unseen objects included."""
        return sum(len(tracker.tracks) for tracker in self._of_classes.values())

    def update(self, found: Detections, time_s: float, step_s: float) -> Ints:
        """Take the detections of the next frame.

        Args:
            found: detections with (N, 4) boxes.
            time_s: time of the frame, after that of the last.
            step_s: not used: the trackers keep the time of the last frame.

        Returns:
            (N,) id of each detection, `UNTRACKED` without a confirmed track.
        """
        chosen = self._choose(found)
        corners = np.concatenate(
            [found.boxes[:, :2] - found.boxes[:, 2:] / 2, found.boxes[:, :2] + found.boxes[:, 2:] / 2], axis=1
        )
        numbers = np.full(len(found.scores), -1, np.int64)  # of the track of each detection, within its class
        room = self._options.max_tracks - len(self)
        for label in sorted({*self._of_classes, *found.labels[chosen].tolist()}):
            rows = chosen[found.labels[chosen] == label]
            room -= self._follow(label, corners[rows], found.scores[rows], rows, time_s, numbers, room)
        ids = np.full(len(numbers), UNTRACKED, np.int64)
        for row in np.flatnonzero(numbers >= 0).tolist():
            name = (int(found.labels[row]), int(numbers[row]))
            if name not in self._ids:
                self._ids[name] = self._next_id
                self._next_id += 1
            ids[row] = self._ids[name]
        self._forget()
        return ids

    def _choose(self, found: Detections) -> Ints:
        """Return the rows of the detections to follow, the best first: what is born last is dropped first."""
        rows = np.flatnonzero(find_objects(found.boxes) & (found.scores >= self._options.low_score))
        return np.asarray(rows[np.argsort(-found.scores[rows], kind="stable")])

    def _follow(
        self, label: int, corners: Floats, scores: Floats, rows: Ints, time_s: float, numbers: Ints, room: int
    ) -> int:
        """Take the detections of one class, write the numbers of their tracks; returns how many tracks more it has."""
        tracker = self._of_classes.get(label)
        if tracker is None:
            tracker = self._of_classes[label] = self._create()
        before = len(tracker.tracks)
        boxes = self._boxes(xyxy=corners, confidence=scores, data={_ROW: rows})
        tracked = tracker.update(boxes, timestamp=time_s)
        if len(tracked):
            numbers[tracked.data[_ROW]] = tracked.tracker_id
        # The newest are last; they were born in this frame and have no number yet.
        del tracker.tracks[max(before + room, 0) :]
        return len(tracker.tracks) - before

    def _create(self) -> Any:
        rules = self._options
        tracker = self._tracker(
            frame_rate=rules.rate,
            track_activation_threshold=rules.min_score,
            high_conf_det_threshold=rules.min_score,
            minimum_consecutive_frames=rules.min_hits,
            minimum_iou_threshold=_LEAST_IOU,
        )
        tracker.maximum_time_without_update = rules.max_age_s + 1e-6
        return tracker

    def _forget(self) -> None:
        """Drop what is kept of tracks that have ended."""
        self._of_classes = {label: tracker for label, tracker in self._of_classes.items() if tracker.tracks}
        alive = {
            (label, track.tracker_id)
            for label, tracker in self._of_classes.items()
            for track in tracker.tracks
        }
        self._ids = {name: number for name, number in self._ids.items() if name in alive}
