"""Connection pool to one HTTP/1.1 server for POST requests with large bodies.

A body is sent as chunks without joining or copying them. One request per connection at a time; no redirects, cookies
or retries. It exists because httpx took ten times its CPU time per call (docs/decisions/0009-hot-path.md).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from serve.protocol.batch import Bytes

__all__ = ["ConnectFailed", "ConnectionLost", "ConnectionPool", "Reply"]

CONNECT_TIMEOUT_S = 2.0


class ConnectFailed(Exception):
    """No connection could be opened; nothing was sent."""


class ConnectionLost(Exception):
    """The connection was closed, or broke the protocol, before the answer was complete."""


@dataclass
class Reply:
    """Answer of the server: status, headers by lower-case name, body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class ConnectionPool:
    """Persistent connections, one per concurrent call; belongs to one event loop.

    Args:
        url: ``http://HOST[:PORT]`` or ``https://…``; its path is prepended to the path of every call.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._address = (parts.hostname or "", parts.port or (443 if secure else 80))
        self._host = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if secure else None
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def post(
        self, path: str, headers: Mapping[str, str], chunks: Sequence[Bytes], timeout_s: float
    ) -> Reply:
        """Send a POST with the concatenated `chunks` as its body; returns the answer.

        Raises:
            ConnectFailed: no connection could be opened.
            ConnectionLost: the connection was lost before the answer; the server may have done the work or not.
            TimeoutError: no complete answer within `timeout_s` seconds.
        """
        head = [
            f"POST {self._prefix}{path} HTTP/1.1",
            f"host: {self._host}",
            f"content-length: {sum(len(chunk) for chunk in chunks)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        connection = await self._connection()
        self._busy.add(connection)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await connection.call([("\r\n".join(head) + "\r\n\r\n").encode("latin-1"), *chunks])
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if connection.open:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        """Close all connections; calls in flight end with `ConnectionLost`."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:  # else the server has closed it meanwhile
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, made = await loop.create_connection(_Connection, *self._address, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise ConnectFailed(str(error) or f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        return made


class _Connection(asyncio.Protocol):
    """One connection; from `connection_made` on, the methods are callbacks of asyncio and httptools."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._reply = Reply()
        self._chunks: list[bytes] = []
        self._parser: Any = None
        self._answer: asyncio.Future[Reply] | None = None

    async def call(self, chunks: Sequence[Bytes]) -> Reply:
        """Send one request and wait for its answer."""
        self._reply, self._chunks = Reply(), []
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        # Returns at once; the transport keeps references to chunks that the socket does not accept yet.
        self._transport.writelines(chunks)
        return await self._answer

    def close(self) -> None:
        """Close the connection at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # unsolicited data
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"the answer is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(str(error) if error else "closed by the server")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()
        if 100 <= self._reply.status < 200:  # interim answer; the final one follows
            self._reply = Reply()
            return
        self._reply.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._reply)

    def _end(self, reason: str) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionLost(reason))
