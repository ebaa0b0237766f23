"""Puts the gateway together: options in, an ASGI application out.

Knows every part and no part's work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from serve import __version__
from serve.errors import BadRequest, ServeError, UnknownOption
from serve.gateway.admission import Admission
from serve.gateway.backend import TorchServeBackend
from serve.gateway.lifecycle import Life
from serve.gateway.metrics import Measures
from serve.gateway.middleware import ClientGone, Envelope, error_response
from serve.gateway.models import ModelTable
from serve.gateway.openapi import DESCRIPTION
from serve.gateway.options import GatewayOptions
from serve.gateway.routes import health as operations
from serve.gateway.routes import kserve as kserve_routes
from serve.gateway.routes import predictions
from serve.gateway.tracing import Tracing
from serve.storage.references import ReferenceLimits, References

__all__ = ["create_app"]


def create_app(options: GatewayOptions, life: Life | None = None) -> ASGIApp:
    """The application, with its envelope around it.

    Raises:
        SettingsError: an option cannot be honoured.
    """
    life = life or Life()
    admission = Admission(options.max_pending_frames, options.max_pending_bytes)
    backend = TorchServeBackend(
        options.inference_url,
        options.management_url,
        key_file=options.backend_key_file,
        timeout_s=options.backend_timeout_s,
        worker_sockets=options.worker_sockets,
    )
    table = ModelTable(backend, options, observe=lambda model, report: measures.batch(model, report))
    measures = Measures(admission, table.knows)
    tracing = Tracing(options.otlp_endpoint)
    references = References(
        options.uri_prefixes,
        ReferenceLimits(
            options.max_frame_bytes, options.uri_timeout_s, private_hosts=options.uri_private_hosts
        ),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await table.renew()
        yield
        references.close()
        await table.close()
        await backend.close()
        tracing.close()

    app = FastAPI(
        title="mmdet3d-serve",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    for routes in (
        predictions.router(options, table, admission, references),
        kserve_routes.router(options, table, admission, life),
        operations.router(table, measures, life, options.refused()),
    ):
        # As they are: an included router is a second look-up within the first one's, for every request.
        app.router.routes.extend(routes.routes)
    app.add_exception_handler(ServeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(Exception, _on_unexpected)
    app.state.admission = admission
    app.state.table = table
    envelope = Envelope(app, keys=options.keys(), measures=measures, tracing=tracing)
    if not options.cors_origins:
        return envelope
    # Outermost: a browser asks its leave without a key, and must be able to read a 401.
    return CORSMiddleware(
        envelope,
        allow_origins=list(options.cors_origins),
        allow_methods=["GET", "POST", "PUT"],
        allow_headers=["*"],
        expose_headers=["server-timing", "x-request-id"],
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's complaint about a query value, in our words."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"][1:])
    return error_response(
        UnknownOption(f"{where}: {first['msg']}, got {first.get('input')!r}"), request.scope
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """A path or method that is not there."""
    assert isinstance(error, HTTPException)
    ours = BadRequest(f"{request.method} {request.url.path}: {error.detail}; GET /docs lists what there is")
    return error_response(ours, request.scope, status=error.status_code, headers=error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's word for it; nobody reads it


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response(ServeError("something went wrong here; see the gateway's log"), request.scope)
