"""Route ``POST /predictions/{model}[/{version}]``: TorchServe's predictions API for one or several frames."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, nullcontext

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import Overloaded, ServeError
from serve.formats.kitti import Camera
from serve.gateway.canary import Canaries, Chosen
from serve.gateway.compression import compress
from serve.gateway.dispatch import Outcome, run_frames, stream_frames
from serve.gateway.middleware import permit_of, request_id_of
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.request import ParsedRequest, parse_request_options, read_query, receive_frames
from serve.gateway.response import (
    VERSION_HEADER,
    Media,
    Timing,
    check_fields,
    choose_media,
    encode_line,
    encode_list,
    encode_one,
)
from serve.gateway.router import FrameRoute
from serve.gateway.tracks import SessionKey, TrackSessions, parse_track_request
from serve.protocol.option_places import TRACK_OPTIONS
from serve.protocol.worker import EncodedFrame
from serve.storage.references import References

__all__ = ["predict_route"]


def predict_route(
    options: GatewayOptions, canaries: Canaries, references: References, sessions: TrackSessions
) -> FrameRoute:
    """Create the route; `canaries` choose the version, `sessions` are the sequences whose objects are tracked."""

    async def predict(request: Request, model: str, version: str | None) -> Response:
        arrived = time.perf_counter()
        timing = Timing()
        media = choose_media(", ".join(request.headers.getlist("accept")) or None)
        wanted, query = parse_track_request(read_query(request), request.headers)
        request_options = parse_request_options(query, request.headers, options, TRACK_OPTIONS)
        request.scope["state"]["model"] = model
        permit = permit_of(request.scope)
        chosen = await canaries.choose(model, version, permit.client, wanted)
        served = chosen.model
        request.scope["state"]["version"] = served.state.version
        permit.model = model
        key = SessionKey(permit.client, model, served.state.version, wanted.session) if wanted else None
        with sessions.enter(key, wanted) if key and wanted else nullcontext() as track:
            parsed = await receive_frames(
                request, permit, options, request_options.frame, _parts(served), references
            )
            check_fields(parsed.frames, media)
            timing.decode_s = time.perf_counter() - arrived
            request.scope["state"]["frames"] = len(parsed.frames)
            remaining_s = request_options.timeout_s - timing.decode_s
            if track is not None:
                track.check(parsed.frames)
            elif media == "application/x-ndjson":
                return _LinesResponse(
                    _lines(request, chosen, parsed.frames, remaining_s),
                    {VERSION_HEADER: served.state.version},
                )
            outcomes = await run_frames(request, served, parsed.frames, remaining_s, chosen.fallback)
            if track is not None:
                outcomes = await track.follow(outcomes, arrived + request_options.timeout_s)
        body = await _encode(request, served, parsed, outcomes, media, timing, request_options.camera)
        headers: dict[str, str] = {}
        if options.compresses(len(body)) and media != "image/png":  # which is compressed already
            body = await compress(body, ", ".join(request.headers.getlist("accept-encoding")), headers)
        headers["server-timing"] = timing.header()
        headers[VERSION_HEADER] = chosen.versions(len(outcomes))
        return Response(body, media_type=media, headers=headers)

    return predict


def _parts(served: ModelVersion) -> tuple[str, ...]:
    return tuple((served.spec or {}).get("parts") or ())


async def _encode(
    request: Request,
    served: ModelVersion,
    parsed: ParsedRequest,
    outcomes: list[Outcome],
    media: Media,
    timing: Timing,
    camera: Camera | None,
) -> bytes:
    for outcome in outcomes:
        if not isinstance(outcome, ServeError):
            timing.add(outcome)
    began = time.perf_counter()
    if media == "application/x-ndjson":  # of a sequence: in order, and so together
        lines = (encode_line(k, each, request_id_of(request.scope)) for k, each in enumerate(outcomes))
        body = b"".join(lines)
    elif parsed.many:
        body = encode_list(outcomes, media, request_id_of(request.scope), framed=parsed.framed)
    elif isinstance(outcomes[0], ServeError):
        raise outcomes[0]
    else:
        (frame,) = parsed.frames
        assert isinstance(frame, EncodedFrame)
        body = await encode_one(outcomes[0], frame, media, _load_dim(served), camera)
    timing.encode_s = time.perf_counter() - began
    request.scope["state"]["timing"] = timing
    return body


class _LinesResponse(StreamingResponse):
    """NDJSON response; ends its frames even if the client disconnects before the first line."""

    def __init__(self, lines: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(lines, media_type="application/x-ndjson", headers=headers)
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def _lines(
    request: Request, chosen: Chosen, frames: Sequence[EncodedFrame | ServeError], timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield one line per frame as it finishes; the permit counts a line in place of its frame until it is written."""
    permit = permit_of(request.scope)
    request_id = request_id_of(request.scope)
    body_bytes, waiting = permit.bytes, len(frames)

    def encode(index: int, outcome: Outcome) -> tuple[bytes, int]:
        nonlocal waiting
        waiting -= 1
        permit.shrink(items=1, nbytes=0 if waiting else body_bytes)
        line = encode_line(index, outcome, request_id)
        try:
            permit.grow(nbytes=len(line))
        except Overloaded as error:
            return encode_line(index, error, request_id), 0
        return line, len(line)

    lines = stream_frames(request, chosen.model, frames, timeout_s, encode, chosen.fallback)
    del frames  # each is dropped when it has finished
    async with aclosing(lines):
        async for line, counted in lines:
            yield line
            permit.shrink(nbytes=counted)  # written


def _load_dim(served: ModelVersion) -> int | None:
    load_dim = (served.spec or {}).get("load_dim")
    return None if load_dim is None else int(load_dim)
