"""Times of frames: of the video or recording, of the names of files, or one period after each other."""

from __future__ import annotations

from fractions import Fraction

from serve.predict.frames import Clip, Frame
from serve.tracking.times import time_in_name

__all__ = ["FrameTimes"]

_MICROSECONDS = 10**6  # what a float holds of a date


class FrameTimes:
    """Times of the frames of a run, which are asked for in order; each clip has its own origin."""

    def __init__(self, rate: Fraction) -> None:
        """Take `rate`, frames per second of clips that have neither times nor a rate."""
        self._rate = rate
        self._clip: Clip | None = None
        self._position = 0
        self._has_named = False

    def next(self, frame: Frame) -> Fraction | None:
        """Return the time of the next frame, seconds; None if its name lacks the Unix time that the first one has."""
        if frame.clip is not self._clip:
            self._clip, self._position = frame.clip, 0
            self._has_named = time_in_name(frame.name) is not None
        position, self._position = self._position, self._position + 1
        if frame.moment is not None:
            return frame.moment.pts * frame.moment.time_base
        if self._has_named:
            named = time_in_name(frame.name)
            return None if named is None else Fraction(round(named * _MICROSECONDS), _MICROSECONDS)
        return position / Fraction(frame.clip.rate or self._rate)
