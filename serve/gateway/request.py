"""Request parsing: bytes to frames, from a raw body, multipart, JSON or a framed batch.

Every byte is counted against the request's permit before it is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import orjson
from starlette.requests import Request

from serve.errors import (
    BadRequest,
    ClientDisconnected,
    FrameTooLarge,
    ServeError,
    SlowRequest,
    UndecodableFrame,
    UnknownOption,
    quote,
)
from serve.formats.kitti import Camera, camera_of
from serve.gateway.admission import Permit
from serve.gateway.form import read_form
from serve.gateway.json_frames import read_frames
from serve.gateway.offload import run_beside_loop
from serve.gateway.options import GatewayOptions
from serve.protocol.batch import (
    FRAMES_CONTENT_TYPE,
    MAX_NAME_CHARS,
    MAX_PARTS,
    Bytes,
    RawFrame,
    body_bytes,
    header_bytes,
    unpack_frames,
)
from serve.protocol.option_places import REQUEST_OPTIONS
from serve.protocol.options import FrameOptions, parse_options
from serve.protocol.sweeps import is_sweep_part
from serve.protocol.worker import EncodedFrame
from serve.storage.references import References

__all__ = [
    "ParsedRequest",
    "RequestOptions",
    "check_frames",
    "parse_request_options",
    "read_body",
    "read_query",
    "receive_frames",
]

logger = logging.getLogger(__name__)
OPTION_NAMES = tuple(field.name for field in fields(FrameOptions))
# Pieces of a body below the first are added to the one before, unless that has the second.
_PIECE_BYTES, _LONG_PIECE_BYTES = 64 * 1024, 256 * 1024
_HEADER_OPTIONS = {"x-" + name.replace("_", "-"): name for name in (*OPTION_NAMES, *REQUEST_OPTIONS)}
MAX_QUERY_BYTES = 8192
FRAME_FIELDS = frozenset(("body", "data", "file", "frame", "image", "points"))


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request.

    Attributes:
        frame: options of its frames, unless a frame has its own.
        timeout_s: its deadline, seconds.
        camera: the camera of its frames, for KITTI's labels.
    """

    frame: FrameOptions
    timeout_s: float
    camera: Camera | None = None


@dataclass(frozen=True)
class ParsedRequest:
    """Frames of a request.

    Attributes:
        frames: the frames; in place of an invalid one, its error.
        many: whether the answer is a list.
        framed: whether the request was a framed batch, whose answer has the handler's format.
    """

    frames: Sequence[EncodedFrame | ServeError]
    many: bool
    framed: bool = False


def read_query(request: Request) -> Mapping[str, str]:
    """Return the query.

    Raises:
        BadRequest: it is longer than `MAX_QUERY_BYTES`.
        UnknownOption: a name occurs twice.
    """
    nbytes = len(request.scope["query_string"])
    if nbytes > MAX_QUERY_BYTES:
        raise BadRequest(
            f"the query has {nbytes} bytes, the limit is {MAX_QUERY_BYTES}; send options in the body"
        )
    _check_once(name for name, _ in request.query_params.multi_items())
    return request.query_params


