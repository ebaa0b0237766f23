"""uvicorn's HTTP protocol with bounds on what one connection may hold, and for how long.

uvicorn itself limits only the pause between requests. Here the head of a request, trailers and chunk extensions have a
size; the head, the whole request, and every answer that is not read have a time; requests sent ahead wait unparsed, so
that they hold no more than one read of the socket; and connections have a number, in total and per client. A request
whose head is wrong is answered in its turn, after those before it.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.errors import BadRequest, NotReady, ServeError, error_body
from serve.gateway import tcp
from serve.gateway.admission import client_of
from serve.gateway.request_head import RequestHead
from serve.gateway.unread_answer import UnreadAnswer

__all__ = ["MAX_HEADER_BYTES", "ConnectionLimits", "make_protocol_class"]

MAX_HEADER_BYTES = 64 * 1024  # the default of uvicorn's h11 implementation
# A head, and what may follow it, is parsed by pieces, so that few requests sent ahead are parsed before their turn.
_HEAD_PIECE_BYTES = 4 * 1024
_CHUNKED_PIECE_BYTES = 16 * 1024
# Chunks that are parsed before other connections have a turn; a read of the socket brings 43,690 of one byte.
_CHUNKS_PER_TURN = 1000
# Of an answer that the system holds unsent beside what is under way; it would take megabytes, which no permit counts.
_UNSENT_BYTES = 256 * 1024
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 1.0
_LINGERING_CLOSE_S, _LINGERING_BYTES = 2.0, 1 << 20


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of each connection, and of all together.

    Attributes:
        header_timeout_s: seconds from the connection, or the first byte of a later request, to the end of the head.
        request_timeout_s: seconds from there to the end of the body.
        stall_timeout_s: seconds in which an unread answer must move by `bytes_per_s`, else the connection is cut.
        bytes_per_s: least rate at which a client reads an answer.
        max_requests: requests after which a connection is closed; 0 for no limit.
        max_connections: connections in total.
        client_share: share of them that one client's address may have.
    """

    header_timeout_s: float = 10.0
    request_timeout_s: float = 35.0
    stall_timeout_s: float = 10.0
    bytes_per_s: int = 4096
    max_requests: int = 0
    max_connections: int = 4096
    client_share: float = 1.0


