"""What connections hold, on the resident size of the gateway's process."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.attacks.connections.conftest import Peak, get, keep_open, pending, post
from tests.attacks.connections.test_permits import FRAME, PATH, connect
from tests.gateway import raw
from tests.gateway.running import eventually

MB = 1_000_000


def sent_until_cut(connection: socket.socket, pieces: Iterator[bytes], peak: Peak) -> int:
    """Send until the gateway ends the connection; returns how many bytes it took."""
    sent = 0
    with contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            sent += len(piece)
            if sent % (5 * MB) < len(piece):
                peak.sample()
    return sent


def trailers() -> Iterator[bytes]:
    yield raw.head(PATH, transfer_encoding="chunked") + raw.chunk(FRAME) + b"0\r\n"
    for _ in range(3000):
        yield b"x-more: " + b"y" * 100_000 + b"\r\n"


def one_trailer() -> Iterator[bytes]:
    yield raw.head(PATH, transfer_encoding="chunked") + raw.chunk(FRAME) + b"0\r\nx-more: "
    for _ in range(3000):
        yield b"y" * 100_000


def chunk_extension() -> Iterator[bytes]:
    yield raw.head(PATH, transfer_encoding="chunked") + b"5;"
    for _ in range(3000):
        yield b"y" * 100_000


def header_lines() -> Iterator[bytes]:
    yield raw.head(PATH)[:-2]
    for _ in range(3000):
        yield b"a:b\r\n" * 20_000


def target() -> Iterator[bytes]:
    yield b"POST /predictions/second?"
    for _ in range(3000):
        yield b"y" * 100_000


@pytest.mark.parametrize("attack", [trailers, one_trailer, chunk_extension, header_lines, target])
def test_endless_framing_is_cut_before_it_is_held(attacked, stack, attack):
    gateway = attacked(alone=True)
    peak = Peak(gateway)
    sent = sent_until_cut(connect(stack, gateway), attack(), peak)
    assert sent < 20 * MB and peak.grown < 15 * MB, (sent, peak.grown)
    assert post(gateway, FRAME).status_code == 200


def test_header_of_many_lines_returns_400(attacked, stack):
    gateway = attacked()
    for lines, status in ((200, 200), (300, 400)):
        connection = connect(stack, gateway)
        connection.sendall(
            raw.head(PATH, content_length=len(FRAME))[:-2] + b"a: b\r\n" * lines + b"\r\n" + FRAME
        )
        assert raw.status(raw.answer(connection)) == status


def test_trailers_within_the_limit_are_dropped(attacked, stack):
    gateway = attacked()
    connection = connect(stack, gateway)
    whole = raw.head(PATH, transfer_encoding="chunked") + raw.chunk(FRAME) + b"0\r\nx-timeout-ms: no\r\n\r\n"
    connection.sendall(whole)
    assert raw.status(raw.answer(connection)) == 200


def test_unread_answers_count_until_they_are_written(attacked, backend, long_answers, stack):
    backend.app.models["second"]["1.0"].workers = [1]
    long_answers(30 * MB)
    limit = 64 << 20
    gateway = attacked(
        alone=True, max_pending_bytes=limit, client_share=1, client_stall_timeout_s=10, batch_frames=1
    )
    post(gateway, FRAME)
    before = gateway.resident_bytes()
    peak = Peak(gateway)
    for _ in range(12):
        connect(stack, gateway, receive_buffer=4096).sendall(raw.request(PATH, FRAME))

    def only_two_are_held() -> bool:
        peak.sample()
        return pending(gateway) == (0, 2 * (30 * MB + 10))

    eventually(only_two_are_held, 30)
    time.sleep(0.2)
    held = gateway.resident_bytes() - before
    print(f"held {held / MB:.0f} MB, at most {peak.grown / MB:.0f} MB")
    # What is under way from the backend to the permit, two answers at a time, comes on top for a moment.
    assert held < 2 * limit and peak.grown < limit + 2 * 5 * 30 * MB
    eventually(lambda: pending(gateway) == (0, 0), 20)


def test_requests_sent_ahead_wait_unparsed(attacked, backend, stack):
    gateway = attacked(alone=True)
    backend.hold(FRAME)
    peak = Peak(gateway)
    ahead = raw.head("/health/live", method="GET") * 5000
    connections = [connect(stack, gateway) for _ in range(10)]
    for connection in connections:
        connection.setblocking(False)
        connection.send(raw.request(PATH, FRAME) + ahead)
    eventually(lambda: pending(gateway)[0] == 10)
    time.sleep(0.5)  # whatever is read is read by now
    assert peak.grown < 15 * MB, peak.grown
    backend.release()
    for connection in connections[:2]:
        connection.settimeout(20)
        received = b""
        while received.count(b"HTTP/1.1 200") < 1000:
            received += connection.recv(1 << 20)


def test_idle_connections_take_little_and_leave_the_others_answered(attacked, stack):
    gateway = attacked(alone=True, keep_alive_s=60)
    peak = Peak(gateway)
    request = raw.head("/health/live", method="GET")
    idle = [connect(stack, gateway) for _ in range(1500)]
    for connection in idle:
        connection.sendall(request)
        assert raw.status(raw.answer(connection)) == 200
    assert peak.grown < 1500 * 20_000, peak.grown
    assert post(gateway, FRAME).status_code == 200
    assert get(gateway, "/health/live").status_code == 200


def test_an_option_of_many_bytes_is_not_echoed(attacked):
    gateway = attacked()
    body = b'{"b64":"AAAA","score_thr":"' + b"y" * (30 * MB) + b'"}'
    answer = post(gateway, body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.text.count("y") < 250 and len(answer.content) < 3000


@pytest.mark.parametrize("where", ["query", "header", "accept", "model", "path", "content-encoding", "v2"])
def test_errors_quote_little_of_what_was_sent(attacked, where):
    gateway = attacked()
    long = "y" * 30_000
    path = {"query": f"{PATH}?score_thr={long}", "model": f"/predictions/{long}", "path": f"/{long}"}
    headers = {
        "header": {"x-score-thr": long},
        "accept": {"accept": long},
        "content-encoding": {"content-encoding": long},
    }
    url = {"v2": f"/v2/models/{long}/infer"}.get(where, path.get(where, PATH))
    answer = httpx.post(
        f"{gateway.url}{url}", content=FRAME, headers=headers.get(where), trust_env=False, timeout=20
    )
    assert 400 <= answer.status_code < 500
    assert answer.text.count("y") <= 220, answer.text[:500]


def test_multipart_around_the_parts_is_counted(attacked, stack):
    gateway = attacked(alone=True)
    peak = Peak(gateway)
    filler = b"y" * (25 * MB)
    part = b'--b\r\ncontent-disposition: form-data; name="data"; filename="f"\r\n\r\n' + FRAME + b"\r\n"
    for body in (filler + b"\r\n" + part + b"--b--\r\n", part + b"--b--\r\n" + filler):
        head = raw.head(PATH, content_length=len(body) + 1, content_type="multipart/form-data; boundary=b")
        connection = keep_open(stack, connect(stack, gateway))
        connection.sendall(head + body)
        eventually(lambda body=body: pending(gateway)[1] == len(body))
        connection.sendall(b"\n")
        assert raw.status(raw.answer(connection)) in (200, 400)
    assert peak.grown < 5 * len(filler), peak.grown
