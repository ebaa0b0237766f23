"""Response encoding: JSON, MessagePack, a PNG image, KITTI, COCO, CSV, a list, or lines as frames finish.

The worker's JSON is passed through unchanged if JSON is accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import orjson
import ormsgpack

from serve.errors import (
    BackendBroken,
    BadRequest,
    NotAcceptable,
    ServeError,
    UnknownOption,
    error_body,
    quote,
)
from serve.formats.kitti import Camera
from serve.gateway.backend import Answer
from serve.gateway.batcher import BatchResult
from serve.gateway.dispatch import Outcome
from serve.gateway.formats import COCO, KITTI, TABLE, FormatMedia, find_camera, format_answers
from serve.gateway.offload import run_beside_loop
from serve.protocol.worker import EncodedFrame

__all__ = [
    "VERSION_HEADER",
    "Media",
    "Timing",
    "check_fields",
    "choose_media",
    "encode_error",
    "encode_line",
    "encode_list",
    "encode_one",
    "read_document",
]

#: Header of a response: the version that answered; two of them if a canary answered some of the frames only.
VERSION_HEADER = "x-model-version"
_MAX_ACCEPT_CHARS = 4096
DocumentMedia = Literal["application/json", "application/x-msgpack", "application/x-ndjson"]
Media = DocumentMedia | Literal["image/png"] | FormatMedia

_DOCUMENTS: tuple[DocumentMedia, ...] = ("application/json", "application/x-msgpack", "application/x-ndjson")
# In the order of preference, for a range such as text/*.
_MEDIA: tuple[Media, ...] = (*_DOCUMENTS, "image/png", TABLE, KITTI, COCO)
_ALIASES: Mapping[str, Media] = {
    "application/msgpack": "application/x-msgpack",
    "application/vnd.msgpack": "application/x-msgpack",
}


@dataclass
class Timing:
    """Durations of the stages of a request, seconds."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    backend_s: float = 0.0
    encode_s: float = 0.0

    def add(self, result: BatchResult[Answer]) -> None:
        """Add one frame; the slowest of several counts."""
        spent = result.value.seconds
        self.queue_s = max(self.queue_s, result.queue_s)
        self.backend_s = max(self.backend_s, result.run_s)
        self.inference_s = max(self.inference_s, spent.get("inference", 0.0))

    def header(self) -> str:
        """Format the value of the ``Server-Timing`` header, in milliseconds."""
        spent = {
            "decode": self.decode_s,
            "queue": self.queue_s,
            "inference": self.inference_s,
            "backend": self.backend_s,
            "encode": self.encode_s,
        }
        return ", ".join(f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in spent.items())


@lru_cache(maxsize=32)
def choose_media(accept: str | None) -> Media:
    """Choose the supported media type with the highest quality value of an Accept header; JSON without one.

    Raises:
        BadRequest: the header is too long.
        NotAcceptable: none of the accepted media types is supported.
    """
    if accept is not None and len(accept) > _MAX_ACCEPT_CHARS:
        raise BadRequest(f"the Accept header has {len(accept)} characters, the limit is {_MAX_ACCEPT_CHARS}")
    ranges: dict[str, tuple[float, int]] = {}
    for position, item in enumerate((accept or "*/*").split(",")):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        ranges.setdefault(_ALIASES.get(name, name), (weight, position))
    offers: list[tuple[float, int, int, Media]] = []
    for place, media in enumerate(_MEDIA):
        # Of the ranges that match, the most specific one counts (RFC 9110, 12.5.1).
        names = (media, f"{media.partition('/')[0]}/*", "*/*")
        matching = [ranges[each] for each in names if each in ranges]
        weight = matching[0][0] if matching else 0.0
        if weight > 0:
            # JSON of "*/*, application/json" comes no later than what the range alone has.
            position = min(position for other, position in matching if other == weight)
            offers.append((-weight, position, place, media))
    if not offers:
        raise NotAcceptable(f"cannot satisfy Accept: {quote(accept or '')}; supported: {', '.join(_MEDIA)}")
    return min(offers)[3]


def check_fields(frames: Sequence[EncodedFrame | ServeError], media: Media) -> None:
    """Check that no frame leaves out fields that a picture or a format is made of.

    Raises:
        UnknownOption: a frame has the option `fields`.
    """
    if media not in _DOCUMENTS and any(
        isinstance(frame, EncodedFrame) and frame.options.fields is not None for frame in frames
    ):
        raise UnknownOption(f"fields is for JSON and MessagePack; {media} has its own, leave fields out")


