"""Middleware around every request: request id, API key, permit, metrics, access log, and the error response.

The permit of a request lasts until its answer is written: a long answer goes to the socket piece by piece, each once
the one before has left, and its bytes count until then.

Plain ASGI, so that bodies stream through unbuffered and a disconnect stays visible.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import (
    MAX_QUOTED_CHARS,
    NotReady,
    Overloaded,
    ServeError,
    Unauthorized,
    error_body,
    message_of,
)
from serve.gateway.admission import Admission, Permit, client_of
from serve.gateway.metrics import Metrics
from serve.gateway.tracing import Tracing

__all__ = ["OPEN_PATHS", "RequestMiddleware", "error_response", "permit_of", "request_id_of"]

RETRY_AFTER_S = 1
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/_.~-]*")
#: Beginnings of the paths that need no key; the assets are files of the package, which hold nothing of this server.
OPEN_PATHS = ("/health/", "/v2/health/", "/metrics", "/ping", "/ui/assets/", "/docs/assets/")
_CHALLENGE = {"www-authenticate": "Bearer"}
_CLOSING = (408, 413)  # close instead of draining the body
_LINGERING_CLOSE_S = 2.0
# Bytes of an answer that are given to the transport at a time; a shorter answer is not counted by the permit.
_PIECE_BYTES = 64 * 1024

# Creates a response of a status, with additional headers.
DocumentResponse = Callable[[int, Mapping[str, str]], Response]

logger = logging.getLogger("serve.gateway.access")


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        admission: Admission,
        metrics: Metrics,
        tracing: Tracing,
        documents: Mapping[str, DocumentResponse] = MappingProxyType({}),
    ) -> None:
        """Accept any of the API `keys`; without keys, requests need none.

        Args:
            app: the application.
            keys: API keys.
            admission: gives each request its permit.
            metrics: count each request.
            tracing: traces each request.
            documents: HTML documents by path, which ask for the key: the body of the 401 that a browser gets there.
        """
        self._app = app
        self._admission = admission
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._metrics = metrics
        self._tracing = tracing
        self._documents = documents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.perf_counter()
        state["permit"] = permit = self._admission.permit(client_of(scope))
        counted = not scope["path"].startswith(OPEN_PATHS)  # those are answered whatever is held
        status = 0
        replaced = False

        async def send_answer(message: Message) -> None:
            nonlocal status, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                if counted and message["status"] < 400:
                    try:
                        _count_answer(permit, answer.get("content-length", ""))
                    except Overloaded as error:
                        await error_response(error, scope)(scope, receive, send_answer)
                        replaced = True
                        return
                status = message["status"]
                answer["x-request-id"] = request_id
            elif len(body := message.get("body", b"")) > _PIECE_BYTES:
                view = memoryview(body)
                for start in range(0, len(view), _PIECE_BYTES):
                    piece = view[start : start + _PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                message = {**message, "body": b""}
            await send(message)

        with self._tracing.request(scope["method"], scope["path"], headers) as span:
            try:
                if key := self._check_key(scope["path"], headers):
                    permit.client = key
                await self._app(scope, receive, send_answer)
            except ServeError as error:
                await self._refuse(error, scope, headers)(scope, receive, send_answer)
            except Exception:
                # Already answered with a generic message; only the log has the reason.
                logger.exception("unexpected error", extra={"request_id": request_id})
            finally:
                permit.release()
                seconds = time.perf_counter() - began
                span.end(status, state)
                self._record(scope, state, status, seconds)

    def _record(self, scope: Scope, state: Mapping[str, Any], status: int, seconds: float) -> None:
        path, model, version = scope["path"][:MAX_QUOTED_CHARS], state.get("model"), state.get("version")
        self._metrics.observe_request(model, status, seconds)
        if version is not None:
            self._metrics.observe_version(str(model), version, status, seconds)
        quiet = path.startswith(OPEN_PATHS) and status < 500
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d",
            scope["method"],
            path if _PLAIN_PATH.fullmatch(path) else quote(path),  # no line breaks in a log line
            status,
            extra={
                "request_id": state["request_id"],
                "status": status,
                "duration_ms": round(seconds * 1e3, 3),
                "model": model and model[:MAX_QUOTED_CHARS],
                "version": version,
                "frames": state.get("frames"),
                **({"error": state["error"]} if "error" in state else {}),
            },
        )

    def _refuse(self, error: ServeError, scope: Scope, headers: Headers) -> Response:
        document = self._documents.get(scope["path"]) if isinstance(error, Unauthorized) else None
        if document is None or scope["method"] != "GET" or "text/html" not in headers.get("accept", ""):
            return error_response(error, scope)
        scope["state"]["error"] = error.code
        return document(error.status, _CHALLENGE)

    def _check_key(self, path: str, headers: Headers) -> str | None:
        """Reject a request without a valid API key; compares with every key in constant time.

        Returns the name of the key in `Admission`, None if the request needs none.
        """
        if not self._keys or path.startswith(OPEN_PATHS):
            return None
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = credentials if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.strip().encode()).digest()
        # Compare with all, so that the time does not depend on the position of a match.
        if not sum([hmac.compare_digest(digest, key) for key in self._keys]):
            raise Unauthorized(
                "missing or unknown API key; send Authorization: Bearer KEY, or X-API-Key: KEY"
            )
        return digest.hex()


def permit_of(scope: MutableMapping[str, Any]) -> Permit:
    """Return the permit of a request."""
    permit: Permit = scope["state"]["permit"]
    return permit


def _count_answer(permit: Permit, content_length: str) -> None:
    """Hold the bytes of a computed answer in place of its request; one without a length counts itself."""
    if content_length.isdigit():
        nbytes = int(content_length)
        permit.exchange(nbytes if nbytes > _PIECE_BYTES else 0)


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Return the id of a request, its own or a generated one."""
    return str(scope["state"]["request_id"])


def error_response(
    error: ServeError,
    scope: MutableMapping[str, Any],
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Create the response for an error; under ``/v2`` its body follows the Open Inference Protocol.

    Args:
        error: the error.
        scope: ASGI scope of the request.
        status: HTTP status instead of the error's own.
        headers: additional headers.
    """
    scope["state"]["error"] = error.code
    status = error.status if status is None else status
    if scope["path"].startswith("/v2"):
        body: dict[str, Any] = {"error": message_of(error), "code": error.code}
    else:
        body = error_body(error, request_id_of(scope))
    response_headers = dict(headers or {})
    if isinstance(error, Overloaded | NotReady):
        response_headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        response_headers |= _CHALLENGE
    if status in _CLOSING:
        response_headers["connection"] = "close"
        return _LingeringClose(orjson.dumps(body), status, response_headers, media_type="application/json")
    return Response(orjson.dumps(body), status, response_headers, media_type="application/json")


class _LingeringClose(Response):
    """Response that discards the rest of the request body for a short time before the connection closes.

    Closing at once would reset the connection of a client that still sends, which would then lose the response.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGERING_CLOSE_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
