"""TorchServe's rows to frames, outcomes to response bodies.

A row is what TorchServe 0.12 passes to a handler for one request: a dictionary of body, form fields and parts. Options
come as headers (``X-Score-Thr: 0.3``), form fields or JSON members, because TorchServe drops the query string of
``/predictions``. Batches that come through the worker's socket do not pass here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import orjson

from serve.errors import BadRequest, ClientError, ServeError
from serve.protocol.batch import FRAMES_CONTENT_TYPE, OUTCOMES_CONTENT_TYPE, Body, Bytes, unpack_frames
from serve.protocol.frame_spec import is_part
from serve.protocol.json_bodies import decode_json_request, encode_json
from serve.protocol.options import FrameOptions, parse_options
from serve.protocol.worker import MAX_BATCH_FRAMES, EncodedFrame, Outcome, encode_outcome, write_outcomes

__all__ = ["Form", "Row", "answer_row", "read_row"]

OPTION_NAMES = tuple(field.name for field in fields(FrameOptions))
FRAME_FIELDS = ("body", "data", "file", "frame", "image", "points")
# Names that TorchServe adds to a row on its older routes.
IGNORED_FIELDS = ("model_name", "model", "model_version", "explain")

# Form of the answer: one frame, a JSON list of outcomes, or framed outcomes (for the gateway).
Form = Literal["frame", "list", "outcomes"]


@dataclass(frozen=True)
class Row:
    """One request: its frames, or their errors, and the form of its answer."""

    frames: tuple[EncodedFrame | ServeError, ...]
    form: Form = "frame"


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
        return Row((EncodedFrame(body, options),))
    if part_type == FRAMES_CONTENT_TYPE:
        frames = tuple(_parse_frame(*each, options) for each in unpack_frames(body, MAX_BATCH_FRAMES))
        return Row(frames, "outcomes" if plain.get("accept") == OUTCOMES_CONTENT_TYPE else "list")
    if part_type == "application/json":
        return Row((_parse_frame(*decode_json_request(body), options),))
    return Row((EncodedFrame(body, options),))


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
        return _encode_parsed({"b64": _decode_text("b64", row["b64"])}), "application/json"
    if not found:
        raise BadRequest(
            f"no frame in the request; send it as the body, or as a part named {' or '.join(FRAME_FIELDS)}"
        )
    if len(found) > 1:
        raise BadRequest(f"several frames in one request ({', '.join(found)}); send one, or a framed batch")
    value = row[found[0]]
    if isinstance(value, str):
        return _encode_parsed({"b64": value}), "application/json"
    if not isinstance(value, bytes | bytearray | memoryview):
        # TorchServe parses JSON itself, depending on the content type.
        return _encode_parsed(value), "application/json"
    part = headers.get(found[0])
    part_type = part.get("content-type", "") if isinstance(part, Mapping) else ""
    return value, (part_type or content_type).partition(";")[0].strip().lower()


def _encode_parsed(value: Any) -> bytes:
    """Encode what TorchServe parsed, and our bounds have not seen yet, as JSON again."""
    try:
        return encode_json(value)
    except TypeError as error:  # nested hundreds deep, integers over 64 bits, lone surrogates
        raise BadRequest(f"the JSON cannot be read: {str(error)[:200]}") from None


def _read_part(name: str, value: Any) -> Bytes:
    """Return the bytes of a part; TorchServe has already parsed one whose content type is JSON or text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return value
    if isinstance(value, str) and name in ("calibration", "sweeps", "text"):
        return value.encode()
    parts, _ = decode_json_request(
        _encode_parsed({name: {"b64": value} if isinstance(value, str) else value})
    )
    return parts[name] if isinstance(parts, Mapping) else parts


def _parse_frame(body: Body, given: Mapping[str, Any], base: FrameOptions) -> EncodedFrame | ClientError:
    try:
        return EncodedFrame(body, parse_options(given, base))
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
    form: Form,
    outcomes: Sequence[Outcome],
    request_id: str | None,
    seconds: Mapping[str, float],
    observed: Mapping[str, Any] | None = None,
) -> tuple[int, str, bytes]:
    """Encode the answer to one request.

    Args:
        form: form of the answer.
        outcomes: outcomes of its frames.
        request_id: id for error bodies; None to leave it out.
        seconds: duration of each stage.
        observed: counts of its frames, for the form of the gateway.

    Returns:
        HTTP status, content type and body.
    """
    if form == "outcomes":
        return 200, OUTCOMES_CONTENT_TYPE, write_outcomes(outcomes, seconds, observed)
    if form == "list":
        return 200, "application/json", encode_json({"outcomes": [_list_entry(each) for each in outcomes]})
    (outcome,) = outcomes
    status, body = encode_outcome(outcome, request_id)
    return status, "application/json", body


def _list_entry(outcome: Outcome) -> dict[str, Any]:
    status, body = encode_outcome(outcome)
    if status == 200:
        return {"status": status, "answer": orjson.Fragment(body)}
    return {"status": status, **orjson.loads(body)}