def _check_once(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UnknownOption(
                f"{quote(name)} is given twice; give it once, names with commas between them, as in classes=Car,Van"
            )
        seen.add(name)


def parse_request_options(
    query: Mapping[str, str],
    headers: Mapping[str, str],
    options: GatewayOptions,
    others: Sequence[str] = (),
) -> RequestOptions:
    """Parse and check the options in the query and in ``X-`` headers; the query takes precedence.

    Args:
        query: the query, without the options of `others`.
        headers: the headers.
        options: options of the gateway.
        others: names of options that were read before, which the error of an unknown one lists as well.

    Raises:
        UnknownOption: an unknown name or an invalid value.
    """
    given = {
        name: value if value.isascii() else _as_utf8(value)
        for header, value in reversed(list(headers.items()))  # the first of several counts
        if header.startswith("x-") and (name := _HEADER_OPTIONS.get(header))
    }
    given |= query
    timeout_ms, camera = given.pop("timeout_ms", None), given.pop("camera", None)
    return RequestOptions(
        parse_options(given, others=(*REQUEST_OPTIONS, *others)),
        options.timeout_s if timeout_ms is None else _timeout_s(timeout_ms, options.max_timeout_s),
        None if camera is None else _camera(camera),
    )


def _as_utf8(value: str) -> str:
    """Return what a client wrote into a header as UTF-8, which is read as Latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _camera(text: str) -> Camera:
    try:
        document = orjson.loads(text)
        width, height = document["image_size"]
        if not all(isinstance(n, int) and 0 < n < 1 << 16 for n in (width, height)):
            raise ValueError("image_size")
        return camera_of(document, (width, height))
    except UndecodableFrame as error:
        raise UnknownOption(f"camera: {error}") from None
    except (ValueError, TypeError, KeyError):
        raise UnknownOption(
            'camera must be JSON, {"cam2img": [[…]], "lidar2cam": [[…]], "image_size": [width, height]}, got '
            + quote(text)
        ) from None


def _timeout_s(text: str, max_s: float) -> float:
    try:
        timeout_ms = float(text)
    except ValueError:
        timeout_ms = float("nan")
    if not 1 <= timeout_ms <= max_s * 1000:
        raise UnknownOption(f"timeout_ms must be from 1 to {max_s * 1000:.0f}, got {quote(text)}")
    return timeout_ms / 1000


async def read_body(request: Request, permit: Permit, options: GatewayOptions) -> bytes | bytearray:
    """Read the whole body; a body of several pieces grows in place, because joining it would stop the event loop.

    Raises:
        FrameTooLarge: the body exceeds `max_body_bytes`, already by its Content-Length if it has one.
        Overloaded: the limit of pending bytes would be exceeded.
        SlowRequest: the body did not arrive in time, or stalled.
        ClientDisconnected: the client disconnected before the end of the body.
    """
    body: bytes | bytearray = b""

    def take(piece: bytes) -> None:
        nonlocal body
        if not body:
            body = piece
            return
        if isinstance(body, bytes):
            body = bytearray(body)
        body += piece

    await _receive_body(request, permit, options, take)
    return body


async def _read_pieces(request: Request, permit: Permit, options: GatewayOptions) -> list[bytes | bytearray]:
    """Read the whole body in the pieces in which it arrives, small ones joined; errors as of `read_body`."""
    pieces: list[bytes | bytearray] = []

    def take(piece: bytes) -> None:
        if not pieces or len(piece) >= _PIECE_BYTES or len(pieces[-1]) >= _LONG_PIECE_BYTES:
            pieces.append(piece)
            return
        if isinstance(pieces[-1], bytes):
            pieces[-1] = bytearray(pieces[-1])
        pieces[-1] += piece

    await _receive_body(request, permit, options, take)
    return pieces


async def _receive_body(
    request: Request, permit: Permit, options: GatewayOptions, take: Callable[[bytes], None]
) -> None:
    """Call `take` with each piece of the body, none of which is empty; errors as of `read_body`."""
    declared = request.headers.get("content-length", "")
    announced = int(declared) if declared.isdigit() else 0
    _check_size(announced, options)
    permit.check(nbytes=announced)  # reject with 429 before it is sent; only what arrives is counted
    arrived = 0
    pace = _Pace(options)
    try:
        async with pace.timeout:
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                more = message.get("more_body", False)
                if piece := message.get("body", b""):
                    arrived += len(piece)
                    _check_size(arrived, options)
                    permit.grow(nbytes=len(piece))
                    pace.arrived(arrived)
                    take(piece)
    except TimeoutError:
        raise SlowRequest(
            f"the body did not arrive within {options.body_timeout_s:g} s, or at less than "
            f"{options.client_bytes_per_s} bytes/s for {options.client_stall_timeout_s:g} s"
        ) from None


class _Pace:
    """Deadline of a body, moved on by `client_stall_timeout_s` whenever enough of it has arrived.

    Enough is what `client_bytes_per_s` asks for in that time. The deadline never passes `body_timeout_s`.
    """

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        self._enough = options.client_bytes_per_s * options.client_stall_timeout_s
        self._next = self._enough
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + options.body_timeout_s
        self.timeout = asyncio.timeout_at(self._deadline())

    def _deadline(self) -> float:
        return min(self._end, self._loop.time() + self._options.client_stall_timeout_s)

    def arrived(self, nbytes: int) -> None:
        """Move the deadline on, given the bytes that have arrived in total."""
        if nbytes >= self._next:
            self._next = nbytes + self._enough
            self.timeout.reschedule(self._deadline())


def _check_size(nbytes: int, options: GatewayOptions) -> None:
    if nbytes > options.max_body_bytes:
        raise FrameTooLarge(
            f"the body has at least {nbytes} bytes, the limit is {options.max_body_bytes}; send less, or raise "
            "MMDET3D_SERVE_GATEWAY_MAX_BODY_BYTES"
        )


async def receive_frames(
    request: Request,
    permit: Permit,
    options: GatewayOptions,
    base: FrameOptions,
    parts: Sequence[str],
    references: References,
) -> ParsedRequest:
    """Read and check all frames of a request.

    Args:
        request: the request, its body not yet read.
        permit: grows with the body and the number of frames.
        options: options of the gateway, with the limits.
        base: options of the request, defaults for those of each frame.
        parts: names of the parts of a frame of this model.
        references: reads frames given by URI.

    Raises:
        ClientError: the request as a whole is invalid.
        Overloaded: a limit of pending frames or bytes would be exceeded.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise BadRequest(f"Content-Encoding {quote(coding)} is not supported; send the body uncompressed")
    permit.check(items=1)  # reject with 429 before reading the body
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    max_frames = options.max_frames_per_request
    if kind not in ("multipart/form-data", "application/json", FRAMES_CONTENT_TYPE):
        pieces = await _read_pieces(request, permit, options)
        permit.grow(items=1)
        frame = RawFrame(pieces[0] if pieces else b"")
        return ParsedRequest([_check_frame(frame, base, options, pieces[1:])], many=False)
    body = await read_body(request, permit, options)
    frames: Sequence[RawFrame | ServeError]
    if kind == "multipart/form-data":
        frames, own = await run_beside_loop(
            len(body), _parse_form_frames, len(body), body, content_type, max_frames, parts
        )
        # Shared by all frames, so an invalid one fails the request rather than each frame.
        base, many = parse_options(own, base), len(frames) > 1
    elif kind == "application/json":
        frames, many = await read_frames(body, references, permit, max_frames, options.json_bounds)
    else:
        nbytes = header_bytes(body)
        frames, many = await run_beside_loop(nbytes, unpack_frames, nbytes, body, max_frames), True
    if len(frames) > max_frames:
        raise FrameTooLarge(
            f"the request has {len(frames)} frames, the limit is {options.max_frames_per_request}"
        )
    permit.grow(items=len(frames))
    return ParsedRequest(check_frames(frames, base, options), many, framed=kind == FRAMES_CONTENT_TYPE)


def _parse_form_frames(
    body: bytes | bytearray, content_type: str, max_frames: int, parts: Sequence[str]
) -> tuple[list[RawFrame], Mapping[str, str]]:
    """Read the frames of a form, and the options for all of them."""
    texts, files = read_form(body, content_type, max(MAX_PARTS, max_frames) + len(OPTION_NAMES))
    has_sweeps = any(is_sweep_part(name, value) for name, value in (*texts, *files))
    if len(parts) > 1 or has_sweeps:
        names = [name for name, _ in files]
        if len(set(names)) != len(names):
            raise BadRequest(
                f"a part occurs twice; this model takes one frame of the parts {', '.join(parts)}, each once"
            )
        inline = {
            name: value.encode() for name, value in texts if name in parts or is_sweep_part(name, value)
        }
        _check_once(name for name, _ in texts)
        own = {name: value for name, value in texts if name not in inline}
        return [RawFrame({**inline, **dict(files)})], own
    _check_once(name for name, _ in texts)
    own = dict(texts)
    if "b64" in own:
        raise BadRequest(
            "field 'b64' is not allowed in a form; send the bytes as a file part, or base64 in a JSON body"
        )
    unknown = [name for name, _ in files if name not in FRAME_FIELDS]
    if unknown:
        raise BadRequest(
            f"unknown file part {quote(unknown[0])}; name a frame one of {', '.join(sorted(FRAME_FIELDS))}"
        )
    if not files:
        raise BadRequest("no frame in the form; send each frame as a file part (curl -F data=@frame.bin)")
    return [RawFrame(file) for _, file in files], own


def check_frames(
    frames: Sequence[RawFrame | ServeError], base: FrameOptions, options: GatewayOptions
) -> list[EncodedFrame | ServeError]:
    """Check the size of each frame and parse its options; in place of an invalid one stands its error.

    Args:
        frames: the frames.
        base: options of the request, for those that a frame lacks.
        options: options of the gateway, with the limits.
    """
    return [_check_frame(frame, base, options) for frame in frames]


def _check_frame(
    frame: RawFrame | ServeError, base: FrameOptions, options: GatewayOptions, rest: Sequence[Bytes] = ()
) -> EncodedFrame | ServeError:
    if isinstance(frame, ServeError):
        return frame
    nbytes = body_bytes(frame.body) + sum(map(len, rest))
    if nbytes > options.max_frame_bytes:
        return FrameTooLarge(
            f"the frame has {nbytes} bytes, the limit is {options.max_frame_bytes}; send a smaller one, or raise "
            "MMDET3D_SERVE_MAX_FRAME_BYTES"
        )
    if isinstance(frame.body, Mapping):
        if len(frame.body) > MAX_PARTS:
            return FrameTooLarge(f"the frame has {len(frame.body)} parts, the limit is {MAX_PARTS}")
        if long := next((name for name in frame.body if len(name) > MAX_NAME_CHARS), None):
            return BadRequest(f"the name of a part has {len(long)} characters, the limit is {MAX_NAME_CHARS}")
    try:
        return EncodedFrame(frame.body, parse_options(frame.options, base), rest)
    except ServeError as error:
        return error
    except Exception as error:  # what no check has foreseen concerns this frame alone
        logger.exception("a frame cannot be read")
        return BadRequest(f"the frame cannot be read: {type(error).__name__}")
