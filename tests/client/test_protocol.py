"""`serve.client` over a real socket: answers, and an error of `serve.errors` for every failure."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve import errors
from serve.client import Client, Retry
from serve.errors import error_from_response

DETECTIONS = {"bboxes_3d": [[1, 2, 3, 4, 5, 6, 0.5]], "scores_3d": [0.75], "labels_3d": [0]}


class FakeServer(ThreadingHTTPServer):
    """Answers every POST with ``status`` and ``body`` and remembers the request; None: waits for ``gate``."""

    daemon_threads = True

    def __init__(self) -> None:
        self.status, self.body, self.gate = 200, json.dumps(DETECTIONS).encode(), threading.Event()
        self.gate.set()
        self.seen: dict[str, Any] = {}
        super().__init__(("127.0.0.1", 0), Answering)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen = {"path": self.path, "headers": dict(self.headers), "body": sent}
        self.server.gate.wait(30)
        if self.server.status:
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


def test_client_sends_bytes_options_and_token_and_returns_the_answer(server: FakeServer) -> None:
    with Client(server.address, token="secret-token") as client:
        answer = client.predict(
            b"\x00\x01points", "a model/x", "1.0", content_type="image/png", score_thr=0.25, max_detections=7
        )
    assert answer == DETECTIONS
    assert server.seen["path"] == "/predictions/a%20model%2Fx/1.0"
    assert (server.seen["headers"]["X-Score-Thr"], server.seen["headers"]["X-Max-Detections"]) == (
        "0.25",
        "7",
    )
    assert server.seen["headers"]["Authorization"] == "Bearer secret-token"
    assert server.seen["headers"]["Content-Type"] == "image/png"
    assert server.seen["body"] == b"\x00\x01points"


def test_client_sends_sweeps_as_parts_or_declares_them_accumulated(server: FakeServer) -> None:
    with Client(server.address) as client:
        client.predict({"points": b"key", "sweep.0": b"old", "sweeps": b"[]"}, "centerpoint")
        form = server.seen["body"]
        assert all(f'name="{part}"'.encode() in form for part in ("points", "sweep.0", "sweeps"))
        client.predict(b"cloud", "centerpoint", sweeps="accumulated", columns="x,y,z,intensity,time")
    assert server.seen["headers"]["X-Sweeps"] == "accumulated"
    assert server.seen["headers"]["X-Columns"] == "x,y,z,intensity,time"
    assert server.seen["body"] == b"cloud"


def test_client_sends_no_options_by_default(server: FakeServer) -> None:
    with Client(f"http://{server.address}") as client:
        client.predict(b"", "second")
    assert server.seen["path"] == "/predictions/second"
    assert not {"Authorization", "X-Score-Thr", "X-Max-Detections"} & set(server.seen["headers"])


def test_refused_connection_raises_not_ready_with_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with (
            Client(address) as client,
            pytest.raises(errors.NotReady, match=address),
        ):
            client.predict(b"", "second")


def test_missing_answer_raises_deadline_exceeded(server: FakeServer) -> None:
    server.gate.clear()
    with Client(server.address) as client, pytest.raises(errors.DeadlineExceeded):
        client.predict(b"", "second", timeout_s=0.05)


def test_lost_connection_raises_backend_broken(server: FakeServer) -> None:
    server.status = 0
    with Client(server.address) as client, pytest.raises(errors.BackendBroken):
        client.predict(b"", "second")


@pytest.mark.parametrize("body", [b"", b"[]", b"[1, 2]", b"not json", b"\xff\xfe", b"3", b"null"])
def test_answer_without_detections_raises_backend_broken(server: FakeServer, body: bytes) -> None:
    server.body = body
    with Client(server.address) as client, pytest.raises(errors.BackendBroken):
        client.predict(b"", "second")


def test_error_body_with_status_200_raises(server: FakeServer) -> None:
    server.body = b'{"error": {"code": "inference_failed", "message": "no"}}'
    with Client(server.address) as client, pytest.raises(errors.InferenceFailed):
        client.predict(b"", "second")


@pytest.mark.parametrize(
    ("status", "body", "kind", "quoted"),
    [
        (422, errors.error_body(errors.NonFinitePoints("NaN there")), errors.NonFinitePoints, "NaN there"),
        (400, errors.error_body(errors.UnknownOption("score_thr=x")), errors.UnknownOption, "score_thr=x"),
        (413, errors.error_body(errors.FrameTooLarge("too many points")), errors.FrameTooLarge, "too many"),
        (507, errors.error_body(errors.OutOfMemory("one frame")), errors.OutOfMemory, "one frame"),
        (418, {"error": {"code": "never_heard_of", "message": "tea"}}, errors.ClientError, "tea"),
        (422, {"error": {}}, errors.UndecodableFrame, "422"),
        (404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: x"},
         errors.ModelNotFound, "Model not found: x"),
        (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"},
         errors.NotReady, "Prediction failed"),
        (503, {"code": 503, "type": "ServiceUnavailableException",
               "message": "Model has no worker to serve: the queue is full"}, errors.Overloaded, "queue"),
        (500, None, errors.InferenceFailed, "500"),
        (599, ["odd"], errors.BackendBroken, "599"),
    ],
)  # fmt: skip
def test_error_body_raises_the_class_of_its_code(
    server: FakeServer, status: int, body: Any, kind: type[errors.ServeError], quoted: str
) -> None:
    server.status, server.body = status, json.dumps(body).encode()
    with Client(server.address, retry=Retry(())) as client, pytest.raises(kind, match=quoted) as caught:
        client.predict(b"", "second")
    assert type(caught.value) is kind


def test_every_error_class_round_trips_through_its_body() -> None:
    def walk(kind: type[errors.ServeError]) -> Iterator[type[errors.ServeError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from walk(child)

    kinds = [kind for kind in walk(errors.ServeError) if kind.__module__.startswith("serve.")]
    for kind in kinds:  # tests have some of their own
        back = error_from_response(kind.status, errors.error_body(kind("why")))
        assert (back.code, back.status, str(back)) == (kind.code, kind.status, "why")


@pytest.mark.parametrize("address", ["", "http://", "ftp://host", "host:port", "[::1"])
def test_invalid_address_is_rejected(address: str) -> None:
    with pytest.raises(errors.BadRequest):
        Client(address)


def test_proxies_in_the_environment_are_ignored(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Client(server.address) as client:
        assert client.predict(b"", "second") == DETECTIONS


def test_token_is_in_no_message_or_repr() -> None:
    with Client("127.0.0.1:9", token="secret-token") as client:
        with pytest.raises(errors.NotReady) as caught:
            client.predict(b"", "second")
        assert "secret-token" not in str(caught.value) + repr(client)


DESCRIBED = [
    {"name": "second", "version": "1.0", "default": False, "modality": "image"},
    {"name": "second", "version": "2.0", "default": True, "modality": "lidar"},
]


@pytest.mark.parametrize(("version", "modality"), [(None, "lidar"), ("1.0", "image")])
def test_a_model_is_described_by_the_gateway(version: str | None, modality: str) -> None:
    with running() as server, Client(server.address) as client:
        server.body = json.dumps(DESCRIBED).encode()
        found = client.describe("second", version)
        assert found is not None and found["modality"] == modality
        assert server.seen["path"] == "/models/second"
        with pytest.raises(errors.ModelNotFound):
            client.describe("second", "3.0")


@pytest.mark.parametrize("status", [404, 405])
def test_torchserves_predictions_port_describes_no_model(status: int) -> None:
    with running() as server, Client(server.address) as client:
        server.status = status
        server.body = b'{"code": 404, "type": "ResourceNotFoundException", "message": "not found"}'
        assert client.describe("second") is None


def test_a_model_that_the_gateway_does_not_have_is_an_error() -> None:
    with running() as server, Client(server.address) as client:
        server.status = 404
        server.body = b'{"error": {"code": "model_not_found", "message": "model \'x\' not found"}}'
        with pytest.raises(errors.ModelNotFound):
            client.describe("x")


def test_the_bytes_of_an_answer_can_be_had() -> None:
    body = b'{"bboxes_3d":[[0.0000036159506]],"scores_3d":[0.5],"labels_3d":[0]}'
    with running() as server, Client(server.address) as client:
        server.body = body
        result = client.predict(b"frame", "second", score_thr=0.25)
        assert result.encoded == body and result == json.loads(body)
        assert server.seen["headers"]["X-Score-Thr"] == "0.25"
