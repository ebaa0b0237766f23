"""Routes of the Open Inference Protocol (KServe v2) under ``/v2``; the codec is `serve.gateway.routes.kserve_codec`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.errors import BadRequest, FrameTooLarge, NotReady, ServeError
from serve.gateway.admission import Admission
from serve.gateway.lifecycle import Life
from serve.gateway.middleware import request_id_of
from serve.gateway.models import ModelTable
from serve.gateway.openapi import errors
from serve.gateway.options import GatewayOptions
from serve.gateway.request import checked_frames, read_body, request_options
from serve.gateway.response import Timing
from serve.gateway.routes.kserve_codec import decode_infer, encode_infer, model_metadata
from serve.gateway.routes.predictions import outcomes_of, unless_hung_up

__all__ = ["router"]

_HEADER_LENGTH = "inference-header-content-length"


def router(options: GatewayOptions, table: ModelTable, admission: Admission, life: Life) -> APIRouter:
    """The routes of the protocol."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        """Who this is."""
        return {"name": "mmdet3d-serve", "version": __version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live")
    async def live() -> dict[str, Any]:
        """Whether the process turns."""
        return {"live": True}

    @routes.get("/health/ready", responses={503: {"description": "Not ready"}})
    async def ready() -> Response:
        """Whether a frame would be answered now."""
        healthy = not life.draining and (await table.health()).ready
        return JSONResponse({"ready": healthy}, 200 if healthy else 503)

    async def model_ready(model: str, version: str | None) -> Response:
        try:
            ready = (await table.find(model, version)).status == "ready"
        except NotReady:
            ready = False
        return JSONResponse({"name": model, "ready": ready}, 200 if ready else 503)

    async def metadata(model: str, version: str | None) -> dict[str, Any]:
        found = await table.find(model, version)
        versions = [each.state.version for each in table.versions(model)]
        return model_metadata(model, versions, found.spec or {})

    async def infer(request: Request, model: str, version: str | None) -> Response:
        arrived = time.perf_counter()
        timing = Timing()
        request.scope["state"]["model"] = model
        with admission.permit() as permit:
            served = await table.find(model, version)
            spec = served.spec or {}
            if (coding := request.headers.get("content-encoding", "identity")) != "identity":
                raise BadRequest(f"Content-Encoding {coding} is not undone here; send the body as it is")
            permit.expect(items=1)
            body = await read_body(request, permit, options)
            asked = decode_infer(body, request.headers.get(_HEADER_LENGTH), spec)
            wanted = request_options({**request.query_params, **asked.parameters}, request.headers, options)
            if len(asked.frames) > options.max_frames_per_request:
                raise FrameTooLarge(
                    f"the request has {len(asked.frames)} frames, the limit is {options.max_frames_per_request}"
                )
            permit.grow(items=len(asked.frames))
            frames = checked_frames(asked.frames, wanted.frame, options)
            request.scope["state"]["frames"] = len(frames)
            timing.decode_s = time.perf_counter() - arrived
            left_s = wanted.timeout_s - timing.decode_s
            outcomes = await unless_hung_up(request, outcomes_of(served, frames, left_s))
            bodies = []
            for i, outcome in enumerate(outcomes):
                if isinstance(outcome, ServeError):
                    # The protocol knows one verdict per request.
                    raise type(outcome)(f"frame {i}: {outcome}" if len(outcomes) > 1 else str(outcome))
                timing.add(outcome)
                bodies.append(outcome.value.body)
            answer, header_bytes = encode_infer(asked, bodies, model, served.state.version, spec)
        headers = {"server-timing": timing.header(), "x-request-id": request_id_of(request.scope)}
        if header_bytes is None:
            return Response(answer, media_type="application/json", headers=headers)
        headers[_HEADER_LENGTH] = str(header_bytes)
        return Response(answer, media_type="application/octet-stream", headers=headers)

    faults = partial(errors, protocol=True)
    infer_faults = faults(400, 404, 408, 413, 422, 429, 500, 502, 503, 504, 507)

    @routes.get("/models/{model}/ready", responses={503: {"description": "Not ready"}, **faults(404)})
    async def default_ready(model: str) -> Response:
        """Whether the model takes frames."""
        return await model_ready(model, None)

    @routes.get(
        "/models/{model}/versions/{version}/ready",
        responses={503: {"description": "Not ready"}, **faults(404)},
    )
    async def version_ready(model: str, version: str) -> Response:
        """Whether this version takes frames."""
        return await model_ready(model, version)

    @routes.get("/models/{model}", responses=faults(404, 503))
    async def default_metadata(model: str) -> dict[str, Any]:
        """Inputs and outputs of the model."""
        return await metadata(model, None)

    @routes.get("/models/{model}/versions/{version}", responses=faults(404, 503))
    async def version_metadata(model: str, version: str) -> dict[str, Any]:
        """Inputs and outputs of this version."""
        return await metadata(model, version)

    @routes.post("/models/{model}/infer", responses=infer_faults)
    async def default_infer(request: Request, model: str) -> Response:
        """Detections as tensors."""
        return await infer(request, model, None)

    @routes.post("/models/{model}/versions/{version}/infer", responses=infer_faults)
    async def version_infer(request: Request, model: str, version: str) -> Response:
        """Detections as tensors, of this version."""
        return await infer(request, model, version)

    return routes