async def encode_one(
    outcome: BatchResult[Answer],
    frame: EncodedFrame,
    media: Media,
    load_dim: int | None,
    camera: Camera | None = None,
) -> bytes:
    """Encode the answer to one frame.

    Args:
        outcome: the answer.
        frame: its frame.
        media: what to encode it as.
        load_dim: numbers per point, to draw a point cloud.
        camera: that the request names, for KITTI's labels.

    Raises:
        BadRequest: the answer cannot be drawn, or the format cannot hold it.
    """
    body = bytes(outcome.value.body)
    if media == "application/json":
        return body
    if media == "application/x-msgpack":
        return ormsgpack.packb(read_document(body))
    if media == "application/x-ndjson":
        return encode_line(0, outcome, None)
    if media == "image/png":
        return await asyncio.to_thread(_draw_image, frame, read_document(body), load_dim)
    return await run_beside_loop(len(body), _format_one, len(body), frame, body, media, camera)


def _format_one(frame: EncodedFrame, body: bytes, media: FormatMedia, camera: Camera | None) -> bytes:
    answer = read_document(body)
    if media == KITTI:
        camera = find_camera(frame.join(), answer, camera)
    return format_answers([answer], media, camera)


def _draw_image(frame: EncodedFrame, answer: dict[str, Any], load_dim: int | None) -> bytes:
    from serve.visualize.detections import draw_frame, encode_png

    body = frame.join()
    if isinstance(body, Mapping):
        body = next((part for name, part in body.items() if name in ("points", "image")), b"")
    try:
        options = frame.options
        drawn = draw_frame(
            bytes(body), answer, load_dim=options.load_dim or load_dim or 4, columns=options.columns
        )
        return encode_png(drawn)
    except ValueError as error:
        raise BadRequest(f"cannot draw this answer ({error}); accept application/json") from None


def encode_list(outcomes: list[Outcome], media: Media, request_id: str, *, framed: bool = False) -> bytes:
    """Encode several results as an array of answers and ``{"error": …}``; in the handler's format if `framed`.

    Raises:
        BadRequest: a list cannot be drawn as an image, nor be one label file.
        ServeError: of formats without a place for errors, that of the first frame that failed.
    """
    if media == "image/png":
        raise BadRequest(
            "cannot draw several frames as one image; send one frame, or accept application/json"
        )
    if media in (KITTI, COCO, TABLE):
        return format_answers([_answer_of(i, outcome) for i, outcome in enumerate(outcomes)], media)
    if media == "application/x-msgpack":
        documents = [_document_or_error(outcome, request_id, framed) for outcome in outcomes]
        return ormsgpack.packb({"outcomes": documents} if framed else documents)
    joined = b"[" + b",".join(_encode_item(outcome, request_id, framed) for outcome in outcomes) + b"]"
    return b'{"outcomes":' + joined + b"}" if framed else joined


def _answer_of(index: int, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, ServeError):
        raise type(outcome)(f"frame {index}: {outcome}")
    return read_document(bytes(outcome.value.body))


def _encode_item(outcome: Outcome, request_id: str, framed: bool) -> bytes:
    if isinstance(outcome, ServeError):
        body = encode_error(outcome, request_id)
        return b'{"status":%d,%s' % (outcome.status, body[1:]) if framed else body
    body = bytes(outcome.value.body)
    return b'{"status":200,"answer":' + body + b"}" if framed else body


def _document_or_error(outcome: Outcome, request_id: str, framed: bool) -> dict[str, Any]:
    """Parse one item of a list; an answer that is not JSON becomes the error of its frame."""
    try:
        return read_document(_encode_item(outcome, request_id, framed))
    except BackendBroken as error:
        return read_document(_encode_item(error, request_id, framed))


def encode_line(index: int, outcome: Outcome, request_id: str | None) -> bytes:
    """Encode one line of NDJSON: ``{"index", "status", "answer" or "error"}``."""
    if isinstance(outcome, ServeError):
        return b'{"index":%d,"status":%d,%s\n' % (
            index,
            outcome.status,
            encode_error(outcome, request_id)[1:],
        )
    return b'{"index":%d,"status":200,"answer":' % index + bytes(outcome.value.body) + b"}\n"


def encode_error(error: ServeError, request_id: str | None) -> bytes:
    """Encode the JSON body of an error."""
    return orjson.dumps(error_body(error, request_id))


def read_document(body: bytes) -> dict[str, Any]:
    """Parse the answer of a worker.

    Raises:
        BackendBroken: it is not JSON.
    """
    try:
        document: dict[str, Any] = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendBroken(f"the worker's answer is not JSON: {error}") from None
    return document
