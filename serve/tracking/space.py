"""Tracks in space: prediction, assignment per class, birth and death.

It follows AB3DMOT (X. Weng et al., IROS 2020): constant-velocity Kalman filters, generalised IoU of turned boxes, the
Hungarian algorithm, correction of headings by half a turn. Detections of low scores go on with tracks that no better
one fits, but start none: ByteTrack (Y. Zhang et al., ECCV 2022).

A track starts with a detection of `TrackOptions.min_score`, is confirmed with its `min_hits`-th, and ends when its
object is unseen for longer than `max_age_s`. Only detections of confirmed tracks get ids; predictions without a
detection give no output.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve.tracking.detections import UNTRACKED, Detections, Floats, Ints, TrackOptions, find_objects
from serve.tracking.motion import BoxFilters
from serve.tracking.similarity import space_gious

__all__ = ["SpaceTracks"]

_YAW = 6
# Least generalised IoU of a pair, AB3DMOT's for cars, and of one with a detection of low score.
_LEAST, _LEAST_LOW = -0.2, 0.0
# Boxes whose centres are nearer, seen from above, may be a pair however little they overlap: a detector's errors are as
# large as a pedestrian. AB3DMOT's distance for pedestrians.
_NEAR_M = 1.0
# Frames that an unconfirmed track may miss; AB3DMOT's max_age.
_UNCONFIRMED_MISSES = 2
_IMPOSSIBLE = 1e6


class SpaceTracks:
    """The tracks of one sequence of boxes in space.

    Attributes:
        filters: the filter of each track.
    """

    def __init__(self, options: TrackOptions) -> None:
        """Start without a track."""
        from scipy.optimize import linear_sum_assignment

        self._assign = linear_sum_assignment
        self._options = options
        self._frames = 0
        self.filters = BoxFilters()
        self._ids: Ints = np.empty(0, np.int64)
        self._labels: Ints = np.empty(0, np.int64)
        self._hits: Ints = np.empty(0, np.int64)
        self._misses: Ints = np.empty(0, np.int64)
        self._seen_s: Floats = np.empty(0)
        self._next_id = 1

    def __len__(self) -> int:
        """Return the number of tracks, unconfirmed ones and those of unseen objects included."""
        return len(self._ids)

    def update(self, found: Detections, time_s: float, step_s: float) -> Ints:
        """Take the detections of the next frame.

        Args:
            found: detections with (N, 7) boxes.
            time_s: time of the frame, seconds.
            step_s: time since the frame before, one period for the first.

        Returns:
            (N,) id of each detection, `UNTRACKED` without a confirmed track.
        """
        self._frames += 1
        self.filters.predict(step_s * self._options.rate)
        self._misses += 1
        self._drop(time_s - self._seen_s <= self._options.max_age_s + 1e-6)
        usable = find_objects(found.boxes)
        high = usable & (found.scores >= self._options.min_score)
        low = usable & ~high & (found.scores >= self._options.low_score)
        owner = np.full(len(found.scores), -1, np.int64)  # row of the track of each detection
        for chosen, least in ((high, _LEAST), (low, _LEAST_LOW)):
            for label in np.intersect1d(found.labels[chosen], self._labels):
                rows = np.setdiff1d(np.flatnonzero(self._labels == label), owner)
                columns = np.flatnonzero(chosen & (found.labels == label))
                self._match(found.boxes, rows, columns, least, owner)
        self._correct(found, owner, time_s)
        self._give_birth(found, high & (owner < 0), owner, time_s)
        confirmed = (self._hits >= self._options.min_hits) | (self._frames <= self._options.min_hits)
        fresh = confirmed & (self._misses == 0) & (self._ids == 0)
        self._ids[fresh] = self._next_id + np.arange(fresh.sum())  # no gaps: an id is given when it is shown
        self._next_id += int(fresh.sum())
        ids = np.full(len(owner), UNTRACKED, np.int64)
        tracked = owner >= 0
        ids[tracked] = self._ids[owner[tracked]]
        ids[ids == 0] = UNTRACKED
        self._drop((self._ids > 0) | (self._misses <= _UNCONFIRMED_MISSES))
        return ids

    def _match(self, boxes: Floats, rows: Ints, columns: Ints, least: float, owner: Ints) -> None:
        """Assign detections of one class to its tracks one to one, the most similar pairs in total."""
        if not len(rows) or not len(columns):
            return
        predicted, detected = self.filters.boxes[rows], boxes[columns]
        similar = space_gious(predicted, detected, least)
        apart = np.linalg.norm(predicted[:, None, :2] - detected[None, :, :2], axis=-1)
        allowed = (similar >= least) | (apart <= _NEAR_M)
        # A pair that is not allowed costs more than any set of allowed ones.
        cost = np.where(allowed, 1 - similar, _IMPOSSIBLE)
        for i, j in zip(*self._assign(cost), strict=True):
            if cost[i, j] < _IMPOSSIBLE:
                owner[columns[j]] = rows[i]

    def _correct(self, found: Detections, owner: Ints, time_s: float) -> None:
        filters = self.filters
        matched = np.flatnonzero(owner >= 0)
        rows = owner[matched]
        measured = found.boxes[matched].copy()
        # A detector may mistake front for back. The track turns to the detection's side, and so does not stand across
        # between them; then the measured angle is the nearest of its full turns.
        off = np.abs(_wrap(measured[:, _YAW] - filters.boxes[rows, _YAW]))
        filters.boxes[rows, _YAW] += np.where(off > np.pi / 2, np.pi, 0.0)
        filters.boxes[rows, _YAW] = _wrap(filters.boxes[rows, _YAW])
        measured[:, _YAW] = filters.boxes[rows, _YAW] + _wrap(measured[:, _YAW] - filters.boxes[rows, _YAW])
        filters.update(rows, measured)
        self._hits[rows] += 1
        self._misses[rows] = 0
        self._seen_s[rows] = time_s

    def _give_birth(self, found: Detections, chosen: NDArray[np.bool_], owner: Ints, time_s: float) -> None:
        born = np.flatnonzero(chosen)
        born = born[np.argsort(-found.scores[born], kind="stable")]
        born = np.sort(born[: max(self._options.max_tracks - len(self), 0)])
        velocities = None
        if found.velocities is not None:
            velocities = np.full((len(born), 7), np.nan)
            velocities[:, :2] = found.velocities[born] / self._options.rate
        owner[born] = len(self) + np.arange(len(born))
        self.filters.append(found.boxes[born], velocities)
        for name, value in (
            ("_ids", np.zeros(len(born), np.int64)),
            ("_labels", found.labels[born]),
            ("_hits", np.ones(len(born), np.int64)),
            ("_misses", np.zeros(len(born), np.int64)),
            ("_seen_s", np.full(len(born), time_s)),
        ):
            setattr(self, name, np.concatenate([getattr(self, name), value]))

    def _drop(self, kept: NDArray[np.bool_]) -> None:
        """End the tracks that are not kept."""
        if kept.all():
            return
        self.filters.keep(kept)
        for name in ("_ids", "_labels", "_hits", "_misses", "_seen_s"):
            setattr(self, name, getattr(self, name)[kept])


def _wrap(angle: Floats) -> Floats:
    """Return angles from -pi to pi."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)
