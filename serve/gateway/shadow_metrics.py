"""Prometheus metrics of shadow traffic: what became of every detection, by the kinds of `serve.compare.changes`."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from threading import Lock
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from serve.compare.changes import Change, Kind
from serve.gateway.metrics import FAILURE_CODES

__all__ = ["MAX_CLASSES", "ShadowMetrics", "ShadowPair"]

#: Classes of one model with a label of their own; detections of all others are counted as `OTHER`.
MAX_CLASSES = 64
OTHER = "(other)"

# Model, version that answered, version that got the frame as well.
ShadowPair = tuple[str, str, str]

_LABELS = ("model", "version", "shadow")
_SHIFTS = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_METERS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)
_LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class ShadowMetrics:
    """Metrics of all shadows; may be called from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Create the metrics in a registry."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mmdet3d_serve_shadow_{name}", text, (*_LABELS, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"mmdet3d_serve_shadow_{name}", text, _LABELS, buckets=buckets, registry=registry
            )

        self._frames = counter("frames", "Frames whose answers of both versions were compared")
        self._detections = counter("detections", "What became of detections", "class", "change")
        self._scores = counter("paired_scores", "Sum of the scores of paired detections", "side")
        self._shifts = histogram(
            "score_shift", "Score of the shadow less that of the answer, of pairs", _SHIFTS
        )
        self._moved = histogram(
            "moved_meters", "Distance of the centres of paired 3D boxes on the ground, in metres", _METERS
        )
        self._losses = histogram("iou_loss_ratio", "1 - IoU of paired 2D boxes", _LOSSES)
        self._failures = counter("failures", "Frames that the shadow failed on, by error code", "reason")
        self._dropped = counter(
            "dropped_frames", "Frames of the share that were not sent or not compared, by reason", "reason"
        )
        self._classes: dict[str, set[str]] = {}
        self._shown: set[tuple[ShadowPair, tuple[str, ...]]] = set()
        self._lock = Lock()

    def show_pair(self, pair: ShadowPair, classes: Sequence[str]) -> None:
        """Show that there is a shadow, by counts of 0.

        Without them a class that only the shadow finds has no count of what it found before, and so no share of new
        detections.

        Args:
            pair: model, version that answers, shadow.
            classes: of the model; if there are more than have a label of their own, those that occur first get them.
        """
        key = pair, tuple(classes)
        if key in self._shown:
            return
        self._shown.add(key)
        self._frames.labels(*pair)
        for side in ("before", "after"):
            self._scores.labels(*pair, side)
        for reason in FAILURE_CODES:
            self._failures.labels(*pair, reason)
        if len(set(classes)) <= MAX_CLASSES:
            for name in classes:
                for kind in get_args(Kind):
                    self._detections.labels(*pair, self._class_label(pair[0], name), kind)

    def observe_changes(self, pair: ShadowPair, changes: Sequence[Change]) -> None:
        """Count a frame with what became of its detections."""
        self._frames.labels(*pair).inc()
        kinds = Tally((self._class_label(pair[0], change.name), change.kind) for change in changes)
        for (name, kind), count in kinds.items():
            self._detections.labels(*pair, name, kind).inc(count)
        paired = [change for change in changes if change.kind in ("matched", "renamed")]
        if not paired:
            return
        before = sum(change.score for change in paired)
        self._scores.labels(*pair, "before").inc(before)
        self._scores.labels(*pair, "after").inc(before + sum(change.score_shift for change in paired))
        shifts = self._shifts.labels(*pair)
        moved = (self._losses if paired[0].range_m is None else self._moved).labels(*pair)
        for change in paired:
            shifts.observe(change.score_shift)
            moved.observe(change.moved)

    def observe_failure(self, pair: ShadowPair, reason: str) -> None:
        """Count a frame that the shadow failed on."""
        self._failures.labels(*pair, reason).inc()

    def observe_drop(self, pair: ShadowPair, reason: str) -> None:
        """Count a frame that was not sent, or whose answers were not compared."""
        self._dropped.labels(*pair, reason).inc()

    def _class_label(self, model: str, name: str) -> str:
        with self._lock:
            known = self._classes.setdefault(model, set())
            if name not in known and len(known) < MAX_CLASSES:
                known.add(name)
            return name if name in known else OTHER
