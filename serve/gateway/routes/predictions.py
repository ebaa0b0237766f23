"""``POST /predictions/{model}[/{version}]``: TorchServe's own call, one frame or many.

Route, decode, admit, submit, encode; each step is another module's. Knows nothing about workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from serve.errors import DeadlineExceeded, ServeError
from serve.gateway import openapi as api_text
from serve.gateway.admission import Admission, Permit
from serve.gateway.backend import Frame
from serve.gateway.cost import measure
from serve.gateway.middleware import ClientGone, request_id_of
from serve.gateway.models import ModelTable, ServedModel
from serve.gateway.options import GatewayOptions
from serve.gateway.request import Received, receive_frames, request_options
from serve.gateway.response import (
    Media,
    Outcome,
    Timing,
    chosen_media,
    encode_line,
    encode_list,
    encode_one,
)
from serve.storage.references import References

__all__ = ["outcomes_of", "router", "unless_hung_up"]

T = TypeVar("T")


def router(
    options: GatewayOptions, table: ModelTable, admission: Admission, references: References
) -> APIRouter:
    """The routes of TorchServe's inference API."""
    routes = APIRouter(tags=["predictions"], route_class=_DirectRoute)

    async def predict(request: Request, model: str, version: str | None) -> Response:
        arrived = time.perf_counter()
        timing = Timing()
        media = chosen_media(request.headers.get("accept"))
        wanted = request_options(request.query_params, request.headers, options)
        request.scope["state"]["model"] = model
        with admission.permit() as permit:
            served = await table.find(model, version)
            received = await receive_frames(
                request, permit, options, wanted.frame, _parts(served), references
            )
            timing.decode_s = time.perf_counter() - arrived
            request.scope["state"]["frames"] = len(received.frames)
            left_s = wanted.timeout_s - timing.decode_s
            if media == "application/x-ndjson":
                # The permit goes with the stream, which outlives this function.
                lines = _lines(request, served, received, left_s)
                return _Lines(lines, permit.move())
            outcomes = await unless_hung_up(request, outcomes_of(served, received.frames, left_s))
            return await _answer(request, served, received, outcomes, media, timing)

    text = api_text.predictions(options)

    @routes.post("/predictions/{model}", **text, operation_id="predict")
    async def predict_default(
        request: Request,
        model: Annotated[str, Path(description="Name of the model", max_length=128)],
        score_thr: Annotated[float | None, Query(ge=0, le=1, description=api_text.SCORE_THR)] = None,
        max_detections: Annotated[
            int | None, Query(ge=0, le=2**31, description=api_text.MAX_DETECTIONS)
        ] = None,
        timeout_ms: Annotated[float | None, Query(ge=1, description=api_text.TIMEOUT_MS)] = None,
    ) -> Response:
        """Detections of one frame, or of several."""
        return await predict(request, model, None)

    @routes.post("/predictions/{model}/{version}", **text, operation_id="predict_version")
    async def predict_version(
        request: Request,
        model: Annotated[str, Path(description="Name of the model", max_length=128)],
        version: Annotated[str, Path(description="Version of the model", max_length=64)],
        score_thr: Annotated[float | None, Query(ge=0, le=1, description=api_text.SCORE_THR)] = None,
        max_detections: Annotated[
            int | None, Query(ge=0, le=2**31, description=api_text.MAX_DETECTIONS)
        ] = None,
        timeout_ms: Annotated[float | None, Query(ge=1, description=api_text.TIMEOUT_MS)] = None,
    ) -> Response:
        """The same, of one version of the model."""
        return await predict(request, model, version)

    # curl -T sends PUT; it is TorchServe's call as well.
    routes.add_api_route("/predictions/{model}", predict_default, methods=["PUT"], include_in_schema=False)
    routes.add_api_route(
        "/predictions/{model}/{version}", predict_version, methods=["PUT"], include_in_schema=False
    )
    return routes


def _parts(served: ServedModel) -> Sequence[str]:
    return tuple((served.spec or {}).get("parts") or ())


async def outcomes_of(
    served: ServedModel, frames: Sequence[Frame | ServeError], timeout_s: float
) -> list[Outcome]:
    """One outcome per frame, in order; none is raised. What is not there after `timeout_s` is expired."""
    if len(frames) == 1:
        return [await _outcome(served, frames[0], timeout_s)]  # needs no task of its own
    return list(await asyncio.gather(*(_outcome(served, frame, timeout_s) for frame in frames)))


async def _outcome(served: ServedModel, frame: Frame | ServeError, timeout_s: float) -> Outcome:
    if isinstance(frame, ServeError):
        return frame
    try:
        size = measure(frame.body, served.spec or {})
        async with asyncio.timeout(timeout_s):
            return await served.submit(frame, size)
    except TimeoutError:
        return DeadlineExceeded(
            "the deadline passed before the frame was answered; raise timeout_ms or send less"
        )
    except ServeError as error:
        return error


async def unless_hung_up(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, but cancel it when the client hangs up: uvicorn does not do so by itself.

    Only after the whole body was read, when all that can still arrive is the end of the connection.

    Raises:
        ClientGone: the client hung up.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.ensure_future(request.receive())
    gone = False

    def hang_up(_: object) -> None:
        nonlocal gone
        gone = True
        task.cancel()

    cancelled_before = task.cancelling()
    watch.add_done_callback(hang_up)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() <= cancelled_before:
            raise ClientGone from None
        raise  # somebody else's
    finally:
        watch.remove_done_callback(hang_up)
        watch.cancel()


async def _answer(
    request: Request,
    served: ServedModel,
    received: Received,
    outcomes: list[Outcome],
    media: Media,
    timing: Timing,
) -> Response:
    for outcome in outcomes:
        if not isinstance(outcome, ServeError):
            timing.add(outcome)
    began = time.perf_counter()
    if received.many:
        body = encode_list(outcomes, media, request_id_of(request.scope), framed=received.framed)
    elif isinstance(outcomes[0], ServeError):
        raise outcomes[0]
    else:
        (frame,) = received.frames
        assert isinstance(frame, Frame)
        body = await encode_one(outcomes[0], frame, media, _load_dim(served))
    timing.encode_s = time.perf_counter() - began
    request.scope["state"]["timing"] = timing
    return Response(body, media_type=media, headers={"server-timing": timing.header()})


class _DirectRoute(APIRoute):
    """A route whose endpoint reads the request itself.

    FastAPI's own reading of the parameters took a quarter of the gateway's time for a request, and
    `request_options` checks all of them, unknown ones too; what stays of the parameters is their documentation.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(request, **request.path_params)
            return response

        return handle


class _Lines(StreamingResponse):
    """Lines of NDJSON; what they hold is given back even if the client goes before the first of them is asked for."""

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
                self._permit.give_back()


async def _lines(
    request: Request, served: ServedModel, received: Received, timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """A line per frame as each finishes; ends early, and takes what waits out of the queue, when the client goes."""
    tasks = {
        asyncio.create_task(_outcome(served, frame, timeout_s)): index
        for index, frame in enumerate(received.frames)
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


def _load_dim(served: ServedModel) -> int | None:
    load_dim = (served.spec or {}).get("load_dim")
    return None if load_dim is None else int(load_dim)
