"""Descriptions, parameters and error responses for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from serve.gateway.options import GatewayOptions
from serve.protocol.batch import FRAMES_CONTENT_TYPE
from serve.protocol.sweeps import ACCUMULATED, MAX_SWEEPS

__all__ = ["DESCRIPTION", "errors", "frame_paths"]

DESCRIPTION = """\
3D and 2D object detection for point clouds and images: `curl -T frame.bin http://HOST:8000/predictions/second`.
Compatible with TorchServe's predictions API; adds batching across requests, deadlines, several frames per request
and the Open Inference Protocol (`/v2`)."""

_SCORE_THR = {"type": "number", "minimum": 0, "maximum": 1}
_MAX_DETECTIONS = {"type": "integer", "minimum": 0, "maximum": 2**31}
_LOAD_DIM = {"type": "integer", "minimum": 1, "maximum": 2**31, "description": "Declared numbers per point"}
_NUM_POINTS = {"type": "integer", "minimum": 0, "maximum": 2**31, "description": "Declared number of points"}
_COLUMNS = {"type": "string", "examples": ["x,y,z,ring", "x,y,z,intensity=0"]}
_SWEEPS = {"type": "string", "enum": [ACCUMULATED]}
_QUERY_PARAMETERS = [
    {"name": name, "in": "query", "required": False, "description": description, "schema": schema}
    for name, description, schema in (
        ("score_thr", "Minimum score of a detection", _SCORE_THR),
        ("max_detections", "Maximum number of detections, best first", _MAX_DETECTIONS),
        ("load_dim", "Declared float32 numbers per point of a .bin", _LOAD_DIM),
        ("num_points", "Declared number of points; 0 for an empty body", _NUM_POINTS),
        ("columns", "Columns of the point cloud in order, and values of those that it lacks", _COLUMNS),
        (
            "sweeps",
            "The point cloud has the points and times of several sweeps, and is used as it is",
            _SWEEPS,
        ),
        (
            "timeout_ms",
            "Deadline of the request, milliseconds; frames still queued then are answered 504 and not computed",
            {"type": "number", "minimum": 1},
        ),
    )
]

_PATH_PARAMETERS = {
    name: {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "maxLength": length},
    }
    for name, description, length in (
        ("model", "Name of the model", 128),
        ("version", "Version of the model", 64),
    )
}
_PREDICT = "Detect objects in one or several frames"
_INFER = "Run inference; returns detections as tensors"

_CLOUD = {
    "type": "object",
    "properties": {"b64": {"type": "string", "contentEncoding": "base64"}, "uri": {"type": "string"}},
}
_SWEEP_LIST = {
    "type": "array",
    "maxItems": MAX_SWEEPS,
    "items": {
        "type": "object",
        "required": ["points"],
        "properties": {
            "points": _CLOUD,
            "time_lag_s": {"type": "number", "minimum": 0},
            "timestamp_s": {"type": "number"},
            "transform": {"type": "array", "description": "4 x 4, sweep to key frame, metres"},
            "lidar2sensor": {"type": "array", "description": "4 x 4, as in mmdet3d's infos"},
        },
    },
}
_WARNINGS = {
    "type": "array",
    "description": "Likely mistakes of the client; absent if there are none",
    "items": {
        "type": "object",
        "required": ["code", "message"],
        "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
    },
}
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
    400: "Malformed request, or an unknown option",
    401: "Missing or unknown API key",
    403: "The frame's URI is not allowed",
    404: "Model, version or the object of the frame's URI not found",
    405: "Method not allowed",
    406: "None of the accepted media types is supported",
    408: "The body did not arrive in time",
    413: "A limit was exceeded",
    422: "The bytes are not a frame of this model",
    429: "Too many pending frames or bytes; see Retry-After",
    500: "The model failed on this frame",
    502: "Unexpected answer of TorchServe",
    503: "Not ready; see Retry-After",
    504: "The deadline passed",
    507: "The frame alone exceeds the memory of the device",
}


def errors(*statuses: int, protocol: bool = False) -> dict[int | str, dict[str, Any]]:
    """Document error responses for `statuses`, with the error body of the Open Inference Protocol if `protocol`."""
    schema = _PROTOCOL_ERROR if protocol else _ERROR
    return {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def frame_paths(options: GatewayOptions) -> dict[str, Any]:
    """Document the routes that take frames (`serve.gateway.router`), as ``paths`` of an OpenAPI document."""
    predict = {"tags": ["predictions"], **_predict(options)}
    infer = {
        "tags": ["open inference protocol"],
        "responses": {
            "200": {"description": "Detections as tensors", "content": {"application/json": {"schema": {}}}},
            **_by_text(errors(400, 404, 408, 413, 422, 429, 500, 502, 503, 504, 507, protocol=True)),
        },
    }
    queries = predict.pop("parameters")
    return {
        path: {
            "post": {
                **operation,
                "summary": summary,
                "operationId": name,
                "parameters": [*(_PATH_PARAMETERS[each] for each in names), *more],
            }
        }
        for path, operation, summary, name, names, more in (
            ("/predictions/{model}", predict, _PREDICT, "predict", ("model",), queries),
            (
                "/predictions/{model}/{version}",
                predict,
                f"{_PREDICT}, with this version of the model",
                "predict_version",
                ("model", "version"),
                queries,
            ),
            (
                "/v2/models/{model}/infer",
                infer,
                _INFER,
                "default_infer_v2_models__model__infer_post",
                ("model",),
                (),
            ),
            (
                "/v2/models/{model}/versions/{version}/infer",
                infer,
                f"{_INFER}, with this version of the model",
                "version_infer_v2_models__model__versions__version__infer_post",
                ("model", "version"),
                (),
            ),
        )
    }


def _by_text(responses: dict[int | str, Any]) -> dict[str, Any]:
    return {str(status): response for status, response in responses.items()}


def _predict(options: GatewayOptions) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    frame_options = {
        "score_thr": _SCORE_THR,
        "max_detections": _MAX_DETECTIONS,
        "load_dim": _LOAD_DIM,
        "num_points": _NUM_POINTS,
        "columns": _COLUMNS,
    }
    cloud_options = {**frame_options, "sweeps": _SWEEPS}
    inline = {
        "type": "object",
        "required": ["b64"],
        "properties": {"b64": {"type": "string", "contentEncoding": "base64"}, **cloud_options},
    }
    named = {
        "type": "object",
        "required": ["uri"],
        "properties": {
            "uri": {"type": "string", "description": "Must start with a prefix that the operator allows"},
            **cloud_options,
        },
    }
    with_sweeps = {
        "type": "object",
        "required": ["points", "sweeps"],
        "properties": {
            "points": _CLOUD,
            "sweeps": _SWEEP_LIST,
            "timestamp_s": {"type": "number"},
            **frame_options,
        },
    }
    one = {"oneOf": [inline, named, with_sweeps, {"type": "string", "contentEncoding": "base64"}]}
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
    answer = {
        "type": "object",
        "description": "Detections with OpenMMLab's field names; see docs/answers.md",
        "properties": {"warnings": _WARNINGS},
    }
    return {
        "responses": {
            "200": {
                "description": f"Detections, best first. Several frames (up to {options.max_frames_per_request}) are "
                "answered with an array in order, or with lines as they finish (Accept: application/x-ndjson).",
                "content": {
                    "application/json": {"schema": {"oneOf": [answer, {"type": "array", "items": answer}]}},
                    "application/x-ndjson": {"schema": {"type": "string"}},
                    "application/x-msgpack": binary,
                    "image/png": binary,
                },
            },
            **_by_text(errors(*_REASONS)),
        },
        "parameters": _QUERY_PARAMETERS,
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
        },
    }
