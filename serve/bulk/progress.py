"""Progress of a run: a bar on a terminal, and a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

__all__ = ["Progress"]

_WINDOW_S = 300.0


class Progress:
    """Shows how many frames are finished, the rate of the last minutes, and the time left.

    The rate counts from the first frame of this run on: neither what a former run has finished nor the time in which
    models are loaded.

    Args:
        total: frames of the run.
        finished: frames that a former run has finished.
        file: takes the bar or the lines.
        every_s: seconds between two lines.
        clock: returns seconds.
    """

    def __init__(
        self,
        total: int,
        finished: int,
        *,
        file: TextIO | None = None,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = sys.stderr if file is None else file
        self._total, self._finished, self._every_s, self._clock = total, finished, every_s, clock
        self._samples: deque[tuple[float, int]] = deque()
        self._shown_at = clock()
        self._bar: tqdm[Any] | None = None
        if self._file.isatty():
            self._bar = tqdm(total=total, initial=finished, unit="frame", smoothing=0.05, file=self._file)

    def advance(self, frames: int) -> None:
        """Count frames; negative if a part begins anew, 0 to have a line written that is due."""
        self._finished += frames
        if self._bar is not None:
            self._bar.update(frames)
            self._bar.refresh()
            return
        now = self._clock()
        if frames and not self._samples:
            self._samples.append((now, self._finished))
        if now - self._shown_at < self._every_s:
            return
        self._shown_at = now
        print(self._line(now), file=self._file, flush=True)

    def _line(self, now: float) -> str:
        share = 100 * self._finished / self._total if self._total else 100
        text = f"{self._finished:,} of {self._total:,} frames ({share:.1f} %)"
        if not self._samples:
            return f"{text}, loading"
        self._samples.append((now, self._finished))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_S:
            self._samples.popleft()
        then, before = self._samples[0]
        rate = (self._finished - before) / (now - then) if now > then else 0.0
        if rate <= 0:
            return f"{text}, no frame for {_duration(now - then)}"
        return f"{text}, {rate:.3g} a second, {_duration((self._total - self._finished) / rate)} left"

    def __enter__(self) -> Self:
        """Show it for the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
