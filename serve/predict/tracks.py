"""Ids of tracks in the predictions of a run."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from serve.predict.frame_times import FrameTimes
from serve.predict.frames import Clip, Prediction
from serve.protocol.json_bodies import encode_json
from serve.tracking import Tracker, TrackOptions, track_answer

__all__ = ["ClipTracks"]

_IDS = "track_ids"


class ClipTracks:
    """Follows the frames of a run; each clip is a sequence of its own."""

    def __init__(self, options: TrackOptions, rate: Fraction) -> None:
        """Take the rules from `options`, and `rate` in frames per second for frames without times."""
        self._options, self._rate = options, rate
        self._clip: Clip | None = None
        self._tracker = Tracker(options)
        self._times = FrameTimes(rate)

    def follow(self, prediction: Prediction) -> Prediction:
        """Take the next frame; returns its prediction with ids.

        A frame that failed has none, and its time passes. The prediction of a former run is followed like a new one:
        it is returned as it is if its ids are the same.

        Raises:
            BadRequest: the model gives no boxes.
        """
        frame = prediction.frame
        if frame.clip is not self._clip:
            self._clip = frame.clip
            self._tracker = Tracker(replace(self._options, rate=float(frame.clip.rate or self._rate)))
        time = self._times.next(frame)
        if prediction.answer is None:
            return prediction
        time_s = None if time is None else float(time)
        last_s = self._tracker.time_s
        former = prediction.answer.get(_IDS)
        answer = {name: value for name, value in prediction.answer.items() if name != _IDS}
        tracked = track_answer(
            self._tracker,
            answer,
            prediction.encoded if former is None else encode_json(answer),
            # A damaged video may repeat a time: such a frame comes one period after the last.
            None if time_s is None or (last_s is not None and time_s <= last_s) else time_s,
        )
        if former is not None and former == tracked.answer[_IDS]:
            return prediction
        return replace(prediction, answer=tracked.answer, encoded=tracked.encoded)
