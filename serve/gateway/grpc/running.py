"""A call as grpcio has it: its metadata, its writes, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from serve.errors import ClientDisconnected
from serve.gateway.grpc.status import CallError
from serve.gateway.options import GatewayOptions

__all__ = ["Answer", "Context", "RunningCall", "read_trailing"]

# Metadata that the application reads as headers, beside x-….
_HEADERS = {"authorization", "traceparent", "tracestate"}
_TRAILING = (b"x-request-id", b"server-timing", b"retry-after")
Context = Any  # grpc.aio.ServicerContext


@dataclass
class Answer:
    """How a call ends: with what was written, or with an error.

    Attributes:
        error: the error; None if a response was written.
        metadata: trailing metadata.
    """

    error: CallError | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def fail(self, error: CallError) -> None:
        """End with an error."""
        self.error = error
        self.metadata = (*self.metadata, ("error-code", error.code))


class RunningCall:
    """A call as gRPC has it.

    Attributes:
        context: of grpcio.
        headers: the metadata that the application reads.
        client: address and port of the client.
    """

    def __init__(self, context: Context, options: GatewayOptions) -> None:
        """Take a call from grpcio, and the limits of its writes from `options`."""
        self.context = context
        self._options = options
        self._stalled: asyncio.Future[None] | None = None
        self.headers = [
            (key.encode(), value.encode("latin-1", "replace"))
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str) and (key in _HEADERS or key.startswith("x-"))
        ]
        # ipv4:ADDRESS:PORT or ipv6:%5BADDRESS%5D:PORT
        family, _, rest = unquote(context.peer()).partition(":")
        host, _, port = rest.rpartition(":")
        is_internet = family in ("ipv4", "ipv6") and port.isdigit()
        self.client = (host.strip("[]"), int(port)) if is_internet else None

    async def write(self, message: bytes) -> None:
        """Write a message; the client must take it at the rate that HTTP's clients must keep.

        Raises:
            ClientDisconnected: it does not, now or before.
        """
        if self._stalled is not None:
            raise ClientDisconnected
        options = self._options
        limit_s = options.client_stall_timeout_s + len(message) / options.client_bytes_per_s
        writing = asyncio.ensure_future(self.context.write(message))
        done, _ = await asyncio.wait({writing}, timeout=limit_s)
        if not done:
            self._stalled = writing
            writing.add_done_callback(
                lambda ended: ended.cancelled() or ended.exception()
            )  # of no interest then
            raise ClientDisconnected
        writing.result()

    async def settle(self) -> None:
        """Wait for the end of a write that takes too long: grpcio can neither take it back nor end the call before."""
        if self._stalled is not None:
            await asyncio.wait({self._stalled})


def read_trailing(headers: Mapping[bytes, bytes]) -> tuple[tuple[str, str], ...]:
    """Return the headers of a response that are trailing metadata of its call."""
    found = [(name.decode(), headers[name].decode()) for name in _TRAILING if name in headers]
    if retry_after := headers.get(b"retry-after"):
        # A client with a retry policy waits for so long (grpc/proposal, A6).
        found.append(("grpc-retry-pushback-ms", str(1000 * int(retry_after))))
    return tuple(found)
