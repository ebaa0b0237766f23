"""Calls as requests of the application, in the same process.

`Exchange` passes a call through the whole application as a client's request over HTTP would pass it. `CallRouter`,
between the middleware and the routes, reads its message: so a call has its request id, key and permit before anything
of the message is taken, which is when a client learns that it is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ClientDisconnected
from serve.gateway.admission import Permit
from serve.gateway.middleware import permit_of
from serve.protocol.batch import Bytes

__all__ = ["Call", "CallRouter", "Exchange", "HttpRequest"]

_EXTENSION = "mmdet3d_serve.call"
_CANCEL_S = 5.0  # for a request to end by itself once its client is gone
Headers = Sequence[tuple[bytes, bytes]]
Finish = Callable[[int, Mapping[bytes, bytes], bytes], Awaitable[None]]


@dataclass(frozen=True)
class HttpRequest:
    """A request of the application.

    Attributes:
        method: of HTTP.
        path: path, quoted.
        headers: besides those of the call; names in lower case.
        body: in pieces.
        id: id that the client gave the request within its message; may be empty.
    """

    method: str
    path: str
    headers: Headers = ()
    body: Sequence[Bytes] = ()
    id: str = ""


class Call(Protocol):
    """A call whose message is not read yet."""

    async def read(self, permit: Permit) -> HttpRequest | None:
        """Read the message; None if there is none to answer.

        Args:
            permit: of the call; holds the message's bytes until it is passed on.

        Raises:
            ServeError: the call is refused.
        """


class CallRouter:
    """ASGI application that reads the message of a call, and passes the request in it on to the routes."""

    def __init__(self, app: ASGIApp) -> None:
        """Pass requests on to `app`, unchanged if they came over HTTP."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        call: Call | None = scope.get("extensions", {}).get(_EXTENSION)
        if call is None:
            await self._app(scope, receive, send)
            return
        request = await call.read(permit_of(scope))
        if request is None:
            await Response()(scope, receive, send)
            return
        headers = [*scope["headers"], *request.headers]
        headers.append((b"content-length", b"%d" % sum(map(len, request.body))))
        inner = {
            **scope,
            "method": request.method,
            "path": unquote(request.path),
            "raw_path": request.path.encode(),
            "headers": headers,
        }
        await self._app(inner, _receive_pieces(request.body, receive), send)


def _receive_pieces(pieces: Sequence[Bytes], then: Receive) -> Receive:
    """Return an ASGI `receive` that brings a body in pieces, each of which is dropped once it is taken."""
    left = list(reversed(pieces)) or [b""]

    async def receive() -> Message:
        if not left:
            return await then()
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    return receive


@dataclass
class Exchange:
    """One request through the application.

    Attributes:
        app: the application.
        path: path that log and traces show; with `call`, that of the call.
        headers: of the request.
        client: address and port of the client.
        finish: called with status, headers and body of the response, and awaited while the request still holds its
            permit; not called if the client is gone.
        call: the call, if the request is in its message.
    """

    app: ASGIApp
    path: str
    headers: Headers
    client: tuple[str, int] | None
    finish: Finish
    call: Call | None = None
    _gone: asyncio.Event = field(default_factory=asyncio.Event, init=False, repr=False)
    _status: int = field(default=0, init=False)
    _response_headers: Mapping[bytes, bytes] = field(default_factory=dict, init=False, repr=False)
    _body: bytearray = field(default_factory=bytearray, init=False, repr=False)
    _error: ClientDisconnected | None = field(default=None, init=False)

    async def run(self) -> None:
        """Pass the request through; if this task is cancelled, its frames are, as when a client over HTTP hangs up.

        Raises:
            ClientDisconnected: of `finish`.
        """
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": "GET" if self.call is None else "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
            "extensions": {} if self.call is None else {_EXTENSION: self.call},
        }
        request = asyncio.ensure_future(self.app(scope, self._receive, self._send))
        try:
            await asyncio.shield(request)
        except asyncio.CancelledError:
            self._gone.set()
            await asyncio.wait([request], timeout=_CANCEL_S)
            request.cancel()
            raise
        if self._error is not None:
            raise self._error

    async def _receive(self) -> Message:
        """Wait for what follows the body: the client's disconnect, or the end of interest in it."""
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._response_headers = dict(message["headers"])
            if self._status >= 400:  # the response does not wait for the rest of a body, which was read
                self._gone.set()
            return
        self._body += message.get("body", b"")
        if not message.get("more_body") and self._status != 499:
            try:
                await self.finish(self._status, self._response_headers, bytes(self._body))
            except ClientDisconnected as error:
                self._error = error
