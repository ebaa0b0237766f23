"""What the models see, as Prometheus metrics: histograms, and their distance to what was recorded or learned.

A worker counts the frames of a batch (`serve.watch`), this adds up. Of every version of a model there are the counts
since the start, the histograms; those of a sliding window, in a few slices of time; and a reference: that of its
archive, or the first frames of this process. Memory depends on neither traffic nor time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.errors import ArchiveError
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.watch_metrics import DriftFigures, Family, VersionText, exposition
from serve.watch.drift import LEAST_BLOCKS, distances
from serve.watch.reference import Reference, reference_of
from serve.watch.statistics import Counts, Layout

__all__ = ["ModelWatch", "WatchOptions", "Watching"]

# Slices of the window; the oldest falls out as a whole.
_SLICES = 12
# Blocks that a learned reference is made of, for the distance that chance makes.
_BLOCKS = 40

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchOptions:
    """Window and reference.

    Attributes:
        window_s: length of the window, seconds.
        window_frames: least frames of a window that is compared.
        learn_frames: frames that a reference is learned from, where the archive has none.
    """

    window_s: float = 3600.0
    window_frames: int = 200
    learn_frames: int = 1000

    @classmethod
    def of(cls, options: GatewayOptions) -> WatchOptions:
        """Take those of a gateway."""
        return cls(options.watch_window_s, options.watch_window_frames, options.watch_learn_frames)


class ModelWatch:
    """Counts of one version of a model.

    Attributes:
        total: all counts.
        batches: number of calls of `add`.
        reference: the reference; None while it is learned.
        is_recorded: whether it is that of the archive.
        layout: of all counts.

    Args:
        classes: names of its classes.
        reference: that of its archive; None to learn one.
        options: of window and reference.
        clock: returns seconds.
        run: runs what takes long, the limits of a learned reference (80 ms); perhaps later and in a thread.
    """

    def __init__(
        self,
        classes: Sequence[str],
        reference: Reference | None,
        options: WatchOptions,
        clock: Callable[[], float] = time.monotonic,
        run: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        self._options, self._clock, self._run = options, clock, run
        self.is_recorded = reference is not None
        self.reference = reference
        self.layout = Layout.of_classes(classes) if reference is None else reference.counts.layout
        self.total = self.layout.empty()
        self.batches = 0
        self._slices: deque[tuple[float, Counts]] = deque()
        self._learned: list[Counts] = []
        self._is_complete = False

    def add(self, counts: Counts) -> None:
        """Add the counts of a batch."""
        self.total.add(counts)
        self.batches += 1
        if self.reference is None:
            self._learn(counts)
            return
        now = self._clock()
        length_s = self._options.window_s / _SLICES
        if not self._slices or now - self._slices[-1][0] >= length_s:
            self._slices.append((now, self.layout.empty()))
        self._slices[-1][1].add(counts)
        self._expire(now)

    def _expire(self, now: float) -> None:
        while self._slices and now - self._slices[0][0] > self._options.window_s:
            self._slices.popleft()

    def _learn(self, counts: Counts) -> None:
        if self._is_complete:
            return  # the limits are being computed
        size = max(1, self._options.learn_frames // _BLOCKS)
        if not self._learned or self._learned[-1].frames >= size:
            self._learned.append(self.layout.empty())
        self._learned[-1].add(counts)
        # Large batches make few blocks; of fewer than these the limits are 1, and no alert could ever fire.
        if self.learned_frames >= self._options.learn_frames and len(self._learned) >= LEAST_BLOCKS:
            self._is_complete = True
            window = max(1, round(self._options.window_frames / size))
            self._run(partial(self._finish_learning, window))

    def _finish_learning(self, window: int) -> None:
        self.reference = reference_of(self._learned, score_thr=0.0, window=window)
        self._learned = []

    @property
    def learned_frames(self) -> int:
        """Frames of the reference, also while it is learned."""
        blocks, reference = (
            self._learned,
            self.reference,
        )  # in this order: a thread sets the one, then empties the other
        return sum(block.frames for block in blocks) if reference is None else reference.counts.frames

    def window_state(self) -> object:
        """Return a value that changes when the window or the reference does."""
        self._expire(self._clock())
        return self.batches, len(self._slices), self.reference is None

    def window(self) -> Counts:
        """Return the counts of the window."""
        self._expire(self._clock())
        found = self.layout.empty()
        for _, counts in self._slices:
            found.add(counts)
        return found

    def distances(self, window: Counts) -> Iterator[tuple[str, float, float]]:
        """Yield statistic, distance to the reference and its limit, where there are enough frames."""
        if self.reference is None or window.frames < self._options.window_frames:
            return
        starts = [place.start for place in self.layout.slices.values()]
        found = distances(window.bins, self.reference.counts.bins, starts)
        for name, value in zip(self.layout.slices, found.tolist(), strict=True):
            if name in self.reference.limits and not math.isnan(value):
                yield name, value, self.reference.limits[name]

    def figures(self) -> DriftFigures:
        """Return the gauges of window and reference."""
        window = self.window()
        return DriftFigures(
            {name: (found, limit) for name, found, limit in self.distances(window)},
            window.frames,
            self.learned_frames,
            "archive" if self.is_recorded else "learned",
            self.reference is None,
        )


@dataclass
class _Entry:
    spec: Mapping[str, Any] | None
    watch: ModelWatch
    text: VersionText
    is_logged: bool = False
    _counted: tuple[object, Mapping[Family, str]] = (None, {})
    _drift: tuple[object, Mapping[Family, str]] = (None, {})

    def texts(self) -> Mapping[Family, str]:
        """Return the metrics as text; what did not change since the last call is not written again."""
        window = self.watch.window_state()
        if self._counted[0] != self.watch.batches:
            self._counted = self.watch.batches, self.text.of_counts(self.watch.total)
        if self._drift[0] != window:
            self._drift = window, self.text.of_drift(self.watch.figures())
        return {**self._counted[1], **self._drift[1]}


class Watching:
    """The watched versions of all models, and their metrics.

    Args:
        find: returns the version of a model by both names, or None.
        options: of window and reference.
        clock: returns seconds.
    """

    def __init__(
        self,
        find: Callable[[str, str], ModelVersion | None],
        options: WatchOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find, self._options, self._clock = find, options, clock
        self._entries: dict[tuple[str, str], _Entry] = {}

    def observe(self, name: str, version: str, document: Mapping[str, Any]) -> None:
        """Add the counts of a batch, as its worker sent them."""
        entry = self._entry(name, version)
        if entry is None:
            return
        try:
            entry.watch.add(entry.watch.layout.read(document))
        except ValueError as error:
            if not entry.is_logged:
                entry.is_logged = True
                logger.warning("counts of a worker of %s %s are left out: %s", name, version, error)

    def _entry(self, name: str, version: str) -> _Entry | None:
        model = self._find(name, version)
        if model is None or model.spec is None:
            return None
        entry = self._entries.get((name, version))
        if entry is None or entry.spec is not model.spec:
            watch = self._watch(name, version, model.spec)
            text = VersionText(name, version, watch.layout)
            entry = self._entries[name, version] = _Entry(model.spec, watch, text)
        return entry

    def _watch(self, name: str, version: str, spec: Mapping[str, Any]) -> ModelWatch:
        reference = None
        if (recorded := spec.get(Reference.KEY)) is not None:
            try:
                reference = Reference.parse(recorded)
            except ArchiveError as error:
                logger.warning("the reference of %s %s is left out: %s", name, version, error)
        recording = reference.recording if reference is not None else None
        if recording is not None and self._options.window_frames < recording.window_frames:
            logger.warning(
                "the limits of %s %s are for windows of %d frames and too narrow for watch_window_frames=%d: record "
                "its reference with --window-frames %d",
                name,
                version,
                recording.window_frames,
                self._options.window_frames,
                self._options.window_frames,
            )
        return ModelWatch(
            spec.get("classes") or (), reference, self._options, self._clock, run=_run_in_thread
        )

    def exposition(self) -> str:
        """Return all metrics in Prometheus' text format; without a version there are their headers."""
        for key in [key for key in self._entries if self._find(*key) is None]:
            del self._entries[key]  # removed
        return exposition([entry.texts() for _, entry in sorted(self._entries.items())])


def _run_in_thread(work: Callable[[], None]) -> None:
    """Run beside the event loop, which answers meanwhile."""
    threading.Thread(target=work, name="drift-limits", daemon=True).start()
