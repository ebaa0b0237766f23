"""The OpenAPI document: FastAPI's, with the routes that FastAPI does not know, and schemas of all answers."""

from __future__ import annotations

from typing import Any

from serve.gateway.middleware import OPEN_PATHS
from serve.gateway.openapi.answers import ANSWERS
from serve.gateway.openapi.options import FRAME_OPTIONS, INFER_PARAMETERS, QUERY_PARAMETERS
from serve.gateway.openapi.requests import INFER_EXAMPLES, JSON_EXAMPLES, REQUESTS
from serve.gateway.openapi.schema import ref
from serve.gateway.options import GatewayOptions
from serve.protocol.batch import FRAMES_CONTENT_TYPE

__all__ = ["DESCRIPTION", "complete", "errors"]

DESCRIPTION = """\
3D and 2D object detection for point clouds and images: `curl -T frame.bin http://HOST:8000/predictions/second`.
Compatible with TorchServe's predictions API; adds batching across requests, deadlines, several frames per request
and the Open Inference Protocol (`/v2`)."""

_PATH_PARAMETERS = {
    name: {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "maxLength": length},
        "example": example,
    }
    for name, description, length, example in (
        ("model", "Name of the model", 128, "second"),
        ("version", "Version of the model", 64, "1.0"),
    )
}
_PREDICT = "Detect objects in one or several frames"
_INFER = "Run inference; returns detections as tensors"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TENSORS = {
    "schema": {
        **_BINARY["schema"],
        "description": "JSON of Inference-Header-Content-Length (a header) bytes, then the tensors in binary",
    }
}
# Path and method of the other routes → schema of the answer.
_ANSWERS = {
    ("/health/live", "get"): "Live",
    ("/health/ready", "get"): "Ready",
    ("/ping", "get"): "Ping",
    ("/models", "get"): "Models",
    ("/models/{model}", "get"): "Models",
    ("/v2", "get"): "ServerMetadata",
    ("/v2/health/live", "get"): "Live",
    ("/v2/health/ready", "get"): "Ready",
    ("/v2/models/{model}/ready", "get"): "ModelReady",
    ("/v2/models/{model}/versions/{version}/ready", "get"): "ModelReady",
    ("/v2/models/{model}", "get"): "ModelMetadata",
    ("/v2/models/{model}/versions/{version}", "get"): "ModelMetadata",
    ("/v2/models/{model}/config", "get"): "ModelConfig",
    ("/v2/models/{model}/versions/{version}/config", "get"): "ModelConfig",
    ("/v2/models/stats", "get"): "Statistics",
    ("/v2/models/{model}/stats", "get"): "Statistics",
    ("/v2/models/{model}/versions/{version}/stats", "get"): "Statistics",
    ("/v2/repository/index", "post"): "Index",
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
    schema = ref("ProtocolError" if protocol else "Error")
    return {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def complete(document: dict[str, Any], options: GatewayOptions) -> dict[str, Any]:
    """Add to FastAPI's document the routes of frames (`serve.gateway.router`), all schemas and examples.

    Args:
        document: FastAPI's; changed in place.
        options: options of the gateway, for limits.

    Returns:
        The document.
    """
    paths = document["paths"]
    for operations in paths.values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter |= _PATH_PARAMETERS.get(parameter["name"], {})
    for (path, method), schema in _ANSWERS.items():
        content = {"application/json": {"schema": ref(schema)}}
        paths[path][method]["responses"]["200"] = {"description": "Successful response", "content": content}
    for path in ("/health/ready", "/v2/health/ready", "/ping", "/v2/models/{model}/ready",
                 "/v2/models/{model}/versions/{version}/ready"):  # fmt: skip
        found = paths[path]["get"]["responses"]
        found["503"]["content"] = found["200"]["content"]
    paths["/v2/repository/index"]["post"]["requestBody"] = {
        "required": False,
        "content": {
            "application/json": {"schema": ref("IndexRequest"), "example": {"ready": True}},
        },
    }
    paths |= _frame_paths(options)
    if options.api_keys or options.api_keys_file is not None:
        _describe_keys(document)
    document.setdefault("components", {}).setdefault("schemas", {}).update({**REQUESTS, **ANSWERS})
    return document


def _describe_keys(document: dict[str, Any]) -> None:
    """Say how a key is sent, and which paths need none."""
    document.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    document["security"] = [{"bearer": []}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith(OPEN_PATHS):
                operation["security"] = []
            else:
                operation["responses"].update(_by_text(errors(401, protocol=path.startswith("/v2"))))


def _frame_paths(options: GatewayOptions) -> dict[str, Any]:
    predict = {"tags": ["predictions"], **_predict(options)}
    infer = {"tags": ["open inference protocol"], **_infer()}
    queries = predict.pop("parameters")
    return {
        path: {
            method: {
                **operation,
                "summary": summary,
                "operationId": name if method == "post" else f"{method}_{name}",
                "parameters": [*(_PATH_PARAMETERS[each] for each in names), *more],
            }
            for method in (("post", "put") if operation is predict else ("post",))
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
                INFER_PARAMETERS,
            ),
            (
                "/v2/models/{model}/versions/{version}/infer",
                infer,
                f"{_INFER}, with this version of the model",
                "version_infer_v2_models__model__versions__version__infer_post",
                ("model", "version"),
                INFER_PARAMETERS,
            ),
        )
    }


def _by_text(responses: dict[int | str, Any]) -> dict[str, Any]:
    return {str(status): response for status, response in responses.items()}


def _infer() -> dict[str, Any]:
    return {
        "responses": {
            "200": {
                "description": "Detections as tensors; in binary if the request asks for it",
                "content": {
                    "application/json": {"schema": ref("InferResponse")},
                    "application/octet-stream": _TENSORS,
                },
            },
            **_by_text(errors(400, 404, 408, 413, 422, 429, 500, 502, 503, 504, 507, protocol=True)),
        },
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": ref("InferRequest"), "examples": INFER_EXAMPLES},
                "application/octet-stream": _TENSORS,
            },
        },
    }


def _predict(options: GatewayOptions) -> dict[str, Any]:
    form = {
        "type": "object",
        "description": "Frames as files named data; or the parts of one frame as files with their names; and options",
        "properties": {
            "data": {"type": "array", "items": _BINARY["schema"]},
            **{name: schema for name, (_, schema, _) in FRAME_OPTIONS.items()},
        },
        "additionalProperties": _BINARY["schema"],
    }
    text = {"schema": {"type": "string"}}
    return {
        "responses": {
            "200": {
                "description": f"Detections, best first. Several frames (up to {options.max_frames_per_request}) are "
                "answered with an array in order, or with lines as they finish (Accept: application/x-ndjson).",
                "content": {
                    "application/json": {"schema": ref("Answers")},
                    "application/x-ndjson": text,
                    "application/x-msgpack": _BINARY,
                    "image/png": _BINARY,
                    "text/x-kitti": text,
                    "application/vnd.coco+json": {"schema": ref("CocoResults")},
                    "text/csv": text,
                },
            },
            **_by_text(errors(*_REASONS)),
        },
        "parameters": QUERY_PARAMETERS,
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": _BINARY,
                "image/jpeg": _BINARY,
                "image/png": _BINARY,
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": ref("FrameRequest"), "examples": JSON_EXAMPLES},
                FRAMES_CONTENT_TYPE: _BINARY,
            },
        },
    }
