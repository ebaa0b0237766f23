"""What goes around every request: its id, its API key, its place in the metrics and in the log, and the one way
an error is answered.

Plain ASGI, so that bodies stream through untouched and a hang-up stays visible. Knows nothing about frames.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import NotReady, Overloaded, ServeError, Unauthorized, error_body
from serve.gateway.metrics import Metrics
from serve.gateway.tracing import Tracing

__all__ = ["RequestMiddleware", "error_response", "request_id_of"]

RETRY_AFTER_S = 1
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN_PATHS = ("/health/", "/v2/health/", "/metrics")
_CLOSING = (408, 413)  # the rest of such a body is not worth keeping
_LINGERING_CLOSE_S = 2.0

logger = logging.getLogger("serve.gateway.access")


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], metrics: Metrics, tracing: Tracing) -> None:
        """`keys` are the API keys that are accepted; none means that none is asked for."""
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.perf_counter()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with self._tracing.request(scope["method"], scope["path"], headers) as span:
            try:
                self._check_key(scope["path"], headers)
                await self._app(scope, receive, send_on)
            except ServeError as error:
                await error_response(error, scope)(scope, receive, send_on)
            except Exception:
                # Already answered with a fixed text; the reason is for the log alone.
                logger.exception("unexpected", extra={"request_id": request_id})
            finally:
                seconds = time.perf_counter() - began
                span.end(status, state)
                self._note(scope, state, status, seconds)

    def _note(self, scope: Scope, state: Mapping[str, Any], status: int, seconds: float) -> None:
        self._metrics.observe_request(state.get("model"), status, seconds)
        quiet = scope["path"].startswith(_OPEN_PATHS) and status < 500
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d",
            scope["method"],
            quote(scope["path"]),  # what a path holds must not end the line
            status,
            extra={
                "request_id": state["request_id"],
                "status": status,
                "duration_ms": round(seconds * 1e3, 3),
                "model": state.get("model"),
                "frames": state.get("frames"),
                **({"error": state["error"]} if "error" in state else {}),
            },
        )

    def _check_key(self, path: str, headers: Headers) -> None:
        """Compare with every key, in constant time."""
        if not self._keys or path.startswith(_OPEN_PATHS):
            return
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = credentials if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.strip().encode()).digest()
        # All of them, so that the time does not tell which one came close.
        if not sum([hmac.compare_digest(digest, key) for key in self._keys]):
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id that the middleware gave or took."""
    return str(scope["state"]["request_id"])


def error_response(
    error: ServeError,
    scope: MutableMapping[str, Any],
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a response: its status (unless another is said) and the one body; ``/v2`` has its protocol's own."""
    scope["state"]["error"] = error.code
    status = error.status if status is None else status
    if scope["path"].startswith("/v2"):
        body: dict[str, Any] = {"error": str(error), "code": error.code}
    else:
        body = error_body(error, request_id_of(scope))
    said = dict(headers or {})
    if isinstance(error, Overloaded | NotReady):
        said["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        said["www-authenticate"] = "Bearer"
    if status in _CLOSING:
        said["connection"] = "close"
        return _LingeringClose(orjson.dumps(body), status, said, media_type="application/json")
    return Response(orjson.dumps(body), status, said, media_type="application/json")


class _LingeringClose(Response):
    """Answers, takes in and drops what the client is still sending for a while, and closes.

    Closing at once would reset the connection under a client that sends, and with it goes the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGERING_CLOSE_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
