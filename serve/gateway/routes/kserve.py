"""Routes of the Open Inference Protocol (KServe v2) under ``/v2``; the codec is in `kserve_codec`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.errors import BadRequest, FrameTooLarge, NotReady, ServeError, UnknownOption, quote
from serve.gateway.canary import Canaries
from serve.gateway.compression import compress
from serve.gateway.dispatch import run_frames
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.middleware import permit_of
from serve.gateway.models import ModelRegistry
from serve.gateway.offload import run_beside_loop
from serve.gateway.openapi import errors
from serve.gateway.options import GatewayOptions
from serve.gateway.request import RequestOptions, check_frames, parse_request_options, read_body, read_query
from serve.gateway.response import VERSION_HEADER, Timing
from serve.gateway.router import FrameRoute
from serve.gateway.routes.kserve_codec import (
    InferRequest,
    decode_infer,
    encode_infer,
    json_bytes,
    model_metadata,
)
from serve.gateway.routes.kserve_tensors import OPTIONS, REFUSED_OPTIONS, InferBounds
from serve.protocol.option_places import unknown_option

__all__ = ["infer_route", "router"]

_EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
_HEADER_LENGTH = "inference-header-content-length"


def router(registry: ModelRegistry, lifecycle: Lifecycle) -> APIRouter:
    """Create the routes of the protocol, but for that of frames."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        """Return name, version and protocol extensions of the server."""
        return {"name": "mmdet3d-serve", "version": __version__, "extensions": list(_EXTENSIONS)}

    @routes.get("/health/live")
    async def live() -> dict[str, Any]:
        """Return 200 while the process runs."""
        return {"live": True}

    @routes.get("/health/ready", responses={503: {"description": "Not ready"}})
    async def ready() -> Response:
        """Return 200 if frames can be answered."""
        healthy = not lifecycle.draining and (await registry.health()).ready
        return JSONResponse({"ready": healthy}, 200 if healthy else 503)

    async def model_ready(model: str, version: str | None) -> Response:
        try:
            ready = (await registry.find(model, version)).status == "ready"
        except NotReady:
            ready = False
        return JSONResponse({"name": model, "ready": ready}, 200 if ready else 503)

    async def metadata(model: str, version: str | None) -> dict[str, Any]:
        found = await registry.find(model, version)
        versions = [each.state.version for each in registry.versions(model)]
        return model_metadata(model, versions, found.spec or {})

    error_responses = partial(errors, protocol=True)

    @routes.get(
        "/models/{model}/ready", responses={503: {"description": "Not ready"}, **error_responses(404)}
    )
    async def default_ready(model: str) -> Response:
        """Return 200 if the model can answer frames."""
        return await model_ready(model, None)

    @routes.get(
        "/models/{model}/versions/{version}/ready",
        responses={503: {"description": "Not ready"}, **error_responses(404)},
    )
    async def version_ready(model: str, version: str) -> Response:
        """Return 200 if this version can answer frames."""
        return await model_ready(model, version)

    @routes.get("/models/{model}", responses=error_responses(404, 503))
    async def default_metadata(model: str) -> dict[str, Any]:
        """Describe inputs and outputs of the model."""
        return await metadata(model, None)

    @routes.get("/models/{model}/versions/{version}", responses=error_responses(404, 503))
    async def version_metadata(model: str, version: str) -> dict[str, Any]:
        """Describe inputs and outputs of this version."""
        return await metadata(model, version)

    return routes


def infer_route(options: GatewayOptions, canaries: Canaries) -> FrameRoute:
    """Create the route of frames, ``POST /v2/models/{model}[/versions/{version}]/infer``; `canaries` choose."""
    bounds = InferBounds(options.json_bounds, options.max_frames_per_request, options.max_body_bytes)

    async def infer(request: Request, model: str, version: str | None) -> Response:
        arrived = time.perf_counter()
        timing = Timing()
        request.scope["state"]["model"] = model
        permit = permit_of(request.scope)
        chosen = await canaries.choose(model, version)
        served = chosen.model
        request.scope["state"]["version"] = served.state.version
        permit.model = model
        spec = served.spec or {}
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise BadRequest(f"Content-Encoding {quote(coding)} is not supported; send the body uncompressed")
        permit.check(items=1)
        body = await read_body(request, permit, options)
        header_length = request.headers.get(_HEADER_LENGTH)
        infer_request = await run_beside_loop(
            len(body), decode_infer, json_bytes(body, header_length), body, header_length, spec, bounds
        )
        request_options = _read_options(request, infer_request, options)
        if len(infer_request.frames) > options.max_frames_per_request:
            raise FrameTooLarge(
                f"the request has {len(infer_request.frames)} frames, the limit is {options.max_frames_per_request}"
            )
        permit.grow(items=len(infer_request.frames))
        frames = check_frames(infer_request.frames, request_options.frame, options)
        request.scope["state"]["frames"] = len(frames)
        timing.decode_s = time.perf_counter() - arrived
        remaining_s = request_options.timeout_s - timing.decode_s
        outcomes = await run_frames(request, served, frames, remaining_s, chosen.fallback)
        bodies = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, ServeError):
                # The protocol has one status per request.
                raise type(outcome)(f"frame {i}: {outcome}" if len(outcomes) > 1 else str(outcome))
            timing.add(outcome)
            bodies.append(outcome.value.body)
        versions = chosen.versions(len(outcomes))
        answer, header_bytes = encode_infer(infer_request, bodies, model, versions, spec)
        headers = {"server-timing": timing.header(), VERSION_HEADER: versions}
        if options.compresses(len(answer)):
            answer = await compress(answer, ", ".join(request.headers.getlist("accept-encoding")), headers)
        if header_bytes is None:
            return Response(answer, media_type="application/json", headers=headers)
        headers[_HEADER_LENGTH] = str(header_bytes)
        return Response(answer, media_type="application/octet-stream", headers=headers)

    return infer


def _read_options(request: Request, given: InferRequest, options: GatewayOptions) -> RequestOptions:
    """Read the options among the parameters, in the query and in headers; the parameters take precedence.

    Raises:
        UnknownOption: an unknown name, an invalid value, or an option that this protocol has no use for.
    """
    parameters = {**read_query(request), **given.parameters}
    in_headers = [name for name in REFUSED_OPTIONS if "x-" + name.replace("_", "-") in request.headers]
    for name in (*parameters, *in_headers):
        if name in REFUSED_OPTIONS:
            raise UnknownOption(REFUSED_OPTIONS[name])
        if name not in OPTIONS:
            raise unknown_option(name, OPTIONS)
    return parse_request_options(parameters, request.headers, options)
