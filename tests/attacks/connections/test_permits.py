"""Clients that hold permits and do nothing with them: others are answered beside them, and they are cut."""

from __future__ import annotations

import json
import socket
import time

import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from tests.attacks.connections.conftest import get, keep_open, pending, post
from tests.gateway import raw
from tests.gateway.running import eventually

PATH = "/predictions/second"
STALL = {"client_stall_timeout_s": 1}
FRAME = b"\0" * 64


def connect(stack, gateway, source="127.0.0.1", receive_buffer=None):
    """Open a connection that the test keeps, with a small buffer for what it does not read."""
    host, port = gateway.url.removeprefix("http://").split(":")
    made = keep_open(stack, socket.socket())
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(20)
    made.bind((source, 0))
    made.connect((host, int(port)))
    return made


def test_announced_bodies_that_do_not_come_keep_nobody_out(attacked, stack):
    gateway = attacked(**STALL)
    idle = [connect(stack, gateway) for _ in range(8)]
    for connection in idle:
        connection.sendall(raw.head(PATH, content_length=64 << 20))
    time.sleep(0.2)  # all of them are in their request
    assert [post(gateway, FRAME).status_code for _ in range(3)] == [200] * 3
    assert pending(gateway) == (0, 0)
    assert {raw.status(raw.answer(connection)) for connection in idle} == {408}


def test_streams_that_nobody_reads_keep_nobody_out(attacked, long_answers, stack):
    long_answers(100_000)
    gateway = attacked(**STALL)
    body = pack_frames([(FRAME, {}) for _ in range(64)])
    for _ in range(4):
        connect(stack, gateway, receive_buffer=4096).sendall(
            raw.request(PATH, body, content_type=FRAMES_CONTENT_TYPE, accept="application/x-ndjson")
        )
    eventually(lambda: pending(gateway)[1] > 10_000_000)  # computed, and not read
    assert post(gateway, FRAME).status_code == 200
    eventually(lambda: pending(gateway) == (0, 0))  # cut


def test_answers_that_nobody_reads_keep_nobody_out(attacked, long_answers, stack):
    long_answers(10_000_000)
    gateway = attacked(
        client_stall_timeout_s=3, client_share=1, max_pending_frames=4, max_frames_per_request=4
    )
    for _ in range(4):
        connect(stack, gateway, receive_buffer=4096).sendall(raw.request(PATH, FRAME))
    eventually(lambda: pending(gateway) == (0, 4 * 10_000_010))
    assert post(gateway, FRAME).status_code == 200
    eventually(lambda: pending(gateway) == (0, 0))


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_body_that_trickles_returns_408(attacked, stack, chunked):
    gateway = attacked(**STALL)
    connection = connect(stack, gateway)
    framing = {"transfer_encoding": "chunked"} if chunked else {"content_length": 10_000}
    connection.sendall(raw.head(PATH, **framing))
    began = time.monotonic()
    connection.setblocking(False)
    received = b""
    while not received and time.monotonic() - began < 15:
        connection.sendall(raw.chunk(b"x") if chunked else b"x")
        time.sleep(0.1)
        try:
            received = connection.recv(65536)
        except BlockingIOError:
            continue
    assert raw.status(received) == 408 and time.monotonic() - began < 5


def test_body_at_the_least_rate_is_answered(attacked, stack):
    gateway = attacked(**STALL, client_bytes_per_s=4096)
    connection = connect(stack, gateway)
    connection.sendall(raw.head(PATH, content_length=16 * 1024))
    for _ in range(16):
        connection.sendall(b"\0" * 1024)
        time.sleep(0.15)  # 6.8 kB/s, three times as long as it may stall
    assert raw.status(raw.answer(connection)) == 200


def test_answer_that_is_read_too_slowly_is_cut_and_one_that_is_not_arrives(attacked, long_answers, stack):
    nbytes = 10_000_000  # more than the system buffers
    long_answers(nbytes)
    gateway = attacked(**STALL, client_bytes_per_s=100_000)
    slow, steady = connect(stack, gateway, receive_buffer=8192), connect(stack, gateway)
    for connection in (slow, steady):
        connection.sendall(raw.request(PATH, FRAME))
    received, ended = 0, False
    began = time.monotonic()
    while time.monotonic() - began < 15 and not (ended and received > nbytes):
        received += len(steady.recv(64 * 1024)) if received < nbytes else 0
        try:
            ended = ended or not slow.recv(100)
        except ConnectionResetError:
            ended = True
        time.sleep(0.02)  # up to 3 MB/s, and 5 kB/s
    assert (received >= nbytes, ended) == (True, True)
    eventually(lambda: pending(gateway) == (0, 0))


def test_one_address_fills_its_share_and_another_is_answered(attacked, backend, stack):
    gateway = attacked(max_pending_frames=8, max_frames_per_request=1, batch_frames=1)
    backend.hold(FRAME)
    for _ in range(8):
        connect(stack, gateway, "127.0.0.2").sendall(raw.request(PATH, FRAME))
    eventually(lambda: pending(gateway)[0] >= 6)
    greedy = post(gateway, b"\1" * 64, source="127.0.0.2")
    assert greedy.status_code == 429 and greedy.headers["retry-after"]
    assert post(gateway, b"\1" * 64, source="127.0.0.3").status_code == 200
    assert pending(gateway)[0] == 6


def test_one_key_fills_its_share_and_another_is_answered(attacked, backend, stack, tmp_path):
    (tmp_path / "keys").write_text("greedy\nmodest\n")
    gateway = attacked(
        max_pending_frames=8, max_frames_per_request=1, batch_frames=1, api_keys_file=tmp_path / "keys"
    )
    backend.hold(FRAME)
    for _ in range(8):
        connect(stack, gateway).sendall(raw.request(PATH, FRAME, x_api_key="greedy"))
    eventually(lambda: pending(gateway)[0] >= 6)
    assert post(gateway, b"\1" * 64, headers={"x-api-key": "greedy"}).status_code == 429
    assert post(gateway, b"\1" * 64, headers={"x-api-key": "modest"}).status_code == 200
    assert pending(gateway)[0] == 6


def test_client_behind_a_trusted_proxy_is_known_by_its_own_address(attacked, backend, stack):
    gateway = attacked(max_pending_frames=8, max_frames_per_request=1, batch_frames=1)
    backend.hold(FRAME)
    for _ in range(8):
        connect(stack, gateway).sendall(raw.request(PATH, FRAME, x_forwarded_for="198.51.100.7"))
    eventually(lambda: pending(gateway)[0] >= 6)
    for client, status in (("198.51.100.7", 429), ("198.51.100.8", 200)):
        assert post(gateway, b"\1" * 64, headers={"x-forwarded-for": client}).status_code == status
    # From another address than the trusted proxy the header means nothing.
    assert post(
        gateway, b"\1" * 64, source="127.0.0.9", headers={"x-forwarded-for": "198.51.100.7"}
    ).is_success


def test_connections_of_one_address_leave_room_for_another(attacked, stack):
    gateway = attacked(max_connections=40)
    mine = [connect(stack, gateway, "127.0.0.2") for _ in range(30)]
    refused = connect(stack, gateway, "127.0.0.2")
    received = raw.answer(refused)
    assert raw.status(received) == 503 and json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"]
    assert post(gateway, FRAME).status_code == 200
    mine.pop().close()
    eventually(lambda: post(gateway, FRAME, source="127.0.0.2").status_code == 200)
    assert get(gateway, "/health/live").status_code == 200
