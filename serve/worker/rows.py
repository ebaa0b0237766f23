"""TorchServe's rows to frames, outcomes to response bodies.

A row is what TorchServe 0.12 passes to a handler for one request: a dictionary of body, form fields and parts. Options
come as headers (``X-Score-Thr: 0.3``), form fields or JSON members, because TorchServe drops the query string of
``/predictions``.
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
from serve.protocol.worker import MAX_BATCH_FRAMES

if TYPE_CHECKING:  # rows are parsed without torch too
    from serve.runtime import Outcome

__all__ = ["Entry", "Form", "Row", "answer_row", "read_batch", "read_row"]

OPTION_NAMES = tuple(field.name for field in fields(FrameOptions))
FRAME_FIELDS = ("body", "data", "file", "frame", "image", "points")
# Names that TorchServe adds to a row on its older routes.
IGNORED_FIELDS = ("model_name", "model", "model_version", "explain")

Entry = tuple[Body, FrameOptions] | ClientError
# Form of the answer: one frame, a JSON list of outcomes, or framed outcomes (for the gateway).
Form = Literal["frame", "list", "outcomes"]


@dataclass(frozen=True)
class Row:
    """One request: its frames with their options, or their errors, and the form of its answer."""

    entries: tuple[Entry, ...]
    form: Form


def read_row(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Row:
    """Parse the frames and options of a request.

    Raises:
        ClientError: the request as a whole is invalid.
    """
    plain = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    if plain.get("content-encoding", "identity") != "identity":
        raise BadRequest(
            f"Content-Encoding {plain['content-encoding']!r} is not supported; send the body uncompressed"
        )
    from_headers = {
        name: plain[key] for name in OPTION_NAMES if (key := "x-" + name.replace("_", "-")) in plain
    }
    text_fields = {
        name: _decode_text(name, value)
        for name, value in row.items()
        if name not in (*FRAME_FIELDS, *IGNORED_FIELDS, "b64") and not is_part(name, value)
    }
    options = parse_options({**from_headers, **text_fields})
    content_type = plain.get("content-type", "").partition(";")[0].strip().lower()
    if content_type.startswith("multipart/") and "body" in row:
        raise BadRequest("cannot parse a multipart body without a boundary")
    body, part_type = _find_frame(row, headers, content_type)
    if isinstance(body, Mapping):
        return Row(((body, options),), "frame")
    if part_type == FRAMES_CONTENT_TYPE:
        return Row(
            read_batch(body, options), "outcomes" if plain.get("accept") == OUTCOMES_CONTENT_TYPE else "list"
        )
    if part_type == "application/json":
        frame, given = decode_json_request(body)
        return Row((_parse_entry(frame, given, options),), "frame")
    return Row(((body, options),), "frame")


def read_batch(body: Bytes, base: FrameOptions | None = None) -> tuple[Entry, ...]:
    """Parse a framed batch; returns for each frame its body and options, or its error.

    Args:
        body: the framed batch.
        base: default options.

    Raises:
        BadRequest: the body is not a framed batch.
    """
    options = base or FrameOptions()
    return tuple(
        _parse_entry(frame, given, options) for frame, given in unpack_frames(body, MAX_BATCH_FRAMES)
    )


def _find_frame(row: Mapping[str, Any], headers: Mapping[str, Any], content_type: str) -> tuple[Body, str]:
    parts = {name: value for name, value in row.items() if is_part(name, value)}
    if parts and (len(parts) > 1 or not parts.keys() <= set(FRAME_FIELDS)):
        other = [name for name in FRAME_FIELDS if name in row and name not in parts]
        if other:
            raise BadRequest(
                f"the request has parts of one frame and another frame ({', '.join([*parts, *other])}); send one"
            )
        return {name: _read_part(name, value) for name, value in parts.items()}, "multipart/form-data"
    found = [name for name in FRAME_FIELDS if name in row]
    if "b64" in row:
        return encode_json({"b64": _decode_text("b64", row["b64"])}), "application/json"
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
        # TorchServe parses JSON itself, depending on the content type.
        return encode_json(value), "application/json"
    part = headers.get(found[0])
    part_type = part.get("content-type", "") if isinstance(part, Mapping) else ""
    return value, (part_type or content_type).partition(";")[0].strip().lower()


def _read_part(name: str, value: Any) -> Bytes:
    """Return the bytes of a part; TorchServe has already parsed one whose content type is JSON or text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return value
    if isinstance(value, str) and name in ("calibration", "sweeps", "text"):
        return value.encode()
    parts, _ = decode_json_request(encode_json({name: {"b64": value} if isinstance(value, str) else value}))
    return parts[name] if isinstance(parts, Mapping) else parts


def _parse_entry(body: Body, given: Mapping[str, Any], base: FrameOptions) -> Entry:
    try:
        return body, parse_options(given, base)
    except ClientError as error:
        return error


def _decode_text(name: str, value: Any) -> str:
    try:
        return bytes(value).decode() if isinstance(value, bytes | bytearray | memoryview) else str(value)
    except UnicodeDecodeError:
        raise BadRequest(
            f"field '{name}' is not text; name the field of a frame {' or '.join(FRAME_FIELDS)}"
        ) from None


def answer_row(
    form: Form, outcomes: Sequence[Outcome], request_id: str | None, seconds: Mapping[str, float]
) -> tuple[int, str, bytes]:
    """Encode the answer to one request.

    Args:
        form: form of the answer.
        outcomes: outcomes of its frames.
        request_id: id for error bodies; None to leave it out.
        seconds: duration of each stage.

    Returns:
        HTTP status, content type and body.
    """
    if form == "outcomes":
        items = [_encode_outcome(outcome, None) for outcome in outcomes]
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
    status, body = _encode_outcome(outcome, request_id)
    return status, "application/json", body


def _encode_outcome(outcome: Outcome, request_id: str | None) -> tuple[int, bytes]:
    if isinstance(outcome, ServeError):
        return outcome.status, encode_json(error_body(outcome, request_id))
    return 200, encode_json(outcome)