def make_protocol_class(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """Create a protocol class for `uvicorn.Config(http=…)`; its connections are counted together."""
    addresses: Counter[str] = Counter()
    per_address = math.ceil(limits.max_connections * limits.client_share)

    class BoundedProtocol(HttpToolsProtocol):
        """One connection with limits."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self._address = ""
            self._deadline: asyncio.TimerHandle | None = None
            self._looking: asyncio.TimerHandle | None = None  # while the client has ended its side
            self._unread: UnreadAnswer  # once there is a connection
            self._running: Any = None  # the cycle that is being answered; `self.cycle` is the newest one
            self._in_header = True
            self._header_bytes = 0
            self._head = RequestHead()
            self._body_left = 0  # of a body with a Content-Length
            self._framing_bytes = 0  # since the last byte of a chunked body
            self._requests = 0
            self._unparsed = b""
            self._pieces = 0  # of bodies, parsed in this turn of the loop
            self._refusal: ServeError | None = None  # of what follows the requests before it
            self._deaf = False  # nothing more is parsed
            self._is_lingering = False  # the last answer is sent
            self._dropped_bytes = 0
            self._half_closed = False

        # Connection

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.flow = _Flow(transport, self._holds_back)
            self._unread = UnreadAnswer(transport, limits.stall_timeout_s, limits.bytes_per_s)
            tcp.limit_unsent(transport, _UNSENT_BYTES)
            self._address = client_of({"client": self.client})
            addresses[self._address] += 1
            if len(self.connections) > limits.max_connections or addresses[self._address] > per_address:
                self._refuse(NotReady("the server has as many connections as it allows; retry later"))
                return
            self._start_deadline(limits.header_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            addresses[self._address] -= 1
            if not addresses[self._address]:
                del addresses[self._address]
            for timer in (self._deadline, self._looking):
                if timer is not None:
                    timer.cancel()
            self._unread.stop()
            self._unparsed = b""
            cycle = self._running
            super().connection_lost(exc)
            if cycle is not None and not cycle.response_complete:  # uvicorn tells only the newest
                cycle.disconnected = True
                cycle.message_event.set()

        def eof_received(self) -> bool | None:  # type: ignore[override]
            """Answer the requests that came whole; what the client has closed rather than ended shows as a reset."""
            whole = self._in_header or self._unparsed
            if not self._is_answering() or not whole or sys.platform != "linux":
                return None
            self._half_closed = True
            self._watch_client()
            return True

        # Reading

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            if self._deaf:
                self._dropped_bytes += len(data)
                if self._dropped_bytes > _LINGERING_BYTES and self._is_lingering:
                    self._close()
                return
            if self._unparsed:  # on its way when reading was paused
                self._unparsed += data
                self.flow.pause_reading()
                return
            self._pieces = 0
            self._parse(data)

        def _parse(self, data: bytes) -> None:
            view = memoryview(data)
            while view and not self._deaf and not self.transport.is_closing():
                if self.pipeline or self._pieces > _CHUNKS_PER_TURN:
                    self._unparsed = bytes(view)
                    self.flow.pause_reading()
                    if not self.pipeline:
                        self.loop.call_soon(self._parse_on)
                    return
                size = self._piece_bytes()
                self._feed(view[:size])
                view = view[size:]

        def _parse_on(self) -> None:
            """Parse what was put aside, and read on."""
            self._pieces = 0
            if self.pipeline or not self._unparsed or self.transport.is_closing():
                return
            data, self._unparsed = self._unparsed, b""
            self._parse(data)
            cycle: Any = self.cycle
            is_full = cycle is not None and not cycle.response_complete and len(cycle.body) > HIGH_WATER_LIMIT
            if not self._unparsed and not is_full:
                self.flow.resume_reading()

        def _piece_bytes(self) -> int:
            if self._in_header:
                return _HEAD_PIECE_BYTES
            return self._body_left or _CHUNKED_PIECE_BYTES

        def _feed(self, piece: memoryview) -> None:
            # A piece that ends one body and starts the next head counts towards the body.
            in_header = self._in_header
            self._header_bytes += len(piece) if in_header else 0
            self._framing_bytes += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                # Answered as if it had not asked; what follows may be of another protocol.
                self._deaf = True
            except httptools.HttpParserError:
                self._refuse(BadRequest("the request is not valid HTTP/1.1"))
            else:
                if self._in_header and in_header and self._header_bytes > MAX_HEADER_BYTES:
                    self._refuse(BadRequest(f"the request header exceeds {MAX_HEADER_BYTES} bytes"))
                elif not self._in_header and self._framing_bytes > MAX_HEADER_BYTES:
                    self._refuse(BadRequest(f"trailers and chunk extensions exceed {MAX_HEADER_BYTES} bytes"))

        def _holds_back(self) -> bool:
            """Return whether reading stays paused, because what was read waits for its turn."""
            return bool(self._unparsed) or (bool(self.pipeline) and len(self.cycle.body) > HIGH_WATER_LIMIT)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_header = True
            self._body_left = 0
            self._head = RequestHead()
            self._start_deadline(limits.header_timeout_s)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._in_header:
                return  # a trailer, which no route reads
            name = name.lower()
            if not self._head.add(name, value):
                return
            if name == b"content-length":
                self._body_left = int(value)
            elif name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

        def on_headers_complete(self) -> None:
            refusal = self._head.check(self.parser.get_http_version())
            if refusal is None:
                super().on_headers_complete()
            else:
                app, self.app = self.app, _refusing(refusal)
                try:
                    super().on_headers_complete()
                finally:
                    self.app = app
            self._in_header = False
            self._framing_bytes = 0
            self._requests += 1
            if self._requests == limits.max_requests or self.parser.should_upgrade():
                self.cycle.keep_alive = False
            if self.pipeline:
                self._watch_client()  # reading is paused, so that its end would not be read
            self._start_deadline(limits.request_timeout_s)

        def on_body(self, body: bytes) -> None:
            self._framing_bytes = 0
            self._pieces += 1
            self._body_left = max(0, self._body_left - len(body))
            # uvicorn copies each piece into a bytearray, and that into a message. Most are taken before the next one
            # arrives, and stay as they are; `bytes` that grew further would be copied for each piece.
            cycle: Any = self.cycle
            if not cycle.body:
                cycle.body = b""
            elif isinstance(cycle.body, bytes):
                cycle.body = bytearray(cycle.body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_header, self._header_bytes = True, 0
            self._cancel_deadline()

        # Answering

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._unread.watch()
            elif not self._is_answering() and self._refusal is not None:
                self._send_refusal(self._refusal)
            elif self._unparsed and not self.pipeline:
                self._unset_keepalive_if_required()
                self._parse_on()
            if self._half_closed and not self._is_answering() and not self.transport.is_closing():
                self._close()

        def _refuse(self, error: ServeError) -> None:
            """Parse nothing more; answer with `error` once the requests before it are answered, and close."""
            self._refusal, self._deaf = error, True
            self._cancel_deadline()
            if not self._is_answering():
                self._send_refusal(error)
            elif not self._in_header:  # the newest request itself is broken
                if self.pipeline:
                    self.pipeline.popleft()
                    self.cycle = self.pipeline[0][0] if self.pipeline else self._running
                elif self.cycle.response_started:
                    self._close()
                else:
                    self._send_refusal(error)
                    self.cycle.disconnected = True
                    self.cycle.message_event.set()

        def _send_refusal(self, error: ServeError) -> None:
            body = orjson.dumps(error_body(error))
            status = b"400 Bad Request" if error.status == 400 else b"503 Service Unavailable"
            self.transport.write(
                b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (status, len(body), body)
            )
            # Closing at once would reset the connection of a client that still sends, which would lose the answer.
            self.transport.write_eof()
            self._is_lingering = True
            self._unparsed = b""
            self.flow.resume_reading()
            self._cancel_deadline()
            self._deadline = self.loop.call_later(_LINGERING_CLOSE_S, self._close)

        # Deadlines

        def _start_deadline(self, seconds: float) -> None:
            self._cancel_deadline()
            self._deadline = self.loop.call_later(seconds, self._on_deadline, seconds)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _on_deadline(self, seconds: float) -> None:
            # Reading is paused while an earlier request is being answered.
            if self.pipeline or self._unparsed:
                self._start_deadline(seconds)
            else:
                self._close()

        def timeout_keep_alive_handler(self) -> None:
            self._close()

        def _close(self) -> None:
            """Close once everything is written, or is not read."""
            if not self.transport.is_closing():
                self.transport.close()
                self._unread.watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread.watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._unread.stop()

        # Clients that have ended their side, or may have while nothing is read

        def _watch_client(self) -> None:
            """Look at the connection from now on until everything is answered."""
            if self._looking is not None:
                self._looking.cancel()
            self._look(_FIRST_LOOK_S)

        def _look(self, pause_s: float) -> None:
            """Find out whether a client that has ended its side, or may have, still reads.

            One that has closed resets the connection when it is sent a byte: the first one of the answer, which is the
            same for all answers.
            """
            self._looking = None
            if not self._is_answering() or self.transport.is_closing():
                return
            state = tcp.state(self.transport)
            if state == tcp.CLOSE:
                tcp.reset(self.transport)
                return
            cycle = self._running
            may_have_ended = self._half_closed or state == tcp.CLOSE_WAIT
            if state is not None and pause_s >= _LONGEST_LOOK_S:
                # Its end may be behind bytes that the system does not take while nothing is read.
                may_have_ended = may_have_ended or self._holds_back()
            if may_have_ended and not cycle.response_started and not isinstance(cycle.transport, tcp.Begun):
                cycle.waiting_for_100_continue = False
                cycle.transport = tcp.Begun(self.transport)
            self._looking = self.loop.call_later(pause_s, self._look, min(2 * pause_s, _LONGEST_LOOK_S))

    return BoundedProtocol


class _Flow(FlowControl):
    """Flow control that does not resume reading while `holds_back`."""

    def __init__(self, transport: asyncio.Transport, holds_back: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._holds_back = holds_back

    def resume_reading(self) -> None:
        if self.read_paused and not self._holds_back():
            super().resume_reading()


def _refusing(error: ServeError) -> Callable[[Scope, Receive, Send], Any]:
    """Create the application that answers a request with `error` and closes."""
    body = orjson.dumps(error_body(error))

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer
