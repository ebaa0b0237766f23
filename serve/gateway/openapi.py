"""What the API document says: descriptions and examples of the routes, in one place. Knows no behaviour."""

from __future__ import annotations

from typing import Any

from serve.gateway.options import GatewayOptions
from serve.protocol.batch import FRAMES_CONTENT_TYPE

__all__ = ["DESCRIPTION", "MAX_DETECTIONS", "SCORE_THR", "TIMEOUT_MS", "errors", "predictions"]

SCORE_THR = "Leave out detections that score less"
MAX_DETECTIONS = "The best so many only"
TIMEOUT_MS = "Deadline of the request, milliseconds; what waits longer is answered 504 and never computed"
DESCRIPTION = """\
Detections for point clouds and images. `curl -T frame.bin http://HOST:8000/predictions/second` is all it takes:
TorchServe's own call, with batching across requests, deadlines, several frames in one call
and the Open Inference Protocol (`/v2`) beside it."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "request_id": {"type": "string"},
            },
        }
    },
}
_PROTOCOL_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}
_REASONS = {
    400: "The request cannot be read, or has an unknown option",
    401: "No API key, or one that is not known",
    403: "The frame's address is not allowed here",
    404: "No such model or version, or nothing at the frame's address",
    405: "Another method is used here",
    408: "The body did not arrive in time",
    413: "Over a limit",
    422: "The bytes are no frame of this model",
    429: "Too much is waiting; see Retry-After",
    500: "The model failed on this frame",
    502: "TorchServe answered something unexpected",
    503: "Not ready; see Retry-After",
    504: "The deadline passed",
    507: "This frame alone does not fit the device",
}


def errors(*statuses: int, protocol: bool = False) -> dict[int | str, dict[str, Any]]:
    """Responses for `statuses`, all with the one error body, or that of the Open Inference `protocol`."""
    schema = _PROTOCOL_ERROR if protocol else _ERROR
    return {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def predictions(options: GatewayOptions) -> dict[str, Any]:
    """Of the routes that take frames."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    options_ = {
        "score_thr": {"type": "number", "minimum": 0, "maximum": 1},
        "max_detections": {"type": "integer", "minimum": 0},
    }
    inline = {
        "type": "object",
        "required": ["b64"],
        "properties": {"b64": {"type": "string", "contentEncoding": "base64"}, **options_},
    }
    named = {
        "type": "object",
        "required": ["uri"],
        "properties": {
            "uri": {"type": "string", "description": "Below a prefix that the operator allows"},
            **options_,
        },
    }
    one = {"oneOf": [inline, named, {"type": "string", "contentEncoding": "base64"}]}
    frame = {
        "oneOf": [
            *one["oneOf"],
            {
                "type": "object",
                "required": ["frames"],
                "properties": {"frames": {"type": "array", "items": one}},
            },
        ]
    }
    form = {"type": "object", "properties": {"data": {"type": "array", "items": binary["schema"]}}}
    answer = {"type": "object", "description": "Detections with OpenMMLab's names; see docs/answers.md"}
    return {
        "responses": {
            200: {
                "description": f"Detections, best first. Several frames (up to {options.max_frames_per_request}) give "
                "an array in order, or lines as they finish (Accept: application/x-ndjson).",
                "content": {
                    "application/json": {"schema": {"oneOf": [answer, {"type": "array", "items": answer}]}},
                    "application/x-ndjson": {"schema": {"type": "string"}},
                    "application/x-msgpack": binary,
                    "image/png": binary,
                },
            },
            **errors(*_REASONS),
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/octet-stream": binary,
                    "image/jpeg": binary,
                    "image/png": binary,
                    "multipart/form-data": {"schema": form},
                    "application/json": {"schema": frame},
                    FRAMES_CONTENT_TYPE: binary,
                },
            }
        },
    }
