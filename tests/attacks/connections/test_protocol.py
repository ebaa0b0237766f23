"""Requests that are no proper HTTP/1.1, or leave it, and clients that end one side of their connection."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

import pytest

from tests.attacks.connections.conftest import get, pending, post
from tests.attacks.connections.test_permits import FRAME, PATH, connect
from tests.gateway import raw
from tests.gateway.fake_torchserve import answer_for
from tests.gateway.running import eventually

LIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


def everything(connection: socket.socket) -> bytes:
    """All that comes until the gateway ends the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /predictions/second HTTP/1.1\r\nhost: a\r\n", 200),
        (b"POST /predictions/second HTTP/1.1\r\nhost:\r\n", 200),
        (b"POST /predictions/second HTTP/1.0\r\n", 200),
        (b"POST /predictions/second HTTP/1.0\r\nhost: a\r\n", 200),
        (b"POST /predictions/second HTTP/1.1\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: a\r\nhost: a\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: a\r\nHOST: b\r\n", 400),
        (b"POST /predictions/second HTTP/1.0\r\nhost: a\r\nhost: b\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: [::1]:80\r\n", 200),
        (b"POST /predictions/second HTTP/1.1\r\nhost: \ta_b.example:\t\r\n", 200),
        (b"POST /predictions/second HTTP/1.1\r\nhost: a b\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: a/b\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: user@a\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: a:x\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: [::1\r\n", 400),
        (b"POST /predictions/second HTTP/1.1\r\nhost: \xff\r\n", 400),
        (b"POST /predictions/second HTTP/1.0\r\nhost: a b\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n", 400),
        (b"PRI * HTTP/2.0\r\n", 400),
    ],
)
def test_request_has_exactly_one_host(attacked, stack, head, status):
    gateway = attacked()
    connection = connect(stack, gateway)
    connection.sendall(head + b"content-length: %d\r\n\r\n" % len(FRAME) + FRAME)
    received = raw.answer(connection)
    assert raw.status(received) == status
    if status == 400:
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
        assert everything(connection) == b""  # closed


@pytest.mark.parametrize(
    ("coding", "status"),
    [
        (b"transfer-encoding: chunked\r\n", 200),
        (b"transfer-encoding:\tCHUNKED \r\n", 200),
        (b"transfer-encoding: gzip, chunked\r\n", 400),
        (b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", 400),
        (b"transfer-encoding: , chunked\r\n", 400),
    ],
)
def test_body_has_no_coding_but_chunked(attacked, stack, coding, status):
    gateway = attacked()
    connection = connect(stack, gateway)
    connection.sendall(
        b"POST /predictions/second HTTP/1.1\r\nhost: a\r\n"
        + coding
        + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(FRAME), FRAME)
    )
    assert raw.status(raw.answer(connection)) == status


