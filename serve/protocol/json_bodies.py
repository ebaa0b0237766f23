"""JSON bodies: one frame with its options in a request, and the answer to it.

`serve.protocol.json_reader` parses within bounds; here is what the members of the document mean.
"""

from __future__ import annotations

from typing import Any

import orjson

from serve.errors import BadRequest, FrameTooLarge
from serve.protocol.batch import MAX_PARTS, Body, Bytes
from serve.protocol.frame_spec import is_part
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, decode_text, read_json
from serve.protocol.sweeps import list_sweeps

__all__ = ["decode_json_request", "encode_json", "read_json_frame"]

# Of the part `text`, which is a sentence.
_MAX_TEXT_BYTES = 1 << 20


def decode_json_request(body: Bytes) -> tuple[Body, dict[str, Any]]:
    """Read a frame and its options from JSON of one of the shapes of `read_json_frame`.

    Raises:
        BadRequest: the body is not JSON, has none of these shapes, or is not base64.
        FrameTooLarge: it is beyond the `JsonBounds`.
    """
    return read_json_frame(read_json(body, JsonBounds()))


def read_json_frame(document: Any) -> tuple[Body, dict[str, Any]]:
    """Read a frame and its options from parsed JSON.

    ``{"b64": "…", <options>}`` or a bare base64 string for a frame of one part;
    ``{"points": {"b64": "…"}, "image": {"b64": "…"}, "calibration": {…}, <options>}`` for several parts;
    ``{"points": {"b64": "…"}, "sweeps": [{"points": {"b64": "…"}, "time_lag_s": …, "transform": […]}, …]}`` for sweeps.

    Returns:
        The bytes (or those of each part by name) and the options.

    Raises:
        BadRequest: the document has none of these shapes, or is not base64.
    """
    if isinstance(document, str | LongText):
        document = {"b64": document}
    if (
        isinstance(document, dict)
        and "b64" not in document
        and any(is_part(*each) for each in document.items())
    ):
        document = list_sweeps(document)
        if len(document) > MAX_PARTS:
            raise FrameTooLarge(f"the frame has {len(document)} members, the limit is {MAX_PARTS}")
        parts = {name: _json_part(name, value) for name, value in document.items() if is_part(name, value)}
        return parts, {name: value for name, value in document.items() if name not in parts}
    if not isinstance(document, dict) or not isinstance(document.get("b64"), str | LongText):
        raise BadRequest(
            'JSON must be {"b64": "<base64 of the frame>", …options}, or {"image": {"b64": "…"}, …} by part'
        )
    options = {name: value for name, value in document.items() if name != "b64"}
    return _base64("b64", document["b64"]), options


def _json_part(name: str, value: Any) -> Bytes:
    """Return the bytes of a part: decoded base64, or the document itself for calibration and text."""
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str | LongText):
        return _base64(name, value["b64"])
    if (name == "calibration" and isinstance(value, dict)) or (
        name == "sweeps" and isinstance(value, list | dict)
    ):
        try:
            return encode_json(value)
        except (
            TypeError
        ) as error:  # a text of 64 KiB in it; what another parser let pass, as TorchServe's does
            raise BadRequest(f"{name} holds what it cannot: {str(error)[:200]}") from None
    if name == "text" and isinstance(value, str | LongText):
        return decode_text(value, _MAX_TEXT_BYTES)
    expected = {"calibration": "a JSON object of matrices", "sweeps": "a list"}.get(
        name, '{"b64": "<base64>"}'
    )
    raise BadRequest(f"{name[:80]} must be {expected}")


def _base64(name: str, encoded: str | LongText) -> Bytes:
    try:
        return decode_base64(encoded)
    except ValueError as error:
        raise BadRequest(f"{name[:80]} is not base64: {error}") from None


def encode_json(document: Any) -> bytes:
    """Encode as JSON; numpy arrays become lists, float32 its shortest exact decimal."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
