"""Connections of the client: addresses, redirects, forked processes, deadlines, an end by Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import errors
from serve.client import AsyncClient, Client, Retry
from tests.client.test_protocol import FakeServer, running
from tests.gateway.running import eventually


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


@pytest.mark.parametrize("form", ["http://{}/below/", "http://{}/below", "{}/below/", " {}/below\n"])
def test_path_of_the_address_comes_before_that_of_the_call(server: FakeServer, form: str) -> None:
    with Client(form.format(server.address)) as client:
        client.predict(b"", "second")
    assert server.seen["path"] == "/below/predictions/second"
    assert server.seen["headers"]["User-Agent"].startswith("mmdet3d-serve-client/")


@pytest.mark.parametrize(
    "address", ["unix:/run/x.sock", "host:99999", "host:-1", "host:0x1", "host/?a=b", "host/#a", "::1:80"]
)
def test_address_of_no_server_is_refused(address: str) -> None:
    with pytest.raises(errors.BadRequest):
        Client(address)


def test_password_of_an_address_is_in_no_message(server: FakeServer) -> None:
    server.status, server.body = 200, b"no answer"
    with Client(f"http://user:hidden@{server.address}") as client:
        with pytest.raises(errors.BackendBroken) as caught:
            client.predict(b"", "second")
        assert "Authorization" in server.seen["headers"]
    with pytest.raises(errors.BadRequest) as refused:
        Client("http://user:hidden@host:99999")
    assert "hidden" not in str(caught.value) + str(refused.value) + repr(client)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed(server: FakeServer, status: int) -> None:
    server.status = status
    with Client(server.address, token="secret") as client, pytest.raises(errors.BackendBroken):
        client.predict(b"", "second")


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "3", True])
def test_deadline_that_is_none_is_refused_before_anything_is_sent(server: FakeServer, seconds: Any) -> None:
    with Client(server.address) as client, pytest.raises(errors.UnknownOption):
        client.predict(b"", "second", timeout_s=seconds)
    with pytest.raises(errors.UnknownOption):
        Client(server.address, timeout_s=seconds)
    assert not server.seen


def test_deadline_may_be_endless(server: FakeServer) -> None:
    with Client(server.address, timeout_s=math.inf) as client:
        assert client.predict(b"", "second").scores.tolist() == [0.75]
        assert client.predict(b"", "second", timeout_s=math.inf)["labels_3d"] == [0]


def test_error_of_a_deadline_names_that_of_the_call(server: FakeServer) -> None:
    server.status, server.body = 503, json.dumps(errors.error_body(errors.NotReady("why"))).encode()
    pauses = Retry((0.1,), kinds=(errors.NotReady,))
    with Client(server.address) as client:
        steps = client._calls.predict(b"", "second", None, {}, timeout_s=8.5, retry=pauses)
        assert [step.deadline_s for step in steps_of(steps, client) if hasattr(step, "deadline_s")] == [
            8.5,
            8.5,
        ]


def steps_of(steps: Any, client: Client) -> list[Any]:
    """Drive a call over the network; returns its steps."""
    found, value = [], None
    try:
        while True:
            found.append(steps.send(value))
            value = found[-1].call() if hasattr(found[-1], "call") else None
            if hasattr(found[-1], "request"):
                value = client._send(found[-1])
    except (StopIteration, errors.ServeError):
        return found


@pytest.mark.parametrize("name", ["", ".", "..", 1.0])
def test_name_that_is_none_is_refused(server: FakeServer, name: Any) -> None:
    with Client(server.address) as client:
        with pytest.raises(errors.BadRequest):
            client.predict(b"", name)
        with pytest.raises(errors.BadRequest):
            client.predict(b"", "second", name)
    assert not server.seen


def test_answer_nested_too_deep_is_a_broken_backend(server: FakeServer) -> None:
    server.body = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with Client(server.address) as client, pytest.raises(errors.BackendBroken):
        client.predict(b"", "second")


@pytest.mark.parametrize("token", ["hidden-\u2013key", "hidden-\x00key", "hidden-key\r\nX-Evil: 1"])
def test_token_that_no_header_can_hold_is_refused_and_in_no_message(token: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.BadRequest) as caught:
            kind("127.0.0.1:8000", token=token)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "sent"), [("key\n", "Bearer key"), (" key ", "Bearer key"), ("", None), ("\n", None)]
)
def test_token_of_a_file_is_sent_without_its_line_break(
    server: FakeServer, token: str, sent: str | None
) -> None:
    with Client(server.address, token=token) as client:
        client.predict(b"", "second")
    assert server.seen["headers"].get("Authorization") == sent


def test_closed_client_is_an_error_of_the_caller_and_may_be_closed_again(server: FakeServer) -> None:
    async def ask() -> None:
        async with AsyncClient(server.address) as client:
            pass
        await client.close()
        await client.predict(b"", "second")

    with Client(server.address) as client:
        pass
    client.close()
    with pytest.raises(errors.BadRequest):
        client.predict(b"", "second")
    with pytest.raises(errors.BadRequest):
        list(client.predict_many([b""], "second"))
    with pytest.raises(errors.BadRequest):
        asyncio.run(asyncio.wait_for(ask(), 10))
    assert not server.seen


def test_array_of_paths_is_many_frames(server: FakeServer, tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.bin" for k in range(3)]
    for path in paths:
        path.write_bytes(b"points")
    two: Any = np.int64(2)
    with Client(server.address) as client:
        for frames in (np.array([str(path) for path in paths]), np.array(paths, object)):
            assert len(list(client.predict_many(frames, "second", concurrency=two))) == 3


ONE = [
    b"points", "frame.bin", {"points": b""}, np.zeros((3, 4), np.float32), np.zeros((5, 7, 3), np.uint8),
    io.BytesIO(b"points"),
]  # fmt: skip


@pytest.mark.parametrize("frames", ONE)
def test_a_single_frame_is_not_taken_apart(server: FakeServer, frames: Any) -> None:
    with Client(server.address) as client, pytest.raises(errors.UndecodableFrame):
        list(client.predict_many(frames, "second"))
    assert not server.seen


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "8", True])
def test_concurrency_that_is_none_is_refused(server: FakeServer, concurrency: Any) -> None:
    async def ask() -> None:
        async with AsyncClient(server.address) as client:
            async for _ in client.predict_many([b""], "second", concurrency=concurrency):
                pass

    with Client(server.address) as client, pytest.raises(errors.UnknownOption):
        list(client.predict_many([b""], "second", concurrency=concurrency))
    with pytest.raises(errors.UnknownOption):
        asyncio.run(asyncio.wait_for(ask(), 10))


def test_error_of_the_callers_frames_is_raised_and_nothing_is_left(server: FakeServer) -> None:
    class OfTheCaller(Exception):
        pass

    def frames() -> Iterator[bytes]:
        yield b"first"
        raise OfTheCaller

    with Client(server.address) as client, pytest.raises(OfTheCaller):
        list(client.predict_many(frames(), "second"))


# Processes

FORKING = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from serve.client import Client

class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        answer = json.dumps({"sent": sent}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *_): ...

server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = Client(f"127.0.0.1:{server.server_port}")
client.predict(b"parent", "m")
before, after = client._connections.get(), None
child = os.fork()
if not child:
    ok = client._connections.get() is not before
    ok = ok and all(client.predict(f"{k}".encode(), "m")["sent"] == f"{k}" for k in range(20))
    os._exit(0 if ok else 1)
right = all(client.predict(f"p{k}".encode(), "m")["sent"] == f"p{k}" for k in range(20))
_, status = os.waitpid(child, 0)
os._exit(0 if right and status == 0 and client._connections.get() is before else 1)
"""


def test_forked_process_does_not_use_its_parents_connections() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


INTERRUPTED = """
import sys
from serve.client import Client
results = Client(sys.argv[1]).predict_many([b"frame"] * 9, "m", concurrency=2)
print("asked", flush=True)
try:
    next(results)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_program_whose_requests_are_not_answered(server: FakeServer) -> None:
    server.gate.clear()
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, server.address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None and program.stdout.readline() == "asked\n"
        eventually(lambda: server.seen)
        os.kill(program.pid, signal.SIGINT)
        out, _ = program.communicate(timeout=10)  # before `gate` opens
        assert (program.returncode, out) == (0, "interrupted\n")
    finally:
        program.kill()
        program.wait()
