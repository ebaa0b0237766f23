"""Header, body and request limits of a connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from serve.gateway.http_protocol import MAX_HEADER_BYTES, ConnectionLimits, make_protocol_class
from tests.gateway import raw
from tests.gateway.running import Background, Listening


async def at_once(scope: Any, receive: Any, send: Any) -> None:
    """Answers before it has read anything, as a gateway does that knows no such model; /slow takes half a second."""
    if scope["type"] == "http":
        if scope["path"] == "/slow":
            await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"none"})


@pytest.fixture
def listen(background: Background) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def start(head_timeout_s: float = 10.0, request_timeout_s: float = 10.0, requests: int = 0) -> str:
            protocol = make_protocol_class(
                ConnectionLimits(head_timeout_s, request_timeout_s, max_requests=requests)
            )
            listening = Listening(background, at_once, http=protocol, lifespan="off")
            stack.callback(listening.close)
            return listening.url

        yield start


def closed_after_s(connection: Any) -> float:
    began = time.monotonic()
    while connection.recv(65536):
        pass
    return time.monotonic() - began


@pytest.mark.parametrize("started", [b"", b"POST / HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half a head"])
def test_connection_without_a_request_is_closed(listen, started):
    with raw.connected(listen(head_timeout_s=0.2)) as connection:
        connection.sendall(started)
        assert 0.1 < closed_after_s(connection) < 5


def test_every_request_gets_the_full_header_timeout(listen):
    with raw.connected(listen(head_timeout_s=0.3)) as connection:
        connection.sendall(raw.request("/", b"x"))
        assert raw.status(raw.answer(connection)) == 404
        connection.sendall(b"POST / HTTP/1.1\r\n")
        assert 0.2 < closed_after_s(connection) < 5


def test_endless_body_is_closed_after_the_request_timeout(listen):
    with raw.connected(listen(request_timeout_s=0.4)) as connection:
        connection.sendall(raw.head("/", transfer_encoding="chunked"))
        assert raw.status(raw.answer(connection)) == 404
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                connection.sendall(raw.chunk(b"x" * 100_000))
        assert time.monotonic() - began < 5


def test_endless_header_is_rejected_before_it_is_buffered(listen):
    with raw.connected(listen()) as connection, pytest.raises(OSError):
        connection.sendall(raw.head("/")[:-2])
        for _ in range(1000):
            connection.sendall(b"x-more: " + b"y" * 10_000 + b"\r\n")
            time.sleep(0.001)
        # What was on its way when the connection closed may cost the client the answer, but not the end.


def test_header_over_the_limit_returns_400(listen):
    with raw.connected(listen()) as connection:
        connection.sendall(raw.head("/")[:-2] + b"x-more: " + b"y" * MAX_HEADER_BYTES)
        received = raw.answer(connection)
    assert raw.status(received) == 400 and str(MAX_HEADER_BYTES).encode() in received


def test_large_body_in_the_chunk_of_its_header_is_accepted(listen):
    with raw.connected(listen()) as connection:
        for _ in range(3):
            connection.sendall(raw.request("/", b"x" * (4 * MAX_HEADER_BYTES)))
            assert raw.status(raw.answer(connection)) == 404


def test_connection_closes_after_the_maximum_number_of_requests(listen):
    with raw.connected(listen(requests=3)) as connection:
        for turn in range(3):
            connection.sendall(raw.request("/", b"x"))
            assert (b"connection: close" in raw.answer(connection)) == (turn == 2)
        assert connection.recv(1) == b""


def test_pipelined_request_does_not_time_out_behind_another(listen):
    """Pipelined: nothing more is read while the first is being answered, so its body cannot come."""
    with raw.connected(listen(head_timeout_s=0.1, request_timeout_s=0.1)) as connection:
        connection.sendall(raw.request("/slow", b"x") + raw.head("/", content_length=200_000))
        first = raw.answer(connection)
        assert raw.status(first) == 404


def test_connection_in_use_outlives_both_timeouts(listen):
    with raw.connected(listen(head_timeout_s=0.2, request_timeout_s=0.2)) as connection:
        for _ in range(2):
            connection.sendall(raw.request("/slow", b"x"))
            assert raw.status(raw.answer(connection)) == 404
