"""Connections to one HTTP/1.1 server, kept open, for large bodies that are there already: POST, and the answer.

A body goes out as the pieces it is in; nothing is joined or copied here. There is one way in, one request per
connection at a time, no redirects, no cookies, no retries. It is there because a general client took ten times
its CPU time for a call (docs/decisions/0009-hot-path.md). Knows HTTP, and nothing of what is sent.
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

__all__ = ["BrokenOff", "Connections", "Reply", "Unreachable"]

CONNECT_S = 2.0


class Unreachable(Exception):
    """There is no connection to be had; nothing was sent."""


class BrokenOff(Exception):
    """The connection ended, or made no sense, before the answer was there."""


@dataclass
class Reply:
    """An answer: status, headers by lower-case name, body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connections:
    """A pool that belongs to one event loop; as many connections as calls at a time, kept for the next ones.

    Args:
        url: ``http://HOST[:PORT]`` or ``https://…``; a path is put before that of every call.
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
        """The answer to a POST of `chunks`, back to back, with a Content-Length. A failed connection is not kept.

        Raises:
            Unreachable: no connection.
            BrokenOff: it ended before the answer was there; the server may have done the work or not.
            TimeoutError: no whole answer within `timeout_s` seconds.
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
                reply = await connection.ask([("\r\n".join(head) + "\r\n\r\n").encode("latin-1"), *chunks])
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if connection.open:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        """Hang up; calls under way end with `BrokenOff`."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:  # the server may have closed it meanwhile
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await loop.create_connection(_Connection, *self._address, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise Unreachable(str(error) or "no connection in time") from error
        return made


class _Connection(asyncio.Protocol):
    """One connection; the callbacks in the second half are asyncio's and httptools'."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._reply = Reply()
        self._pieces: list[bytes] = []
        self._parser: Any = None
        self._answer: asyncio.Future[Reply] | None = None

    async def ask(self, pieces: Sequence[Bytes]) -> Reply:
        """Send one request and wait for its answer."""
        self._reply, self._pieces = Reply(), []
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        # Returns at once; what the socket does not take now is kept by reference until it does.
        self._transport.writelines(pieces)
        return await self._answer

    def close(self) -> None:
        """Hang up at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nothing was asked
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
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()
        if 100 <= self._reply.status < 200:  # an interim answer; the one that counts follows
            self._reply = Reply()
            return
        self._reply.body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._reply)

    def _end(self, reason: str) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BrokenOff(reason))
