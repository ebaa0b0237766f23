"""uvicorn's HTTP connection, with an end to everything that a client may draw out.

A request's head has a time and a size, the whole request has a time even where it was answered long before its
end, and a connection may have a number of requests. uvicorn itself bounds only the pause between two requests.
Knows connections and bytes; nothing about paths or frames.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["MAX_HEADER_BYTES", "make_protocol_class"]

MAX_HEADER_BYTES = 64 * 1024  # as uvicorn's other implementation has it


def make_protocol_class(
    head_timeout_s: float, request_timeout_s: float, connection_requests: int
) -> type[HttpToolsProtocol]:
    """A class of connections for `uvicorn.Config(http=…)`.

    Args:
        head_timeout_s: from the connection, or the first byte of a later request, to the end of the head.
        request_timeout_s: from there to the end of the body.
        connection_requests: after so many requests a connection is closed; 0: never for that reason.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """One connection."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self._deadline: asyncio.TimerHandle | None = None
            self._head_bytes = 0
            self._in_head = True
            self._requests = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._must_end_in(head_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # A piece that brings the end of a body and the begin of a head counts for the body.
            self._head_bytes += len(data) if self._in_head else 0
            super().data_received(data)
            # The piece that ends a head may bring a body of any length with it; only a head without end is refused.
            if self._in_head and self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The head of a request may have {MAX_HEADER_BYTES} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = True
            self._must_end_in(head_timeout_s)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._in_head = False
            self._requests += 1
            if self._requests == connection_requests:
                self.cycle.keep_alive = False
            self._must_end_in(request_timeout_s)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head, self._head_bytes = True, 0
            self._disarm()

        def _must_end_in(self, seconds: float) -> None:
            self._disarm()
            self._deadline = self.loop.call_later(seconds, self._too_late, seconds)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_late(self, seconds: float) -> None:
            if self.pipeline:  # we ourselves read no further while an earlier request is being answered
                self._must_end_in(seconds)
            else:
                self.transport.close()

    return BoundedProtocol
