"""What the models see, as Prometheus metrics: histograms, and their distance to what was recorded or learned.

A worker counts the frames of a batch (`serve.watch`), this adds up. Of every version of a model there are the counts
since the start, the histograms; those of a sliding window, in a few slices of time; and a reference: that of its
archive, or the first frames of this process. Memory depends on neither traffic nor time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.errors import ArchiveError
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.watch.drift import distance
from serve.watch.reference import Reference, reference_of
from serve.watch.statistics import CLASS, OTHER, STATISTICS, Counts, Layout

__all__ = ["ModelWatch", "WatchOptions", "Watching"]

# Slices of the window; the oldest falls out as a whole.
_SLICES = 12
# Blocks that a learned reference is made of, for the distance that chance makes.
_BLOCKS = 40
_LABELS = ("model", "version")

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
        self._slices: deque[tuple[float, Counts]] = deque()
        self._learned: list[Counts] = []
        self._is_complete = False

    def add(self, counts: Counts) -> None:
        """Add the counts of a batch."""
        self.total.add(counts)
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
        if self.learned_frames >= self._options.learn_frames:
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
        for name, limit in self.reference.limits.items():
            found = distance(window.of(name), self.reference.counts.of(name))
            if found is not None:
                yield name, found, limit


@dataclass
class _Entry:
    spec: Mapping[str, Any] | None
    watch: ModelWatch
    is_logged: bool = field(default=False)


class Watching(Collector):
    """The watched versions of all models, and their metrics.

    Args:
        find: returns the version of a model by both names, or None.
        options: of window and reference.
    """

    def __init__(self, find: Callable[[str, str], ModelVersion | None], options: WatchOptions) -> None:
        self._find, self._options = find, options
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
            entry = self._entries[name, version] = _Entry(model.spec, self._watch(name, version, model.spec))
        return entry

    def _watch(self, name: str, version: str, spec: Mapping[str, Any]) -> ModelWatch:
        reference = None
        if (recorded := spec.get(Reference.KEY)) is not None:
            try:
                reference = Reference.parse(recorded)
            except ArchiveError as error:
                logger.warning("the reference of %s %s is left out: %s", name, version, error)
        return ModelWatch(spec.get("classes") or (), reference, self._options, run=_run_in_thread)

    def collect(self) -> Iterator[Metric]:
        """Yield all families; those without a model are empty."""
        for key in [key for key in self._entries if self._find(*key) is None]:
            del self._entries[key]  # removed
        watches = {key: entry.watch for key, entry in sorted(self._entries.items())}
        yield from _histograms(watches)
        yield from _counters(watches)
        yield from _gauges(watches)


def _run_in_thread(work: Callable[[], None]) -> None:
    """Run beside the event loop, which answers meanwhile."""
    threading.Thread(target=work, name="drift-limits", daemon=True).start()


def _histograms(watches: Mapping[tuple[str, str], ModelWatch]) -> Iterator[Metric]:
    for statistic in STATISTICS.values():
        family = HistogramMetricFamily(statistic.metric, statistic.text, labels=_LABELS)
        bounds = [*(f"{float(edge):g}" for edge in statistic.edges), "+Inf"]
        for key, watch in watches.items():
            cumulative = watch.total.of(statistic.name).cumsum().tolist()
            if cumulative[-1]:
                family.add_metric(
                    key, list(zip(bounds, cumulative, strict=True)), watch.total.sums[statistic.name]
                )
        yield family


def _counters(watches: Mapping[tuple[str, str], ModelWatch]) -> Iterator[Metric]:
    frames = CounterMetricFamily("mmdet3d_serve_watched_frames", "Frames that were counted", labels=_LABELS)
    classes = CounterMetricFamily(
        "mmdet3d_serve_detections", "Detections that reach the score threshold", labels=(*_LABELS, "class")
    )
    warnings = CounterMetricFamily(
        "mmdet3d_serve_frame_warnings", "Frames with a warning", labels=(*_LABELS, "code")
    )
    for key, watch in watches.items():
        frames.add_metric(key, watch.total.frames)
        names = (*watch.layout.classes, OTHER)
        for name, number in zip(names, watch.total.of(CLASS).tolist(), strict=True):
            if number or name != OTHER:
                classes.add_metric((*key, name), number)
        for code, number in sorted(watch.total.warnings.items()):
            warnings.add_metric((*key, code), number)
    yield from (frames, classes, warnings)


def _gauges(watches: Mapping[tuple[str, str], ModelWatch]) -> Iterator[Metric]:
    labels = (*_LABELS, "statistic")
    distances = GaugeMetricFamily(
        "mmdet3d_serve_drift_distance",
        "Jensen-Shannon distance of the window to the reference, from 0 to 1",
        labels=labels,
    )
    limits = GaugeMetricFamily(
        "mmdet3d_serve_drift_limit", "Distance that chance does not explain any more", labels=labels
    )
    window_frames = GaugeMetricFamily(
        "mmdet3d_serve_drift_window_frames", "Frames in the window", labels=_LABELS
    )
    reference_frames = GaugeMetricFamily(
        "mmdet3d_serve_drift_reference_frames",
        "Frames of the reference, recorded in the archive or learned since the start",
        labels=(*_LABELS, "source"),
    )
    learning = GaugeMetricFamily(
        "mmdet3d_serve_drift_learning", "1 while the reference is still learned, else 0", labels=_LABELS
    )
    for key, watch in watches.items():
        window = watch.window()
        for name, found, limit in watch.distances(window):
            distances.add_metric((*key, name), found)
            limits.add_metric((*key, name), limit)
        window_frames.add_metric(key, window.frames)
        source = "archive" if watch.is_recorded else "learned"
        reference_frames.add_metric((*key, source), watch.learned_frames)
        learning.add_metric(key, watch.reference is None)
    yield from (distances, limits, window_frames, reference_frames, learning)
