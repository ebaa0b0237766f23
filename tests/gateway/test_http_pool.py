"""The gateway's HTTP connection pool over real sockets, against correct and broken servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve.gateway.http_pool import ConnectFailed, ConnectionLost, ConnectionPool

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Kind: plain\r\n\r\nok"


class Server:
    """Hands every connection to `answer`; `taken` counts them."""

    def __init__(self, answer: Answer) -> None:
        self.taken = 0
        self._answer = answer

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        try:
            await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()


async def read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
    )
    return head, await reader.readexactly(length)


def saying(*pieces: bytes) -> Answer:
    """Answers every request with these pieces."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()

    return answer


def ask(answer: Answer, times: int = 1, timeout_s: float = 20.0, chunks: tuple[bytes, ...] = (b"ab", b"c")):
    """Replies to so many calls, one after another, and how many connections they took."""

    async def run():
        async with Server(answer) as server:
            connections = ConnectionPool(server.url)
            try:
                replies = [
                    await connections.post("/x", {"content-type": "a/b"}, chunks, timeout_s)
                    for _ in range(times)
                ]
            finally:
                connections.close()
            return replies, server.taken

    return asyncio.run(run())


def test_post_sends_joined_chunks_and_returns_the_answer():
    seen = []

    async def answer(reader, writer):
        seen.append(await read(reader))
        writer.write(OK)

    pieces = (bytes(3_000_000), memoryview(b"middle"), bytearray(b"end"))
    (reply,), _ = ask(answer, chunks=pieces)
    assert (reply.status, reply.body, reply.headers["x-kind"]) == (200, b"ok", "plain")
    ((head, body),) = seen
    assert body == b"".join(pieces)
    assert head.startswith(b"POST /x HTTP/1.1\r\nhost: 127.0.0.1:") and b"\r\ncontent-type: a/b\r\n" in head


def test_connection_is_reused_for_the_next_call():
    replies, taken = ask(saying(OK), times=5)
    assert len(replies) == 5 and taken == 1


def test_connection_closed_by_the_server_is_not_reused():
    closing = OK.replace(b"X-Kind: plain", b"Connection: close")
    replies, taken = ask(saying(closing), times=3)
    assert len(replies) == 3 and taken == 3


@pytest.mark.parametrize(
    "pieces",
    [
        (OK[:20], OK[20:50], OK[50:]),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n", b"1\r\nk\r\n0\r\n\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", OK),
    ],
    ids=["in pieces", "chunked", "after an interim answer"],
)
def test_answer_is_parsed_in_any_chunking_and_encoding(pieces):
    replies, _ = ask(saying(*pieces), times=2)
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"ok")] * 2


@pytest.mark.parametrize(
    "raw", [b"", OK[:-1], b"SSH-2.0-OpenSSH\r\n"], ids=["nothing", "half of it", "another protocol"]
)
def test_broken_answer_raises_connection_lost(raw):
    async def answer(reader, writer):
        await read(reader)
        writer.write(raw)

    with pytest.raises(ConnectionLost):
        ask(answer)


def test_late_answer_raises_timeout_and_closes_the_connection():
    async def run():
        ended = asyncio.Event()

        async def answer(reader, writer):
            await read(reader)
            await reader.read()  # until the client hangs up
            ended.set()

        async with Server(answer) as server:
            with pytest.raises(TimeoutError):
                await ConnectionPool(server.url).post("/x", {}, [b"a"], 0.05)
            async with asyncio.timeout(20):
                await ended.wait()

    asyncio.run(run())


def test_refused_connection_raises_connect_failed(free_ports):
    (port,) = free_ports(1)

    async def run():
        await ConnectionPool(f"http://127.0.0.1:{port}").post("/x", {}, [b"a"], 5.0)

    with pytest.raises(ConnectFailed):
        asyncio.run(run())


def test_concurrent_calls_use_separate_connections():
    async def run():
        gate = asyncio.Event()
        waiting = 0

        async def answer(reader, writer):
            nonlocal waiting
            await read(reader)
            waiting += 1
            if waiting == 3:
                gate.set()
            await gate.wait()
            writer.write(OK)

        async with Server(answer) as server:
            connections = ConnectionPool(server.url)
            replies = await asyncio.gather(*(connections.post("/x", {}, [b"a"], 20.0) for _ in range(3)))
            connections.close()
            return replies, server.taken

    replies, taken = asyncio.run(run())
    assert [reply.body for reply in replies] == [b"ok"] * 3 and taken == 3


def test_cancelled_call_closes_its_connection():
    async def run():
        asked, ended = asyncio.Event(), asyncio.Event()

        async def answer(reader, writer):
            await read(reader)
            asked.set()
            await reader.read()
            ended.set()

        async with Server(answer) as server:
            connections = ConnectionPool(server.url)
            call = asyncio.create_task(connections.post("/x", {}, [b"a"], 20.0))
            await asked.wait()
            call.cancel()
            async with asyncio.timeout(20):
                await ended.wait()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(run())


def test_close_ends_calls_in_flight():
    async def run():
        asked = asyncio.Event()

        async def answer(reader, writer):
            await read(reader)
            asked.set()
            await reader.read()

        async with Server(answer) as server:
            connections = ConnectionPool(server.url)
            call = asyncio.create_task(connections.post("/x", {}, [b"a"], 20.0))
            await asked.wait()
            connections.close()
            with pytest.raises(ConnectionLost):
                await call

    asyncio.run(run())
