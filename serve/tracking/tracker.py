"""Tracks over a sequence of detections: prediction, assignment per class, birth and death.

In space it follows AB3DMOT (X. Weng et al., IROS 2020): constant-velocity Kalman filters, generalised IoU of turned
boxes, the Hungarian algorithm, correction of headings by half a turn. In images the filter is that of DeepSORT and the
similarity IoU. In both, detections of low scores go on with tracks that no better one fits, but start none: ByteTrack
(Y. Zhang et al., ECCV 2022).

A track starts with a detection of `TrackOptions.min_score`, is confirmed with its `min_hits`-th, and ends when its
object is unseen for longer than `max_age_s`. Only detections of confirmed tracks get ids; predictions without a
detection give no output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.errors import BadRequest, MissingPackage
from serve.tracking.motion import IMAGE_NOISE, SPACE_NOISE, BoxFilters
from serve.tracking.similarity import image_ious, space_gious

__all__ = ["UNTRACKED", "Detections", "TrackOptions", "Tracker"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Id of a detection that belongs to no confirmed track.
UNTRACKED = -1
_YAW = 6
# Least similarity of a pair, and of one with a detection of low score. In space generalised IoU, AB3DMOT's for cars;
# in images IoU, ByteTrack's.
_LEAST_IN_SPACE, _LEAST_IN_SPACE_LOW = -0.2, 0.0
_LEAST_IN_IMAGE, _LEAST_IN_IMAGE_LOW = 0.2, 0.5
# Boxes whose centres are nearer, seen from above, may be a pair however little they overlap: a detector's errors are as
# large as a pedestrian. AB3DMOT's distance for pedestrians.
_NEAR_M = 1.0
# Frames that an unconfirmed track may miss; AB3DMOT's max_age.
_UNCONFIRMED_MISSES = 2
_IMPOSSIBLE = 1e6
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


class Tracker:
    """The tracks of one sequence; not for several threads at a time."""

    def __init__(self, options: TrackOptions | None = None) -> None:
        """Start without a track.

        Raises:
            MissingPackage: scipy is not installed.
        """
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise MissingPackage(
                "tracks need scipy, which is not installed: pip install 'mmdet3d-serve[tracks]'"
            ) from error
        self._assign = linear_sum_assignment
        self.options = options or TrackOptions()
        self.frames = 0
        self.time_s: float | None = None
        self._filters: BoxFilters | None = None
        self._ids: Ints = np.empty(0, np.int64)
        self._labels: Ints = np.empty(0, np.int64)
        self._hits: Ints = np.empty(0, np.int64)
        self._misses: Ints = np.empty(0, np.int64)
        self._seen_s: Floats = np.empty(0)
        self._next_id = 1
        self._skipped_s = 0.0

    def __len__(self) -> int:
        """Return the number of tracks, unconfirmed ones and those of unseen objects included."""
        return len(self._ids)

    def update(self, found: Detections, time_s: float | None = None) -> Ints:
        """Take the detections of the next frame.

        Args:
            found: the detections; none is fine.
            time_s: time of the frame, seconds from any origin; None for one period after the last frame.

        Returns:
            (N,) id of each detection from 1 on, `UNTRACKED` without a confirmed track.

        Raises:
            BadRequest: the time is not after that of the last frame, or the boxes are of another kind.
        """
        step_s = self._step(time_s)
        filters = self._start(found.boxes.shape[1])
        in_space = found.boxes.shape[1] == 7
        self.frames += 1
        assert self.time_s is not None
        filters.predict(step_s * self.options.rate)
        self._misses += 1
        self._drop(self.time_s - self._seen_s <= self.options.max_age_s + 1e-6)
        usable = (np.abs(found.boxes) < _FARTHEST).all(1)  # false for NaN
        high = usable & (found.scores >= self.options.min_score)
        low = usable & ~high & (found.scores >= self.options.low_score)
        owner = np.full(len(found.scores), -1, np.int64)  # row of the track of each detection
        for chosen, least in (
            (high, _LEAST_IN_SPACE if in_space else _LEAST_IN_IMAGE),
            (low, _LEAST_IN_SPACE_LOW if in_space else _LEAST_IN_IMAGE_LOW),
        ):
            for label in np.intersect1d(found.labels[chosen], self._labels):
                rows = np.setdiff1d(np.flatnonzero(self._labels == label), owner)
                columns = np.flatnonzero(chosen & (found.labels == label))
                self._match(filters, found.boxes, rows, columns, least, owner)
        self._correct(filters, found, owner)
        self._give_birth(filters, found, high & (owner < 0), owner)
        confirmed = (self._hits >= self.options.min_hits) | (self.frames <= self.options.min_hits)
        fresh = confirmed & (self._misses == 0) & (self._ids == 0)
        self._ids[fresh] = self._next_id + np.arange(fresh.sum())  # no gaps: an id is given when it is shown
        self._next_id += int(fresh.sum())
        ids = np.full(len(owner), UNTRACKED, np.int64)
        tracked = owner >= 0
        ids[tracked] = self._ids[owner[tracked]]
        ids[ids == 0] = UNTRACKED
        self._drop((self._ids > 0) | (self._misses <= _UNCONFIRMED_MISSES))
        return ids

    def skip(self) -> None:
        """Let one period pass without a frame, if frames have no times: a frame whose detections are not known."""
        if self.time_s is not None:
            self._skipped_s += 1 / self.options.rate

    def _step(self, time_s: float | None) -> float:
        period_s = 1 / self.options.rate
        last_s = self.time_s
        if last_s is None:
            last_s = -period_s if time_s is None else time_s - period_s
        step_s = period_s + self._skipped_s if time_s is None else time_s - last_s
        if not 0 < step_s < np.inf:
            raise BadRequest(
                f"the time of a frame, {time_s} s, is not after {last_s:.15g} s, that of the frame before; send the "
                "frames of a sequence in order, each once"
            )
        self.time_s = last_s + step_s if time_s is None else time_s
        self._skipped_s = 0.0
        return step_s

    def _start(self, columns: int) -> BoxFilters:
        if self._filters is None:
            self._filters = BoxFilters(SPACE_NOISE if columns == 7 else IMAGE_NOISE)
        elif self._filters.boxes.shape[1] != columns:
            raise BadRequest("the boxes of this frame are of another kind than those of the frames before it")
        return self._filters

    def _match(
        self, filters: BoxFilters, boxes: Floats, rows: Ints, columns: Ints, least: float, owner: Ints
    ) -> None:
        """Assign detections of one class to its tracks one to one, the most similar pairs in total."""
        if not len(rows) or not len(columns):
            return
        if boxes.shape[1] == 7:
            similar = space_gious(filters.boxes[rows], boxes[columns], least)
            apart = filters.boxes[rows][:, None, :2] - boxes[columns][None, :, :2]
            allowed = (similar >= least) | (np.linalg.norm(apart, axis=-1) <= _NEAR_M)
        else:
            similar = image_ious(filters.boxes[rows], boxes[columns])
            allowed = similar >= least
        # A pair that is not allowed costs more than any set of allowed ones.
        cost = np.where(allowed, 1 - similar, _IMPOSSIBLE)
        for i, j in zip(*self._assign(cost), strict=True):
            if cost[i, j] < _IMPOSSIBLE:
                owner[columns[j]] = rows[i]

    def _correct(self, filters: BoxFilters, found: Detections, owner: Ints) -> None:
        matched = np.flatnonzero(owner >= 0)
        rows = owner[matched]
        measured = found.boxes[matched].copy()
        if measured.shape[1] > _YAW:
            # A detector may mistake front for back. The track turns to the detection's side, and so does not stand
            # across between them; then the measured angle is the nearest of its full turns.
            off = np.abs(_wrap(measured[:, _YAW] - filters.boxes[rows, _YAW]))
            filters.boxes[rows, _YAW] += np.where(off > np.pi / 2, np.pi, 0.0)
            filters.boxes[rows, _YAW] = _wrap(filters.boxes[rows, _YAW])
            measured[:, _YAW] = filters.boxes[rows, _YAW] + _wrap(
                measured[:, _YAW] - filters.boxes[rows, _YAW]
            )
        filters.update(rows, measured)
        self._hits[rows] += 1
        self._misses[rows] = 0
        assert self.time_s is not None
        self._seen_s[rows] = self.time_s

    def _give_birth(
        self, filters: BoxFilters, found: Detections, chosen: NDArray[np.bool_], owner: Ints
    ) -> None:
        born = np.flatnonzero(chosen)
        born = born[np.argsort(-found.scores[born], kind="stable")]
        born = np.sort(born[: max(self.options.max_tracks - len(self), 0)])
        velocities = None
        if found.velocities is not None and found.boxes.shape[1] == 7:
            velocities = np.full((len(born), 7), np.nan)
            velocities[:, :2] = found.velocities[born] / self.options.rate
        owner[born] = len(self) + np.arange(len(born))
        filters.append(found.boxes[born], velocities)
        assert self.time_s is not None
        for name, value in (
            ("_ids", np.zeros(len(born), np.int64)),
            ("_labels", found.labels[born]),
            ("_hits", np.ones(len(born), np.int64)),
            ("_misses", np.zeros(len(born), np.int64)),
            ("_seen_s", np.full(len(born), self.time_s)),
        ):
            setattr(self, name, np.concatenate([getattr(self, name), value]))

    def _drop(self, kept: NDArray[np.bool_]) -> None:
        """End the tracks that are not kept."""
        assert self._filters is not None
        if kept.all():
            return
        self._filters.keep(kept)
        for name in ("_ids", "_labels", "_hits", "_misses", "_seen_s"):
            setattr(self, name, getattr(self, name)[kept])


def _wrap(angle: Floats) -> Floats:
    """Return angles from -pi to pi."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)
