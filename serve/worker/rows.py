"""TorchServe rows to frames, outcomes to bodies.

A row is what TorchServe 0.12 hands a handler for one request: a dictionary of body, form fields and
parts. FrameOptions travel as headers (``X-Score-Thr: 0.3``), form fields or JSON members: TorchServe drops
the query string of ``/predictions``. Knows nothing about models; decoding is `serve.protocol.frames`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from serve.errors import BadRequest, ClientError, ServeError, error_body
from serve.protocol.batch import (
    FRAMES_CONTENT_TYPE,
    OUTCOMES_CONTENT_TYPE,
    Body,
    Bytes,
    Outcomes,
    pack_outcomes,
    unpack_frames,
)
from serve.protocol.frames import FrameOptions, decode_json_request, encode_json, is_part, parse_options

if TYPE_CHECKING:  # rows are read where there is no network too
    from serve.runtime import Outcome

__all__ = ["Entry", "Form", "Row", "answer_row", "read_batch", "read_row"]

OPTION_NAMES = tuple(field.name for field in fields(FrameOptions))
FRAME_FIELDS = ("body", "data", "file", "frame", "image", "points")
# Names TorchServe itself puts into a row on its older addresses.
IGNORED_FIELDS = ("model_name", "model", "model_version", "explain")

Entry = tuple[Body, FrameOptions] | ClientError
# How a row is answered: as one frame, as a list of outcomes in JSON, or as framed outcomes (the gateway's way).
Form = Literal["frame", "list", "outcomes"]


@dataclass(frozen=True)
class Row:
    """One request: its frames with their options (or what is wrong with them), and how to answer it."""

    entries: tuple[Entry, ...]
    form: Form


def read_row(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Row:
    """Find the frames of a request.

    Raises:
        ClientError: the request as a whole cannot be read.
    """
    plain = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    if plain.get("content-encoding", "identity") != "identity":
        raise BadRequest(
            f"Content-Encoding {plain['content-encoding']} is not undone here; send the body as it is"
        )
    from_headers = {
        name: plain[key] for name in OPTION_NAMES if (key := "x-" + name.replace("_", "-")) in plain
    }
    text_fields = {
        name: _text(name, value)
        for name, value in row.items()
        if name not in (*FRAME_FIELDS, *IGNORED_FIELDS, "b64") and not is_part(name)
    }
    options = parse_options({**from_headers, **text_fields})
    content_type = plain.get("content-type", "").partition(";")[0].strip().lower()
    if content_type.startswith("multipart/") and "body" in row:
        raise BadRequest("multipart without a boundary cannot be read")
    body, part_type = _frame_of(row, headers, content_type)
    if isinstance(body, Mapping):
        return Row(((body, options),), "frame")
    if part_type == FRAMES_CONTENT_TYPE:
        return Row(
            read_batch(body, options), "outcomes" if plain.get("accept") == OUTCOMES_CONTENT_TYPE else "list"
        )
    if part_type == "application/json":
        frame, given = decode_json_request(body)
        return Row((_entry(frame, given, options),), "frame")
    return Row(((body, options),), "frame")


def read_batch(body: Bytes, base: FrameOptions | None = None) -> tuple[Entry, ...]:
    """The frames of a framed batch, each with its options on top of `base`, or what is wrong with it.

    Raises:
        BadRequest: it is not a framed batch.
    """
    options = base or FrameOptions()
    return tuple(_entry(frame, given, options) for frame, given in unpack_frames(body))


def _frame_of(row: Mapping[str, Any], headers: Mapping[str, Any], content_type: str) -> tuple[Body, str]:
    parts = {name: value for name, value in row.items() if is_part(name)}
    if parts and (len(parts) > 1 or not parts.keys() <= set(FRAME_FIELDS)):
        other = [name for name in FRAME_FIELDS if name in row and name not in parts]
        if other:
            raise BadRequest(
                f"parts of one frame beside another ({', '.join([*parts, *other])}); send one frame"
            )
        return {name: _part(name, value) for name, value in parts.items()}, "multipart/form-data"
    found = [name for name in FRAME_FIELDS if name in row]
    if "b64" in row:
        return encode_json({"b64": _text("b64", row["b64"])}), "application/json"
    if not found:
        raise BadRequest(
            f"no frame in the request; send it as the body, or as a part named {' or '.join(FRAME_FIELDS)}"
        )
    if len(found) > 1:
        raise BadRequest(f"several frames in one request ({', '.join(found)}); send one, or a framed batch")
    value = row[found[0]]
    if isinstance(value, str):
        return encode_json({"b64": value}), "application/json"
    if not isinstance(value, bytes | bytearray | memoryview):
        # TorchServe parses JSON itself where it is not told otherwise.
        return encode_json(value), "application/json"
    part = headers.get(found[0])
    part_type = part.get("content-type", "") if isinstance(part, Mapping) else ""
    return value, (part_type or content_type).partition(";")[0].strip().lower()


def _part(name: str, value: Any) -> Bytes:
    """The bytes of a named part; TorchServe has read JSON and text already where the part says that it is."""
    if isinstance(value, bytes | bytearray | memoryview):
        return value
    if isinstance(value, str) and name in ("calibration", "text"):
        return value.encode()
    parts, _ = decode_json_request(encode_json({name: {"b64": value} if isinstance(value, str) else value}))
    return parts[name] if isinstance(parts, Mapping) else parts


def _entry(body: Body, given: Mapping[str, Any], base: FrameOptions) -> Entry:
    try:
        return body, parse_options(given, base)
    except ClientError as error:
        return error


def _text(name: str, value: Any) -> str:
    try:
        return bytes(value).decode() if isinstance(value, bytes | bytearray | memoryview) else str(value)
    except UnicodeDecodeError:
        raise BadRequest(
            f"field '{name}' is not text; a frame goes into a field named {' or '.join(FRAME_FIELDS)}"
        ) from None


def answer_row(
    form: Form, outcomes: Sequence[Outcome], request_id: str | None, seconds: Mapping[str, float]
) -> tuple[int, str, bytes]:
    """Status, content type and body of one request; `seconds` are what its stages took."""
    if form == "outcomes":
        items = [_answer_frame(outcome, None) for outcome in outcomes]
        return 200, OUTCOMES_CONTENT_TYPE, pack_outcomes(Outcomes([*items], dict(seconds)))
    if form == "list":
        entries = [
            {"status": outcome.status, **error_body(outcome)}
            if isinstance(outcome, ServeError)
            else {"status": 200, "answer": outcome}
            for outcome in outcomes
        ]
        return 200, "application/json", encode_json({"outcomes": entries})
    (outcome,) = outcomes
    status, body = _answer_frame(outcome, request_id)
    return status, "application/json", body


def _answer_frame(outcome: Outcome, request_id: str | None) -> tuple[int, bytes]:
    if isinstance(outcome, ServeError):
        return outcome.status, encode_json(error_body(outcome, request_id))
    return 200, encode_json(outcome)
