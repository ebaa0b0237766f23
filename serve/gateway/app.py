"""Application factory of the gateway: options in, ASGI application out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from serve import __version__
from serve.errors import BadRequest, ServeError, SettingsError, UnknownOption
from serve.gateway.admission import Admission
from serve.gateway.backend import TorchServeBackend
from serve.gateway.canary import Canaries
from serve.gateway.grpc.calls import CallRouter
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import Metrics
from serve.gateway.middleware import RequestMiddleware, error_response
from serve.gateway.models import ModelRegistry
from serve.gateway.openapi import DESCRIPTION, complete
from serve.gateway.options import GatewayOptions
from serve.gateway.rollout import Rollout
from serve.gateway.router import FrameRouter, internal_error
from serve.gateway.routes import health, kserve, kserve_state, predictions
from serve.gateway.sampling import open_sampler
from serve.gateway.shadow import ShadowLimits, ShadowTraffic
from serve.gateway.shadow_metrics import ShadowMetrics
from serve.gateway.siblings import Siblings
from serve.gateway.tracing import Tracing
from serve.gateway.tracks import TrackSessions
from serve.gateway.ui import images, pages, points
from serve.gateway.watching import Watching, WatchOptions
from serve.settings import Settings
from serve.storage.references import ReferenceLimits, References

__all__ = ["create_app"]


def create_app(
    options: GatewayOptions,
    lifecycle: Lifecycle | None = None,
    rejected: Mapping[str, str] | None = None,
    siblings: Siblings | None = None,
) -> ASGIApp:
    """Create the application with its middleware.

    Args:
        options: options of the gateway.
        lifecycle: shared with the server that drains; a new one by default.
        rejected: archives that are not served, with the reason of each, for ``/models``.
        siblings: the other processes of the port, if there are several.

    Raises:
        SettingsError: an option needs a file or package that is missing.
    """
    lifecycle = lifecycle or Lifecycle()
    admission = Admission(options.max_pending_frames, options.max_pending_bytes, options.client_share)
    backend = TorchServeBackend(
        options.inference_url,
        options.management_url,
        key_file=options.backend_key_file,
        timeout_s=options.backend_timeout_s,
        worker_sockets=options.socket_folder,
    )
    registry = ModelRegistry(backend, options)
    admission.count_models = registry.count
    sessions = TrackSessions(options, is_only_process=siblings is None)
    metrics = Metrics(admission, registry.is_registered, sessions)
    registry.on_batch = metrics.observe_batch
    rollout = Rollout.of(options.canary, options.shadow, options.rollout_file)
    registry.on_refresh = rollout.reload
    registry.on_versions = rollout.report_missing
    metrics.show_rollout(rollout)
    canaries = Canaries(registry, rollout, sessions, metrics, options.timeout_s / 2)
    shadow_limits = ShadowLimits(
        options.shadow_frames, options.shadow_bytes, options.shadow_wait_s, options.timeout_s
    )
    shadow = ShadowTraffic(
        registry, rollout, shadow_limits, ShadowMetrics(metrics.registry), admission, lifecycle
    )
    if options.shadow or options.rollout_file:
        registry.frame_observers.append(shadow.observe)
    metrics.on_exposition += [canaries.show_metrics, shadow.show_metrics]
    watching = Watching(registry.get, WatchOptions.of(options))
    backend.on_observed = watching.observe
    metrics.texts.append(watching.exposition)
    sampler = open_sampler(options, metrics.observe_sample)
    if sampler is not None:
        registry.frame_observers.append(sampler.observe)
    tracing = Tracing(options.otlp_endpoint)
    references = References(
        options.uri_prefixes,
        ReferenceLimits(
            options.max_frame_bytes, options.uri_timeout_s, private_hosts=options.uri_private_hosts
        ),
    )

    listen_grpc = _import_grpc() if options.grpc_port is not None else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await registry.refresh()
        if listen_grpc is None:
            yield
        else:
            shared = siblings is not None
            async with listen_grpc(
                outermost, options, lifecycle, metrics, shared=shared
            ) as app.state.grpc_port:
                yield
        await shadow.close()
        references.close()
        await registry.close()
        if sampler is not None:
            await asyncio.to_thread(sampler.close)
        await backend.close()
        tracing.close()
        if siblings is not None:
            await siblings.close()

    app = FastAPI(
        title="mmdet3d-serve",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's loads its scripts from the internet
        redoc_url=None,
        redirect_slashes=False,
    )
    limits = replace(Settings.from_environment().limits, max_frame_bytes=options.max_frame_bytes)
    for routes in (
        kserve_state.router(options, registry, rejected or {}),  # /v2/models/stats before /v2/models/{model}
        kserve.router(registry, lifecycle),
        health.router(registry, metrics, lifecycle, sessions, rejected or {}, rollout, siblings),
        pages.router(is_ui=options.ui),
        *((points.router(options, limits), images.router(options, limits)) if options.ui else ()),
    ):
        app.include_router(routes)
    app.openapi = partial(_openapi, app, options)  # type: ignore[method-assign]
    app.add_exception_handler(ServeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)
    app.state.admission = admission
    app.state.registry = registry
    app.state.shadow = shadow
    routed = FrameRouter(
        app,
        predict=predictions.predict_route(options, canaries, references, sessions),
        infer=kserve.infer_route(options, canaries),
    )
    outermost: ASGIApp = RequestMiddleware(
        routed if listen_grpc is None else CallRouter(routed),
        keys=options.keys(),
        admission=admission,
        metrics=metrics,
        tracing=tracing,
        documents={
            path: partial(pages.document_response, path) for path in pages.document_paths(is_ui=options.ui)
        },
    )
    if not options.cors_origins:
        return outermost
    # Around it: a preflight request carries no API key, and the browser must be able to read a 401.
    return CORSMiddleware(
        outermost,
        allow_origins=list(options.cors_origins),
        allow_methods=["GET", "POST", "PUT"],
        allow_headers=["*"],
        expose_headers=["server-timing", "x-model-version", "x-request-id"],
    )


def _import_grpc() -> Callable[..., AbstractAsyncContextManager[int]]:
    try:
        from serve.gateway.grpc.server import listen
    except ImportError:
        raise SettingsError(
            "grpc_port is set, but gRPC is not installed: pip install -r requirements/grpc.lock"
        ) from None
    return listen


def _openapi(app: FastAPI, options: GatewayOptions) -> dict[str, Any]:
    """Build the OpenAPI document, once: FastAPI's, with the routes that FastAPI does not know."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        app.openapi_schema = complete(document, options)
    return app.openapi_schema


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Answer FastAPI's validation error as `UnknownOption`."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"][1:])
    return error_response(
        UnknownOption(f"{where}: {first['msg']}, got {first.get('input')!r}"), request.scope
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    mapped = BadRequest(f"{request.method} {request.url.path}: {error.detail}; GET /docs lists the routes")
    return error_response(mapped, request.scope, status=error.status_code, headers=error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return internal_error(request.scope)
