"""The tracks of one sequence: its time, and the tracks of the kind of its boxes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import numpy as np

from serve.errors import BadRequest, MissingPackage
from serve.tracking.detections import Detections, Ints, TrackOptions
from serve.tracking.image import ImageTracks
from serve.tracking.space import SpaceTracks

__all__ = ["Tracker"]


class _Tracks(Protocol):
    def __len__(self) -> int:
        """Return the number of tracks."""

    def update(self, found: Detections, time_s: float, step_s: float) -> Ints:
        """Take the detections of a frame at `time_s`, `step_s` after the last; returns the id of each."""


class Tracker:
    """The tracks of one sequence; not for several threads at a time."""

    def __init__(self, options: TrackOptions | None = None) -> None:
        """Start without a track.

        Raises:
            MissingPackage: scipy is not installed.
        """
        if find_spec("scipy") is None:
            raise MissingPackage(
                "tracks need scipy, which is not installed: pip install --no-deps -r requirements/tracks.lock, the "
                "lock of the extra 'tracks'"
            )
        self.options = options or TrackOptions()
        self.frames = 0
        self.time_s: float | None = None
        self._tracks: _Tracks | None = None
        self._columns = 0
        self._skipped_s = 0.0

    def __len__(self) -> int:
        """Return the number of tracks, unconfirmed ones and those of unseen objects included."""
        return 0 if self._tracks is None else len(self._tracks)

    def update(self, found: Detections, time_s: float | None = None) -> Ints:
        """Take the detections of the next frame.

        Args:
            found: the detections; none is fine.
            time_s: time of the frame, seconds from any origin; None for one period after the last frame.

        Returns:
            (N,) id of each detection from 1 on, `UNTRACKED` without a confirmed track.

        Raises:
            BadRequest: the time is not after that of the last frame, or the boxes are of another kind.
            MissingPackage: the boxes are of an image, and the package `trackers` is not installed.
        """
        tracks = self._start(found.boxes.shape[1])
        step_s = self._step(time_s)
        self.frames += 1
        assert self.time_s is not None
        return tracks.update(found, self.time_s, step_s)

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

    def _start(self, columns: int) -> _Tracks:
        if self._tracks is None:
            self._tracks = SpaceTracks(self.options) if columns == 7 else ImageTracks(self.options)
            self._columns = columns
        elif self._columns != columns:
            raise BadRequest("the boxes of this frame are of another kind than those of the frames before it")
        return self._tracks
