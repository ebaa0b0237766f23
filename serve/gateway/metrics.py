"""Prometheus metrics of the gateway, with labels of bounded cardinality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.errors import (
    BackendBroken,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    OutOfMemory,
    Overloaded,
    ServeError,
    UnknownOption,
)
from serve.gateway.admission import Admission
from serve.gateway.batcher import BatchReport
from serve.gateway.rollout import Rollout
from serve.gateway.tracks import TrackSessions

__all__ = ["CONTENT_TYPE", "DEPRECATED_NAMES", "FAILURE_CODES", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Old name → new name. A renamed metric is exported under both names for one version.
DEPRECATED_NAMES: Mapping[str, str] = {
    "mmdet3d_serve_queue_seconds": "mmdet3d_serve_queue_duration_seconds",
    "mmdet3d_serve_inference_seconds": "mmdet3d_serve_batch_duration_seconds",
    "mmdet3d_serve_request_seconds": "mmdet3d_serve_request_duration_seconds",
}
#: Codes of the errors with which a version fails on a frame that another one answers.
FAILURE_CODES = tuple(
    each.code
    for each in (
        ServeError, BackendBroken, DeadlineExceeded, InferenceFailed, NotReady, OutOfMemory, Overloaded, UnknownOption
    )
)  # fmt: skip
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FRAMES = (1, 2, 4, 8, 16, 32, 64)
_COST = (1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(
        self, admission: Admission, is_registered: Callable[[str], bool], sessions: TrackSessions
    ) -> None:
        """Create the metrics; requests for a model that is not registered are counted under ``model=""``.

        Attributes:
            registry: theirs, in which others may create more.
            on_exposition: called before each exposition, to create series that count 0 so far. Prometheus' `increase`
                compares samples: what a series has when it is first scraped is no increase.
            texts: called for further families, in the same text format, with names that are not in `registry`.
        """
        registry = self.registry = CollectorRegistry()
        self.on_exposition: list[Callable[[], None]] = []
        self.texts: list[Callable[[], str]] = []
        self._is_registered = is_registered
        self._batch_children: dict[str, tuple[Histogram, Histogram, Histogram, Histogram]] = {}
        self._request_children: dict[tuple[str, int], tuple[Histogram, Counter]] = {}
        self._version_children: dict[tuple[str, str, int], tuple[Histogram, Counter]] = {}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"mmdet3d_serve_{name}", text, ("model",), buckets=buckets, registry=registry)

        self._queue_s = histogram(
            "queue_duration_seconds", "Time a frame waited for its batch, in seconds", _SECONDS
        )
        self._batch_frames = histogram("batch_frames", "Frames per batch", _FRAMES)
        self._batch_cost = histogram("batch_cost", "Points or pixels per batch", _COST)
        self._batch_s = histogram(
            "batch_duration_seconds", "Time from sending a batch to its answer, in seconds", _SECONDS
        )
        self._request_s = histogram(
            "request_duration_seconds", "Time of a request from end to end, in seconds", _SECONDS
        )
        self._requests = Counter(
            "mmdet3d_serve_requests", "Requests by HTTP status", ("model", "status"), registry=registry
        )
        self._version_s = Histogram(
            "mmdet3d_serve_version_request_duration_seconds",
            "Time of a request from end to end by the version that it was given to, in seconds",
            ("model", "version"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._version_requests = Counter(
            "mmdet3d_serve_version_requests",
            "Requests by the version that they were given to, and by HTTP status",
            ("model", "version", "status"),
            registry=registry,
        )
        self._fallbacks = Counter(
            "mmdet3d_serve_canary_fallbacks",
            "Requests and frames of a canary that went to the default version",
            ("model", "version", "reason"),
            registry=registry,
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
            ("track_sessions", "Sequences whose objects are tracked", lambda: len(sessions)),
            ("tracks", "Tracks of all sequences", lambda: sessions.tracks),
            (
                "track_sessions_expired",
                "Sequences that ended because they were idle, since the start",
                lambda: sessions.expired,
            ),
        ):
            Gauge(f"mmdet3d_serve_{name}", text, registry=registry).set_function(value)
        self._calls = Counter(
            "mmdet3d_serve_grpc_calls", "gRPC calls by status", ("method", "status"), registry=registry
        )
        self._samples = Counter(
            "mmdet3d_serve_sampled_frames",
            "Frames chosen for the sample: kept, limited (over the rate), busy (not taken) or failed (not written)",
            ("model", "outcome"),
            registry=registry,
        )
        self._streams = Gauge("mmdet3d_serve_grpc_streams", "Open streams of frames", registry=registry)
        self._ready = Gauge(
            "mmdet3d_serve_ready", "1 if the latest readiness check passed, else 0", registry=registry
        )
        registry.register(_DeprecatedNames(self._queue_s, self._batch_s, self._request_s))

    def observe_batch(self, model: str, report: BatchReport) -> None:
        """Count a batch that ran."""
        frames, cost, run_s, queue_s = self._of_batch(model)
        frames.observe(report.items)
        cost.observe(report.cost)
        run_s.observe(report.run_s)
        for waited_s in report.queue_s:
            queue_s.observe(waited_s)
        if report.failed:
            self._failed.labels(model).inc()

    def observe_request(self, model: str | None, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        label = model if model is not None and self._is_registered(model) else ""
        request_s, requests = self._of_request(label, status)
        request_s.observe(seconds)
        requests.inc()

    def observe_version(self, model: str, version: str, status: int, seconds: float) -> None:
        """Count a request that a registered version of a model was chosen for."""
        key = model, version, status
        if key not in self._version_children:
            self._version_children[key] = (
                self._version_s.labels(model, version),
                self._version_requests.labels(model, version, str(status)),
            )
        request_s, requests = self._version_children[key]
        request_s.observe(seconds)
        requests.inc()

    def show_rollout(self, rollout: Rollout) -> None:
        """Show whether the file of shares, if there is one, could be read."""
        if rollout.file is not None:
            Gauge(
                "mmdet3d_serve_rollout_file_valid",
                "1 if the file of shares could be read when it last changed, else 0",
                registry=self.registry,
            ).set_function(lambda: rollout.is_file_valid)

    def show_fallbacks(self, model: str, version: str, reasons: Iterable[str]) -> None:
        """Show that there is a canary, by counts of 0."""
        for reason in reasons:
            self._fallbacks.labels(model, version, reason)

    def observe_fallback(self, model: str, version: str, reason: str) -> None:
        """Count what a canary did not answer."""
        self._fallbacks.labels(model, version, reason).inc()

    def observe_call(self, method: str, status: str) -> None:
        """Count a gRPC call that ended, beside the requests that it was."""
        self._calls.labels(method, status).inc()

    def observe_sample(self, model: str, outcome: str) -> None:
        """Count a frame that was chosen for the sample; may be called by any thread."""
        self._samples.labels(model, outcome).inc()

    def count_streams(self, count: Callable[[], int]) -> None:
        """Show what `count` returns as the number of open streams."""
        self._streams.set_function(count)

    # Looked up once: a look-up takes longer than an observation. The labels are bounded, and so are these.

    def _of_batch(self, model: str) -> tuple[Histogram, Histogram, Histogram, Histogram]:
        if model not in self._batch_children:
            families = (self._batch_frames, self._batch_cost, self._batch_s, self._queue_s)
            self._batch_children[model] = tuple(family.labels(model) for family in families)  # type: ignore[assignment]
        return self._batch_children[model]

    def _of_request(self, model: str, status: int) -> tuple[Histogram, Counter]:
        if (model, status) not in self._request_children:
            self._request_children[model, status] = (
                self._request_s.labels(model),
                self._requests.labels(model, str(status)),
            )
        return self._request_children[model, status]

    def set_ready(self, ready: bool) -> None:
        """Record the outcome of a readiness check."""
        self._ready.set(ready)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        for show in self.on_exposition:
            show()
        return generate_latest(self.registry) + "".join(text() for text in self.texts).encode()


class _DeprecatedNames(Collector):
    """Exports renamed metrics under their old names as well; each is observed once."""

    def __init__(self, *renamed: Histogram) -> None:
        self._renamed = renamed

    def collect(self) -> Iterator[Metric]:
        old_names = {new: old for old, new in DEPRECATED_NAMES.items()}
        for histogram in self._renamed:
            for metric in histogram.collect():
                old = Metric(old_names[metric.name], f"Deprecated: use {metric.name}", metric.type)
                for sample in metric.samples:
                    suffix = sample.name.removeprefix(metric.name)
                    old.samples.append(sample._replace(name=old.name + suffix))
                yield old
