"""OpenTelemetry spans, where an exporter is configured; nothing otherwise.

The one place that knows OpenTelemetry. It is an optional extra; without it a configured exporter stops the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from serve.errors import SettingsError

__all__ = ["Span", "Tracing"]


class Span(Protocol):
    """One request's span."""

    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Note how it ended."""


class _NoSpan:
    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Nothing is traced."""


_NO_SPAN = _NoSpan()


class Tracing:
    """Makes a span per request, as a child of the caller's where it names one (W3C ``traceparent``)."""

    def __init__(self, endpoint: str | None) -> None:
        """Export to `endpoint` (OTLP over HTTP), or trace nothing.

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
        """A span around a request."""
        if self._provider is None:
            yield _NO_SPAN
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"{method} {path}", context=extract(dict(headers)), kind=SpanKind.SERVER
        ) as span:
            yield _OpenSpan(span)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


class _OpenSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, status: int, state: Mapping[str, Any]) -> None:
        """Note status, model, frames and where the time went."""
        self._span.set_attribute("http.response.status_code", status)
        for name in ("request_id", "model", "frames", "error"):
            if state.get(name) is not None:
                self._span.set_attribute(f"mmdet3d_serve.{name}", state[name])
        if (timing := state.get("timing")) is not None:
            for stage, seconds in asdict(timing).items():
                self._span.set_attribute(f"mmdet3d_serve.{stage}", seconds)
