"""Prometheus metrics of the gateway, with labels that cannot grow without bound.

Knows what is counted, not who counts.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serve.gateway.admission import Admission
from serve.gateway.batcher import BatchReport

__all__ = ["CONTENT_TYPE", "Measures"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FRAMES = (1, 2, 4, 8, 16, 32, 64)
_COST = (1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)


class Measures:
    """All metrics of one gateway, in a registry of its own."""

    def __init__(self, admission: Admission, known: Callable[[str], bool]) -> None:
        """`known` says whether a model of that name is served; others are all counted under ``""``."""
        registry = self._registry = CollectorRegistry()
        self._known = known

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ("model",)
        ) -> Histogram:
            return Histogram(f"mmdet3d_serve_{name}", text, labels, buckets=buckets, registry=registry)

        self._queue_s = histogram("queue_seconds", "Time a frame waited for its batch", _SECONDS)
        self._batch_frames = histogram("batch_frames", "Frames per batch", _FRAMES)
        self._batch_cost = histogram("batch_cost", "Points or pixels per batch", _COST)
        self._inference_s = histogram(
            "inference_seconds", "Time of a batch, from sending it to its answer", _SECONDS
        )
        self._request_s = histogram("request_seconds", "Time of a request, end to end", _SECONDS)
        self._requests = Counter(
            "mmdet3d_serve_requests", "Requests by HTTP status", ("model", "status"), registry=registry
        )
        self._failed = Counter(
            "mmdet3d_serve_failed_batches", "Batches that failed as a whole", ("model",), registry=registry
        )
        for name, text, value in (
            ("pending_frames", "Frames waiting or running", lambda: admission.items),
            ("pending_bytes", "Bytes held for requests", lambda: admission.bytes),
            (
                "pending_ratio",
                "Share of the pending limits in use, the larger of frames and bytes; scale on this",
                lambda: max(admission.items / admission.max_items, admission.bytes / admission.max_bytes),
            ),
        ):
            Gauge(f"mmdet3d_serve_{name}", text, registry=registry).set_function(value)
        self._ready = Gauge("mmdet3d_serve_ready", "1 when the last look found it ready", registry=registry)

    def batch(self, model: str, report: BatchReport) -> None:
        """Count a batch that ran."""
        self._batch_frames.labels(model).observe(report.items)
        self._batch_cost.labels(model).observe(report.cost)
        self._inference_s.labels(model).observe(report.run_s)
        queue_s = self._queue_s.labels(model)
        for waited in report.queue_s:
            queue_s.observe(waited)
        if report.failed:
            self._failed.labels(model).inc()

    def request(self, model: str | None, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        label = model if model is not None and self._known(model) else ""
        self._request_s.labels(label).observe(seconds)
        self._requests.labels(label, str(status)).inc()

    def ready(self, ready: bool) -> None:
        """Note what a look at readiness found."""
        self._ready.set(ready)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
