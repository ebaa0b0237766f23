"""What requests hold, with examples, in the OpenAPI document.

`tests/gateway/test_openapi_examples.py` sends every example.
"""

from __future__ import annotations

from typing import Any

from serve.gateway.openapi.options import JSON_OPTIONS, JSON_OPTIONS_WITHOUT_SWEEPS
from serve.gateway.openapi.schema import (
    BASE64,
    COUNT,
    DATATYPE,
    PARAMETERS,
    TENSOR_NAME,
    TEXT,
    Schema,
    json_list,
    json_object,
    ref,
)
from serve.protocol.sweeps import MAX_SWEEPS

__all__ = ["INFER_EXAMPLES", "JSON_EXAMPLES", "REQUESTS"]

_PART = {"type": "object", "properties": {"b64": BASE64, "uri": TEXT}}
_SWEEP_LIST = {
    "type": "array",
    "maxItems": MAX_SWEEPS,
    "items": {
        "type": "object",
        "required": ["points"],
        "properties": {
            "points": _PART,
            "time_lag_s": {"type": "number", "minimum": 0},
            "timestamp_s": {"type": "number"},
            "transform": {"type": "array", "description": "4 x 4, sweep to key frame, metres"},
            "lidar2sensor": {"type": "array", "description": "4 x 4, as in mmdet3d's infos"},
        },
    },
}
_FRAME: Schema = {
    "anyOf": [
        json_object({"b64": BASE64, **JSON_OPTIONS}, required=("b64",)),
        json_object(
            {
                "uri": {"type": "string", "description": "Must start with a prefix that the operator allows"},
                **JSON_OPTIONS,
            },
            required=("uri",),
        ),
        json_object(
            {
                "points": _PART,
                "sweeps": _SWEEP_LIST,
                "timestamp_s": {"type": "number"},
                **JSON_OPTIONS_WITHOUT_SWEEPS,
            },
            required=("points", "sweeps"),
        ),
        {
            **json_object(
                {
                    "points": _PART,
                    "image": _PART,
                    "calibration": {
                        "type": "object",
                        "description": "Matrices by name: cam2img, lidar2cam, …; of several cameras, by camera",
                    },
                    **JSON_OPTIONS,
                },
                required=("calibration",),
                description="A frame of several parts; those of several cameras are image.CAM_FRONT, …",
            ),
            "patternProperties": {r"^image\..+$": _PART},
        },
        BASE64,
    ]
}
_INFER_REQUEST = json_object(
    {
        "id": TEXT,
        "parameters": PARAMETERS,
        "inputs": json_list(
            json_object(
                {
                    "name": TENSOR_NAME,
                    "shape": json_list(COUNT),
                    "datatype": DATATYPE,
                    "parameters": PARAMETERS,
                    "data": json_list({}, "flat or nested, row by row"),
                },
                required=("name", "shape", "datatype"),
            )
        ),
        "outputs": json_list(
            json_object({"name": TENSOR_NAME, "parameters": PARAMETERS}, required=("name",))
        ),
    },
    required=("inputs",),
    description="Tensors in JSON; with the binary tensor extension, their bytes follow this JSON",
)

#: Schemas by name.
REQUESTS: dict[str, Schema] = {
    "Frame": _FRAME,
    "FrameRequest": {
        "anyOf": [
            *_FRAME["anyOf"],
            json_object(
                {"frames": {"type": "array", "items": ref("Frame")}, **JSON_OPTIONS},
                required=("frames",),
                description="Several frames; options beside them are for those that have none of their own",
            ),
        ]
    },
    "InferRequest": _INFER_REQUEST,
    "IndexRequest": json_object({"ready": {"type": "boolean", "description": "only models that are ready"}}),
}

# Two points: 10 m ahead, and 12 m ahead and 1 m to the left; x, y, z, intensity as float32.
_TWO_POINTS = "AAAgQQAAAAAAAIC/AAAAPwAAQEEAAIA/AACAv83MTD4="
JSON_EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One frame, its options beside it", "value": {"b64": _TWO_POINTS, "score_thr": 0.3}},
    "selection": {
        "summary": "Some classes and fields only",
        "value": {
            "b64": _TWO_POINTS,
            "classes": ["Car", "Pedestrian"],
            "class_thr": {"Pedestrian": 0.2},
            "fields": ["bboxes_3d", "scores_3d", "names"],
        },
    },
    "many": {
        "summary": "Several frames, answered with an array in order",
        "value": {"frames": [{"b64": _TWO_POINTS}, {"b64": _TWO_POINTS, "max_detections": 1}]},
    },
}
INFER_EXAMPLES: dict[str, Any] = {
    "points": {
        "summary": "A point cloud as a tensor",
        "value": {
            "id": "42",
            "parameters": {"score_thr": 0.3},
            "inputs": [
                {
                    "name": "points",
                    "datatype": "FP32",
                    "shape": [2, 4],
                    "data": [[10, 0, -1, 0.5], [12, 1, -1, 0.2]],
                }
            ],
            "outputs": [{"name": "bboxes_3d"}, {"name": "scores_3d"}],
        },
    },
    "frames": {
        "summary": "Encoded frames in base64, several in one request",
        "value": {
            "inputs": [
                {
                    "name": "frame",
                    "datatype": "BYTES",
                    "shape": [2],
                    "parameters": {"content_type": "base64"},
                    "data": [_TWO_POINTS, _TWO_POINTS],
                }
            ]
        },
    },
}
