"""Framed batches: several frames, or several outcomes, in one body; lengths first, then the bytes unchanged.

The format between gateway and worker: payloads are not encoded, parsed or copied. Layout of both bodies: 8 bytes of
magic, length of the JSON header (uint32, little-endian), the JSON header, the concatenated payloads.

* Frames (``MM3DFRM1``): ``{"frames": [{"length": bytes, "options": {…}[, "parts": [[name, bytes], …]]}, …]}``.
  A frame of one part is its bytes; a frame of several parts (image and calibration, for example) names them.
  `unpack_frames` bounds the header's bytes, the frames, the parts and the names before it builds anything from them.
* Outcomes (``MM3DOUT1``): ``{"outcomes": [{"status": 200, "length": bytes}, …], "seconds": {stage: s}}``; a payload is
  the JSON body with which this frame alone would have been answered. ``"observed"`` has counts of the answered frames
  together (`serve.watch`), if the worker counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from serve.errors import BackendBroken, BadRequest, FrameTooLarge, quote
from serve.protocol.json_reader import JsonBounds, read_json

__all__ = [
    "FRAMES_CONTENT_TYPE",
    "OUTCOMES_CONTENT_TYPE",
    "Body",
    "Bytes",
    "Outcomes",
    "RawFrame",
    "body_chunks",
    "frame_chunks",
    "header_bytes",
    "pack_frames",
    "pack_outcomes",
    "unpack_frames",
    "unpack_outcomes",
]

Bytes = bytes | bytearray | memoryview
# The bytes of a frame, or of each of its named parts.
Body = Bytes | Mapping[str, Bytes]


class RawFrame(NamedTuple):
    """One frame as a client named it: its bytes, and its options, which are not parsed yet."""

    body: Body
    options: Mapping[str, Any] = {}


FRAMES_CONTENT_TYPE = "application/vnd.mmdet3d-serve.frames"
OUTCOMES_CONTENT_TYPE = "application/vnd.mmdet3d-serve.outcomes"
FRAMES_MAGIC = b"MM3DFRM1"
OUTCOMES_MAGIC = b"MM3DOUT1"
_PREFIX_BYTES = 12
# Bounds of a header of frames; ten times what a frame of 7 cameras and 20 sweeps needs.
HEADER_BYTES_PER_FRAME = 4096
MAX_PARTS = 128
MAX_NAME_CHARS = 200
# Bounds of a header of outcomes: one line per frame.
_OUTCOMES_HEADER_BYTES = 1 << 20


def frame_chunks(frames: Sequence[tuple[Body, Mapping[str, Any]]]) -> list[Bytes]:
    """Pack frames with their options into a body of type `FRAMES_CONTENT_TYPE`, as chunks that are not joined.

    Raises:
        BadRequest: a name or an option cannot be encoded.
    """
    return join_entries(
        [frame_entry(body, options) for body, options in frames],
        (chunk for body, _ in frames for chunk in body_chunks(body)),
    )


def frame_entry(body: Body, options: Mapping[str, Any], nbytes: int | None = None) -> bytes:
    """Encode the header's entry of one frame.

    Args:
        body: the frame.
        options: its options.
        nbytes: its size if `body` is not all of it.

    Raises:
        BadRequest: a name or an option cannot be encoded.
    """
    entry: dict[str, Any] = {
        "length": body_bytes(body) if nbytes is None else nbytes,
        "options": dict(options),
    }
    if isinstance(body, Mapping):
        entry["parts"] = [[name, len(part)] for name, part in body.items()]
    try:
        return orjson.dumps(entry)
    except TypeError as error:  # lone surrogates; integers over 64 bits
        raise BadRequest(f"the options or names of the frame cannot be encoded: {error}") from None


def join_entries(entries: Sequence[bytes], chunks: Iterable[Bytes]) -> list[Bytes]:
    """Build a body of type `FRAMES_CONTENT_TYPE` from the entries and the bytes of its frames, as chunks."""
    header = b'{"frames":[' + b",".join(entries) + b"]}"
    return [FRAMES_MAGIC + struct.pack("<I", len(header)) + header, *chunks]


def body_chunks(body: Body) -> Iterable[Bytes]:
    """Return the bytes of a frame, part by part."""
    return body.values() if isinstance(body, Mapping) else (body,)


def body_bytes(body: Body) -> int:
    """Return the size of a frame in bytes, all parts together."""
    return sum(map(len, body.values())) if isinstance(body, Mapping) else len(body)


def pack_frames(frames: Sequence[tuple[Body, Mapping[str, Any]]]) -> bytes:
    """Pack frames with their options into one body of type `FRAMES_CONTENT_TYPE`; raises like `frame_chunks`."""
    return b"".join(frame_chunks(frames))


def header_bytes(body: Bytes) -> int:
    """Return the length of the header that a framed batch claims to have."""
    return int.from_bytes(body[8:_PREFIX_BYTES], "little")


def unpack_frames(body: Bytes, max_frames: int = 64) -> list[RawFrame]:
    """Unpack what `pack_frames` wrote; the frames (or their parts by name) are views, not copies.

    Args:
        body: the framed batch.
        max_frames: maximum number of frames; bounds the header to `HEADER_BYTES_PER_FRAME` for each.

    Raises:
        BadRequest: the header is malformed, or its lengths do not add up to the body.
        FrameTooLarge: more frames or parts, or a longer header.
    """
    view = memoryview(body)
    if len(view) < _PREFIX_BYTES or bytes(view[:8]) != FRAMES_MAGIC:
        raise BadRequest(f"a body of type {FRAMES_CONTENT_TYPE} must start with {FRAMES_MAGIC.decode()}")
    try:
        header, at = _read_header(view, max_frames * HEADER_BYTES_PER_FRAME)
        entries = header["frames"]
        if not isinstance(entries, list):
            raise ValueError("frames must be a list")
        if len(entries) > max_frames:
            raise FrameTooLarge(f"the request has {len(entries)} frames, the limit is {max_frames}")
        found: list[RawFrame] = []
        for entry in entries:
            payload, at = _take_payload(view, at, entry["length"])
            parts = entry.get("parts")
            options = entry.get("options", {})
            if not isinstance(options, dict):
                raise ValueError("the options of a frame must be an object")
            found.append(RawFrame(payload if parts is None else _split_parts(payload, parts), options))
    except (BadRequest, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"malformed header of the framed batch: {str(error)[:200]}") from None
    if at != len(view):
        raise BadRequest("the frame lengths in the header do not add up to the length of the body")
    return found


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a batch.

    Attributes:
        items: HTTP status and JSON body of each frame.
        seconds: duration of each stage in the worker.
        observed: counts of the frames that were answered, together; None if the worker does not count.
    """

    items: list[tuple[int, Bytes]]
    seconds: dict[str, float] = field(default_factory=dict)
    observed: Mapping[str, Any] | None = None


