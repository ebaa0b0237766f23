"""uvicorn's HTTP protocol with header, body and request limits (slowloris protection).

The header of a request has a time and a size limit, the whole request has a time limit even if it was answered before
its end, and a connection may have a maximum number of requests. uvicorn itself limits only the pause between requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["MAX_HEADER_BYTES", "make_protocol_class"]

MAX_HEADER_BYTES = 64 * 1024  # the default of uvicorn's h11 implementation


def make_protocol_class(
    header_timeout_s: float, request_timeout_s: float, max_requests: int
) -> type[HttpToolsProtocol]:
    """Create a protocol class for `uvicorn.Config(http=…)`.

    Args:
        header_timeout_s: seconds from the connection, or the first byte of a later request, to the end of the header.
        request_timeout_s: seconds from there to the end of the body.
        max_requests: requests after which a connection is closed; 0 for no limit.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """One connection with limits."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self._deadline: asyncio.TimerHandle | None = None
            self._header_bytes = 0
            self._in_header = True
            self._requests = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_deadline(header_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # A chunk that ends one body and starts the next header counts towards the body.
            self._header_bytes += len(data) if self._in_header else 0
            super().data_received(data)
            # A chunk that ends the header may carry a body of any length; reject only a header that has not ended.
            if self._in_header and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request header exceeds {MAX_HEADER_BYTES} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_header = True
            self._start_deadline(header_timeout_s)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._in_header = False
            self._requests += 1
            if self._requests == max_requests:
                self.cycle.keep_alive = False
            self._start_deadline(request_timeout_s)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_header, self._header_bytes = True, 0
            self._cancel_deadline()

        def _start_deadline(self, seconds: float) -> None:
            self._cancel_deadline()
            self._deadline = self.loop.call_later(seconds, self._on_deadline, seconds)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _on_deadline(self, seconds: float) -> None:
            if self.pipeline:  # uvicorn pauses reading while an earlier request is being answered
                self._start_deadline(seconds)
            else:
                self.transport.close()

    return BoundedProtocol
