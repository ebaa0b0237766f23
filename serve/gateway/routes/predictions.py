"""Routes ``POST /predictions/{model}[/{version}]``: TorchServe's predictions API for one or several frames."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from serve.errors import ServeError
from serve.gateway import openapi
from serve.gateway.admission import Admission, Permit
from serve.gateway.backend import EncodedFrame
from serve.gateway.dispatch import FrameResult, cancel_on_disconnect, run_frame, run_frames
from serve.gateway.middleware import request_id_of
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.request import ParsedRequest, parse_request_options, receive_frames
from serve.gateway.response import Media, Timing, choose_media, encode_line, encode_list, encode_one
from serve.storage.references import References

__all__ = ["router"]


def router(
    options: GatewayOptions, registry: ModelRegistry, admission: Admission, references: References
) -> APIRouter:
    """Create the routes of TorchServe's predictions API."""
    routes = APIRouter(tags=["predictions"], route_class=_DirectRoute)

    async def predict(request: Request, model: str, version: str | None) -> Response:
        arrived = time.perf_counter()
        timing = Timing()
        media = choose_media(request.headers.get("accept"))
        request_options = parse_request_options(request.query_params, request.headers, options)
        request.scope["state"]["model"] = model
        with admission.permit() as permit:
            served = await registry.find(model, version)
            parsed = await receive_frames(
                request, permit, options, request_options.frame, _parts(served), references
            )
            timing.decode_s = time.perf_counter() - arrived
            request.scope["state"]["frames"] = len(parsed.frames)
            remaining_s = request_options.timeout_s - timing.decode_s
            if media == "application/x-ndjson":
                # The stream outlives this function, so it takes over the permit.
                lines = _lines(request, served, parsed, remaining_s)
                return _LinesResponse(lines, permit.move())
            outcomes = await cancel_on_disconnect(request, run_frames(served, parsed.frames, remaining_s))
            return await _answer(request, served, parsed, outcomes, media, timing)

    documentation = openapi.predictions(options)

    @routes.post("/predictions/{model}", **documentation, operation_id="predict")
    async def predict_default(
        request: Request, model: Annotated[str, Path(description="Name of the model", max_length=128)]
    ) -> Response:
        """Detect objects in one or several frames."""
        return await predict(request, model, None)

    @routes.post("/predictions/{model}/{version}", **documentation, operation_id="predict_version")
    async def predict_version(
        request: Request,
        model: Annotated[str, Path(description="Name of the model", max_length=128)],
        version: Annotated[str, Path(description="Version of the model", max_length=64)],
    ) -> Response:
        """Detect objects in one or several frames with this version of the model."""
        return await predict(request, model, version)

    # curl -T sends PUT, which TorchServe accepts as well.
    routes.add_api_route("/predictions/{model}", predict_default, methods=["PUT"], include_in_schema=False)
    routes.add_api_route(
        "/predictions/{model}/{version}", predict_version, methods=["PUT"], include_in_schema=False
    )
    return routes


def _parts(served: ModelVersion) -> tuple[str, ...]:
    return tuple((served.spec or {}).get("parts") or ())


async def _answer(
    request: Request,
    served: ModelVersion,
    parsed: ParsedRequest,
    outcomes: list[FrameResult],
    media: Media,
    timing: Timing,
) -> Response:
    for outcome in outcomes:
        if not isinstance(outcome, ServeError):
            timing.add(outcome)
    began = time.perf_counter()
    if parsed.many:
        body = encode_list(outcomes, media, request_id_of(request.scope), framed=parsed.framed)
    elif isinstance(outcomes[0], ServeError):
        raise outcomes[0]
    else:
        (frame,) = parsed.frames
        assert isinstance(frame, EncodedFrame)
        body = await encode_one(outcomes[0], frame, media, _load_dim(served))
    timing.encode_s = time.perf_counter() - began
    request.scope["state"]["timing"] = timing
    return Response(body, media_type=media, headers={"server-timing": timing.header()})


class _DirectRoute(APIRoute):
    """A route whose endpoint parses the request itself.

    FastAPI's parameter parsing took a quarter of the gateway's time per request. `parse_request_options` checks the
    query instead, including unknown names; `serve.gateway.openapi` documents it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(request, **request.path_params)
            return response

        return handle


class _LinesResponse(StreamingResponse):
    """NDJSON response; releases its permit even if the client disconnects before the first line."""

    def __init__(self, lines: AsyncGenerator[bytes, None], permit: Permit) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._lines, self._permit = lines, permit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._lines.aclose()
            finally:
                self._permit.release()


async def _lines(
    request: Request, served: ModelVersion, parsed: ParsedRequest, timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield one line per frame as it finishes; a disconnect cancels the frames that are still queued."""
    tasks = {
        asyncio.create_task(run_frame(served, frame, timeout_s)): index
        for index, frame in enumerate(parsed.frames)
    }
    watch = asyncio.ensure_future(request.receive())
    waiting = set(tasks)
    try:
        while waiting:
            await asyncio.wait({*waiting, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                return
            for task in [task for task in tasks if task in waiting and task.done()]:
                waiting.discard(task)
                yield encode_line(tasks[task], task.result(), request_id_of(request.scope))
    finally:
        watch.cancel()
        for task in waiting:
            task.cancel()


def _load_dim(served: ModelVersion) -> int | None:
    load_dim = (served.spec or {}).get("load_dim")
    return None if load_dim is None else int(load_dim)
