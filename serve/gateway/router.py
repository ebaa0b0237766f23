"""Router of the requests that carry frames; all others go on to FastAPI.

FastAPI's middleware and routing took a fifth of a request's CPU time (docs/decisions/0016-request-spine.md), and its
parsing is of no use to these routes, which parse their requests themselves. `serve.gateway.openapi` documents them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import BadRequest, ClientDisconnected, ServeError
from serve.gateway.middleware import error_response, request_id_of

__all__ = ["FrameRoute", "FrameRouter", "internal_error"]

# Answers a request; further arguments are the name of the model, and its version if the path has one.
FrameRoute = Callable[[Request, str, str | None], Awaitable[Response]]

logger = logging.getLogger(__name__)


class FrameRouter:
    """ASGI application in front of another one.

    Args:
        app: answers all other requests.
        predict: answers ``/predictions/{model}[/{version}]``.
        infer: answers ``/v2/models/{model}[/versions/{version}]/infer``.
    """

    def __init__(self, app: ASGIApp, *, predict: FrameRoute, infer: FrameRoute) -> None:
        self._app = app
        self._predict = predict
        self._infer = infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        version: str | None = None
        methods: tuple[str, ...]
        # curl -T sends PUT, which TorchServe accepts as well.
        match scope["path"].split("/"):
            case ["", "predictions", model]:
                route, methods = self._predict, ("POST", "PUT")
            case ["", "predictions", model, version] if version:
                route, methods = self._predict, ("POST", "PUT")
            case ["", "v2", "models", model, "infer"]:
                route, methods = self._infer, ("POST",)
            case ["", "v2", "models", model, "versions", version, "infer"] if version:
                route, methods = self._infer, ("POST",)
            case _:
                model = ""
        if not model:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in methods:
            raised = BadRequest(
                f"{scope['method']} {scope['path']}: Method Not Allowed; GET /docs lists the routes"
            )
            response = error_response(raised, scope, status=405, headers={"allow": ", ".join(methods)})
        else:
            try:
                response = await route(Request(scope, receive), model, version)
            except ServeError as error:
                response = error_response(error, scope)
            except ClientDisconnected:
                response = Response(status_code=499)  # nginx: client closed request; never sent
            except Exception:
                logger.exception("unexpected error", extra={"request_id": request_id_of(scope)})
                response = internal_error(scope)
        await response(scope, receive, send)


def internal_error(scope: Scope) -> Response:
    """Create the response for an error that no check has foreseen."""
    message = f"internal error; the gateway's log has the reason under request_id {request_id_of(scope)}"
    return error_response(ServeError(message), scope)
