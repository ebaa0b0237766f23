"""Framed batches: several frames, or several outcomes, in one body; lengths first, then the bytes unchanged.

The format between gateway and worker: payloads are not encoded, parsed or copied. Layout of both bodies: 8 bytes of
magic, length of the JSON header (uint32, little-endian), the JSON header, the concatenated payloads.

* Frames (``MM3DFRM1``): ``{"frames": [{"length": bytes, "options": {…}[, "parts": [[name, bytes], …]]}, …]}``.
  A frame of one part is its bytes; a frame of several parts (image and calibration, for example) names them.
* Outcomes (``MM3DOUT1``): ``{"outcomes": [{"status": 200, "length": bytes}, …], "seconds": {stage: s}}``; a payload is
  the JSON body with which this frame alone would have been answered.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve.errors import BackendBroken, BadRequest

__all__ = [
    "FRAMES_CONTENT_TYPE",
    "OUTCOMES_CONTENT_TYPE",
    "Body",
    "Bytes",
    "Outcomes",
    "frame_chunks",
    "pack_frames",
    "pack_outcomes",
    "unpack_frames",
    "unpack_outcomes",
]

Bytes = bytes | bytearray | memoryview
# The bytes of a frame, or of each of its named parts.
Body = Bytes | Mapping[str, Bytes]

FRAMES_CONTENT_TYPE = "application/vnd.mmdet3d-serve.frames"
OUTCOMES_CONTENT_TYPE = "application/vnd.mmdet3d-serve.outcomes"
FRAMES_MAGIC = b"MM3DFRM1"
OUTCOMES_MAGIC = b"MM3DOUT1"
_PREFIX_BYTES = 12


def frame_chunks(frames: Sequence[tuple[Body, Mapping[str, Any]]]) -> list[Bytes]:
    """Pack frames with their options into a body of type `FRAMES_CONTENT_TYPE`, as chunks that are not joined."""
    entries: list[dict[str, Any]] = []
    payloads: list[Bytes] = []
    for body, options in frames:
        entry: dict[str, Any] = {"length": 0, "options": dict(options)}
        if isinstance(body, Mapping):
            entry["parts"] = [[name, len(part)] for name, part in body.items()]
            payloads.extend(body.values())
            entry["length"] = sum(len(part) for part in body.values())
        else:
            payloads.append(body)
            entry["length"] = len(body)
        entries.append(entry)
    return [_pack_header(FRAMES_MAGIC, {"frames": entries}), *payloads]


def pack_frames(frames: Sequence[tuple[Body, Mapping[str, Any]]]) -> bytes:
    """Pack frames with their options into one body of type `FRAMES_CONTENT_TYPE`."""
    return b"".join(frame_chunks(frames))


def unpack_frames(body: Bytes) -> list[tuple[memoryview | dict[str, memoryview], dict[str, Any]]]:
    """Unpack what `pack_frames` wrote; the frames (or their parts by name) are views, not copies.

    Raises:
        BadRequest: the header is malformed, or its lengths do not add up to the body.
    """
    view = memoryview(body)
    if len(view) < _PREFIX_BYTES or bytes(view[:8]) != FRAMES_MAGIC:
        raise BadRequest(f"a body of type {FRAMES_CONTENT_TYPE} must start with {FRAMES_MAGIC.decode()}")
    try:
        header, at = _read_header(view)
        found: list[tuple[memoryview | dict[str, memoryview], dict[str, Any]]] = []
        for entry in header["frames"]:
            payload, at = _take_payload(view, at, entry["length"])
            parts = entry.get("parts")
            found.append(
                (payload if parts is None else _split_parts(payload, parts), dict(entry.get("options", {})))
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"malformed header of the framed batch: {error}") from None
    if at != len(view):
        raise BadRequest("the frame lengths in the header do not add up to the length of the body")
    return found


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a batch.

    Attributes:
        items: HTTP status and JSON body of each frame.
        seconds: duration of each stage in the worker.
    """

    items: list[tuple[int, Bytes]]
    seconds: dict[str, float] = field(default_factory=dict)


def pack_outcomes(outcomes: Outcomes) -> bytes:
    """Pack outcomes into one body of type `OUTCOMES_CONTENT_TYPE`."""
    entries = [{"status": status, "length": len(body)} for status, body in outcomes.items]
    head = _pack_header(OUTCOMES_MAGIC, {"outcomes": entries, "seconds": outcomes.seconds})
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
        header, at = _read_header(view)
        items: list[tuple[int, Bytes]] = []
        for entry in header["outcomes"]:
            payload, at = _take_payload(view, at, entry["length"])
            items.append((int(entry["status"]), payload))
        seconds = {str(stage): float(spent) for stage, spent in header.get("seconds", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackendBroken(f"the worker's answer has a malformed header: {error}") from None
    if at != len(view):
        raise BackendBroken("the lengths in the worker's answer do not add up to the length of its body")
    return Outcomes(items, seconds)


def _pack_header(magic: bytes, header: Any) -> bytes:
    encoded = orjson.dumps(header)
    return magic + struct.pack("<I", len(encoded)) + encoded


def _read_header(view: memoryview) -> tuple[Any, int]:
    (length,) = struct.unpack("<I", view[8:_PREFIX_BYTES])
    if _PREFIX_BYTES + length > len(view):
        raise ValueError("the header is longer than the body")
    # The standard library's parser limits the nesting.
    return json.loads(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length])), _PREFIX_BYTES + length


def _take_payload(view: memoryview, at: int, length: Any) -> tuple[memoryview, int]:
    if not isinstance(length, int) or isinstance(length, bool) or length < 0 or at + length > len(view):
        raise ValueError(f"length {length!r} does not fit the body")
    return view[at : at + length], at + length


def _split_parts(payload: memoryview, parts: Any) -> dict[str, memoryview]:
    found: dict[str, memoryview] = {}
    at = 0
    for name, length in parts:
        if not isinstance(name, str) or name in found:
            raise ValueError(f"part name {name!r} is invalid or occurs twice")
        found[name], at = _take_payload(payload, at, length)
    if at != len(payload):
        raise ValueError("the lengths of the parts do not add up to the frame")
    return found