@pytest.mark.parametrize("hold", [False, True], ids=["at once", "while it is computed"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_request_of_a_half_closed_connection_is_answered(attacked, backend, stack, hold, version):
    gateway = attacked()
    if hold:
        backend.hold(FRAME)
    connection = connect(stack, gateway)
    connection.sendall(raw.request(PATH, FRAME).replace(b"HTTP/1.1", b"HTTP/" + version))
    connection.shutdown(socket.SHUT_WR)
    if hold:
        eventually(lambda: backend.app.held == 1)
        time.sleep(0.3)  # longer than it takes to see that the client has not gone
        backend.release()
    received = everything(connection)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n") and received.endswith(answer_for(FRAME, {}))
    assert pending(gateway) == (0, 0)


def test_every_request_sent_ahead_on_a_half_closed_connection_is_answered(attacked, stack):
    gateway = attacked()
    connection = connect(stack, gateway)
    connection.sendall((raw.request(PATH, FRAME) + LIVE) * 200)
    connection.shutdown(socket.SHUT_WR)
    assert statuses(everything(connection)) == [200] * 400


def test_request_that_ends_too_early_is_closed(attacked, stack):
    gateway = attacked()
    for cut in (10, 60, len(raw.request(PATH, FRAME)) - 1):
        connection = connect(stack, gateway)
        connection.sendall(raw.request(PATH, FRAME)[:cut])
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
    assert pending(gateway) == (0, 0)


def test_client_that_has_gone_while_its_frame_waits_gives_its_permit_back(attacked, backend, stack):
    backend.app.models["second"]["1.0"].workers = [1]
    gateway = attacked(batch_frames=1, prefetch_batches=0)
    backend.hold(FRAME)
    first, gone = (connect(stack, gateway) for _ in range(2))
    first.sendall(raw.request(PATH, FRAME))
    eventually(lambda: backend.app.held == 1)
    gone.sendall(raw.request(PATH, b"\1" * 64))
    eventually(lambda: pending(gateway)[0] == 2)
    gone.close()
    eventually(lambda: pending(gateway)[0] == 1, 5)
    backend.release()
    assert raw.status(raw.answer(first)) == 200
    assert [b"\1" * 64] not in backend.app.calls


@pytest.mark.parametrize("ahead", [2, 20, 2000])
def test_client_that_has_gone_after_requests_sent_ahead_gives_its_permits_back(
    attacked, backend, stack, ahead
):
    backend.app.models["second"]["1.0"].workers = [1]
    gateway = attacked(batch_frames=1, prefetch_batches=0)
    backend.hold(FRAME)
    first, gone = (connect(stack, gateway) for _ in range(2))
    first.sendall(raw.request(PATH, FRAME))
    eventually(lambda: backend.app.held == 1)
    frame = b"\1" * 6400  # so long that what is sent ahead is not parsed, and nothing more is read
    gone.settimeout(1)
    with suppress(TimeoutError):  # more than the system takes, so that the end comes after what is not read
        gone.sendall(raw.request(PATH, frame) * ahead)
    eventually(lambda: pending(gateway)[0] > 1)
    gone.close()
    eventually(lambda: pending(gateway)[0] == 1, 5)
    backend.release()
    assert raw.status(raw.answer(first)) == 200
    assert [frame] not in backend.app.calls


@pytest.mark.parametrize(
    "broken", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"]
)
def test_broken_request_is_answered_after_those_before_it(attacked, backend, stack, broken):
    gateway = attacked()
    backend.hold(FRAME)
    connection = connect(stack, gateway)
    connection.sendall(raw.request(PATH, FRAME) + LIVE + broken + LIVE)
    eventually(lambda: backend.app.held == 1)
    backend.release()
    assert statuses(everything(connection)) == [200, 200, 400]


def test_broken_body_ends_its_own_request_alone(attacked, backend, stack):
    gateway = attacked()
    backend.hold(FRAME)
    connection = connect(stack, gateway)
    broken = raw.head(PATH, transfer_encoding="chunked") + b"zz\r\n"
    connection.sendall(raw.request(PATH, FRAME) + broken)
    eventually(lambda: backend.app.held == 1)
    backend.release()
    assert statuses(everything(connection)) == [200, 400]
    alone = connect(stack, gateway)
    alone.sendall(broken)
    assert statuses(everything(alone)) == [400]
    assert pending(gateway) == (0, 0)


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "websocket, h2c"])
def test_upgrade_is_not_taken_and_ends_the_connection(attacked, stack, upgrade):
    gateway = attacked()
    asked = {
        "connection": "Upgrade",
        "upgrade": upgrade,
        "sec_websocket_key": "x",
        "sec_websocket_version": 13,
    }
    for request in (
        raw.head("/health/live", method="GET", **asked),
        raw.request(PATH, FRAME, **asked),
    ):
        connection = connect(stack, gateway)
        connection.sendall(request + b"\x81\x85\0\0\0\0hello" + LIVE)
        assert statuses(everything(connection)) == [200]


def test_continue_is_sent_only_for_a_body_that_is_wanted(attacked, stack):
    gateway = attacked()
    connection = connect(stack, gateway)
    connection.sendall(raw.head(PATH, content_length=len(FRAME), expect="100-continue"))
    assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(FRAME)
    assert raw.status(raw.answer(connection)) == 200
    connection = connect(stack, gateway)
    connection.sendall(raw.head(PATH, content_length=1 << 40, expect="100-continue"))
    assert raw.status(raw.answer(connection)) == 413


def test_thousand_requests_sent_ahead_are_answered_in_order(attacked, stack):
    gateway = attacked()
    connection = connect(stack, gateway)
    frames = [number.to_bytes(2, "big") * 32 for number in range(1000)]
    connection.sendall(b"".join(raw.request(PATH, frame, x_request_id=n) for n, frame in enumerate(frames)))
    received = b""
    while received.count(b"HTTP/1.1 ") < 1000 or not received.endswith(answer_for(frames[-1], {})):
        received += connection.recv(1 << 20)
    at = [received.index(b"x-request-id: %d\r\n" % n) for n in range(1000)]
    assert at == sorted(at) and statuses(received) == [200] * 1000


def test_slow_head_is_closed_and_others_are_answered(attacked, stack):
    gateway = attacked(header_timeout_s=1)
    slow = [connect(stack, gateway) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: ")
    assert post(gateway, FRAME).status_code == 200
    began = time.monotonic()
    for connection in slow:
        assert everything(connection) == b""
    assert time.monotonic() - began < 5
    assert get(gateway, "/health/live").status_code == 200
