"""Spans reach a real OTLP receiver as children of the caller's; nothing is traced without an exporter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.responses import PlainTextResponse

from serve.gateway.admission import Admission
from serve.gateway.metrics import Metrics
from serve.gateway.middleware import RequestMiddleware
from serve.gateway.options import GatewayOptions
from serve.gateway.response import Timing
from serve.gateway.tracing import Tracing
from serve.gateway.tracks import TrackSessions

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            bodies.append(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


async def app(scope, receive, send):
    scope["state"] |= {"model": "second", "frames": 2, "timing": Timing(queue_s=0.25)}
    await PlainTextResponse("hello", 200)(scope, receive, send)


def ask(tracing: Tracing, headers: dict[str, str]) -> httpx.Response:
    enveloped = RequestMiddleware(
        app,
        keys=(),
        admission=Admission(1, 1),
        metrics=Metrics(Admission(1, 1), lambda name: False, TrackSessions(GatewayOptions())),
        tracing=tracing,
    )

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(enveloped)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get("/predictions/second", headers=headers)

    return asyncio.run(send())


def test_request_creates_a_child_span_of_the_callers(receiver):
    endpoint, bodies = receiver
    tracing = Tracing(endpoint)
    assert ask(tracing, {"traceparent": PARENT, "x-request-id": "mine"}).status_code == 200
    tracing.close()
    (body,) = bodies
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (span,) = resource.scope_spans[0].spans
    attributes = {pair.key: pair.value for pair in span.attributes}
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["mmdet3d_serve.request_id"].string_value == "mine"
    assert attributes["mmdet3d_serve.frames"].int_value == 2
    assert attributes["mmdet3d_serve.queue_s"].double_value == 0.25


def test_opentelemetry_is_not_imported_without_an_exporter():
    code = (
        "import sys; from serve.gateway.app import create_app; from serve.gateway.options import GatewayOptions\n"
        "create_app(GatewayOptions()); assert not any(name.startswith('opentelemetry.sdk') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exporter_without_the_extra_is_a_settings_error():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from serve.errors import SettingsError; from serve.gateway.tracing import Tracing\n"
        "try: Tracing('http://127.0.0.1:4318')\n"
        "except SettingsError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "requirements/otel.lock" in output