def pack_outcomes(outcomes: Outcomes) -> bytes:
    """Pack outcomes into one body of type `OUTCOMES_CONTENT_TYPE`."""
    entries = [{"status": status, "length": len(body)} for status, body in outcomes.items]
    header: dict[str, Any] = {"outcomes": entries, "seconds": outcomes.seconds}
    if outcomes.observed is not None:
        header["observed"] = outcomes.observed
    head = _pack_header(OUTCOMES_MAGIC, header)
    return b"".join([head, *(body for _, body in outcomes.items)])


def unpack_outcomes(body: Bytes) -> Outcomes:
    """Unpack what `pack_outcomes` wrote; the bodies are views, not copies.

    Raises:
        BackendBroken: the header is malformed, or its lengths do not add up to the body.
    """
    view = memoryview(body)
    if len(view) < _PREFIX_BYTES or bytes(view[:8]) != OUTCOMES_MAGIC:
        raise BackendBroken(f"the worker's answer does not start with {OUTCOMES_MAGIC.decode()}")
    try:
        header, at = _read_header(view, _OUTCOMES_HEADER_BYTES)
        items: list[tuple[int, Bytes]] = []
        for entry in header["outcomes"]:
            payload, at = _take_payload(view, at, entry["length"])
            items.append((int(entry["status"]), payload))
        seconds = {str(stage): float(spent) for stage, spent in header.get("seconds", {}).items()}
        observed = header.get("observed")
    except (
        BadRequest,
        FrameTooLarge,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise BackendBroken(f"the worker's answer has a malformed header: {str(error)[:200]}") from None
    if at != len(view):
        raise BackendBroken("the lengths in the worker's answer do not add up to the length of its body")
    return Outcomes(items, seconds, observed if isinstance(observed, dict) else None)


def _pack_header(magic: bytes, header: Any) -> bytes:
    encoded = orjson.dumps(header)
    return magic + struct.pack("<I", len(encoded)) + encoded


def _read_header(view: memoryview, max_bytes: int) -> tuple[Any, int]:
    (length,) = struct.unpack("<I", view[8:_PREFIX_BYTES])
    if _PREFIX_BYTES + length > len(view):
        raise ValueError("the header is longer than the body")
    if length > max_bytes:
        raise FrameTooLarge(f"the header of the framed batch has {length} bytes, the limit is {max_bytes}")
    bounds = JsonBounds(max_bytes=max_bytes)
    return read_json(view[_PREFIX_BYTES : _PREFIX_BYTES + length], bounds), _PREFIX_BYTES + length


def _take_payload(view: memoryview, at: int, length: Any) -> tuple[memoryview, int]:
    if not isinstance(length, int) or isinstance(length, bool) or length < 0 or at + length > len(view):
        raise ValueError(f"length {quote(length)} does not fit the body")
    return view[at : at + length], at + length


def _split_parts(payload: memoryview, parts: Any) -> dict[str, memoryview]:
    if not isinstance(parts, list):
        raise ValueError("the parts of a frame must be a list")
    if len(parts) > MAX_PARTS:
        raise FrameTooLarge(f"the frame has {len(parts)} parts, the limit is {MAX_PARTS}")
    found: dict[str, memoryview] = {}
    at = 0
    for name, length in parts:
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or name in found:
            raise ValueError(f"part name {quote(name)} is invalid or occurs twice")
        found[name], at = _take_payload(payload, at, length)
    if at != len(payload):
        raise ValueError("the lengths of the parts do not add up to the frame")
    return found
