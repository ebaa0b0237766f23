"""OpenTelemetry spans, if an exporter is configured.

OpenTelemetry is an optional extra; the gateway does not start if an exporter is configured without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from serve.errors import MAX_QUOTED_CHARS, SettingsError

__all__ = ["Span", "Tracing"]


class Span(Protocol):
    """Span of one request."""

    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Record the outcome of the request."""


class _NoSpan:
    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Record nothing."""


_NO_SPAN = _NoSpan()


class Tracing:
    """Creates a span per request, as a child of the caller's span if it sends one (W3C ``traceparent``)."""

    def __init__(self, endpoint: str | None) -> None:
        """Export to `endpoint` (OTLP over HTTP); None disables tracing.

        Raises:
            SettingsError: the extra is not installed.
        """
        self._provider: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SettingsError(
                "otlp_endpoint is set, but OpenTelemetry is not installed: pip install -r requirements/otel.lock"
            ) from None
        address = endpoint.rstrip("/")
        if not address.endswith("/v1/traces"):
            address += "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "mmdet3d-serve-gateway"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
        self._tracer = self._provider.get_tracer("serve.gateway")

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Open the span of a request."""
        if self._provider is None:
            yield _NO_SPAN
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"{method} {path[:MAX_QUOTED_CHARS]}", context=extract(dict(headers)), kind=SpanKind.SERVER
        ) as span:
            yield _OpenSpan(span)

    def close(self) -> None:
        """Export the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()


class _OpenSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Record status, model, frames and stage durations."""
        self._span.set_attribute("http.response.status_code", status)
        for name in ("request_id", "model", "frames", "error"):
            if state.get(name) is not None:
                self._span.set_attribute(f"mmdet3d_serve.{name}", state[name])
        if (timing := state.get("timing")) is not None:
            for stage, seconds in asdict(timing).items():
                self._span.set_attribute(f"mmdet3d_serve.{stage}", seconds)
