"""Schemas and examples of the OpenAPI document: what requests hold, and what they are answered with.

`tests/gateway/test_openapi_examples.py` sends every example, and compares answers with the schemas.
"""

from __future__ import annotations

from typing import Any

from serve.protocol.sweeps import ACCUMULATED, MAX_SWEEPS

__all__ = ["COMPONENTS", "FRAME_OPTIONS", "INFER_EXAMPLES", "JSON_EXAMPLES", "QUERY_PARAMETERS", "ref"]

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Refer to one of `COMPONENTS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, *, required: tuple[str, ...] = (), description: str = "") -> Schema:
    found: Schema = {"type": "object", "properties": properties}
    if required:
        found["required"] = list(required)
    return {**found, "description": description} if description else found


def _list(items: Schema, description: str = "") -> Schema:
    return {"type": "array", "items": items, **({"description": description} if description else {})}


_NUMBERS = _list({"type": "number"})
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXTS = _list(_TEXT)

# Options

FRAME_OPTIONS: dict[str, tuple[str, Schema, Any]] = {
    "score_thr": ("Minimum score of a detection", {"type": "number", "minimum": 0, "maximum": 1}, 0.3),
    "max_detections": (
        "Maximum number of detections, best first",
        {"type": "integer", "minimum": 0, "maximum": 2**31},
        50,
    ),
    "classes": (
        "Classes whose detections are kept: names with commas between them, or a JSON list",
        {"type": "string", "minLength": 1},
        "Car,Pedestrian",
    ),
    "class_thr": (
        "Minimum score by class, in place of score_thr, as in Car=0.5,Pedestrian=0.3, or a JSON object",
        {"type": "string", "pattern": r"^[A-Za-z_ ]+=(0?\.[0-9]+|0|1)$"},
        "Pedestrian=0.2",
    ),
    "fields": (
        "Fields of the answer, with commas between them; the others are left out",
        {"type": "string", "enum": ["scores_3d,names", "names"]},
        "scores_3d,names",
    ),
    "load_dim": (
        "Declared float32 numbers per point of a .bin",
        {"type": "integer", "minimum": 1, "maximum": 2**31},
        4,
    ),
    "num_points": (
        "Declared number of points; 0 for an empty body",
        {"type": "integer", "minimum": 0, "maximum": 2**31},
        2,
    ),
    "columns": (
        "Columns of the point cloud in order, and values of those that it lacks",
        {"type": "string", "examples": ["x,y,z,ring", "x,y,z,intensity=0"]},
        "x,y,z,intensity",
    ),
    "sweeps": (
        "The point cloud has the points and times of several sweeps, and is used as it is",
        {"type": "string", "enum": [ACCUMULATED]},
        ACCUMULATED,
    ),
}
_CAMERA_EXAMPLE = (
    '{"cam2img": [[721.5, 0, 609.6], [0, 721.5, 172.9], [0, 0, 1]], "lidar2cam": [[0, -1, 0, 0], [0, 0, -1, -0.08], '
    '[1, 0, 0, -0.27], [0, 0, 0, 1]], "image_size": [1242, 375]}'
)
_REQUEST_OPTIONS: dict[str, tuple[str, Schema, Any]] = {
    "timeout_ms": (
        "Deadline of the request, milliseconds; frames still queued then are answered 504 and not computed",
        {"type": "number", "minimum": 1},
        10_000,
    ),
    "camera": (
        "For Accept: text/x-kitti, the camera of frames that have none: JSON of cam2img, lidar2cam (matrices) and "
        "image_size ([width, height])",
        {"type": "string", "contentMediaType": "application/json"},
        _CAMERA_EXAMPLE,
    ),
}
_TRACK_OPTIONS: dict[str, tuple[str, Schema, Any]] = {
    "track_session": (
        "Name of the sequence that the frames continue: detections get track_ids",
        {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
        "drive-7",
    ),
    "track_start": ("Begin the sequence, anew if it is open", {"type": "boolean"}, True),
    "track_end": ("Close the sequence after this request", {"type": "boolean"}, True),
    "frame_time_s": (
        "Time of each frame in seconds from any origin, rising, with commas between them",
        {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?$"},
        "12.3",
    ),
}
QUERY_PARAMETERS = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "description": f"{description}. Also a header, X-{name.replace('_', '-').title()}.",
        "schema": schema,
        "example": example,
    }
    for name, (description, schema, example) in {
        **FRAME_OPTIONS,
        **_REQUEST_OPTIONS,
        **_TRACK_OPTIONS,
    }.items()
]
_JSON_OPTIONS = {
    **{name: schema for name, (_, schema, _) in FRAME_OPTIONS.items()},
    "classes": {"oneOf": [_TEXT, {**_TEXTS, "minItems": 1}]},
    "class_thr": {"oneOf": [_TEXT, {"type": "object", "additionalProperties": {"type": "number"}}]},
    "fields": {"oneOf": [_TEXT, {**_TEXTS, "minItems": 1}]},
}
_JSON_OPTIONS_WITHOUT_SWEEPS = {name: value for name, value in _JSON_OPTIONS.items() if name != "sweeps"}

# Requests

_BASE64: Schema = {"type": "string", "contentEncoding": "base64"}
_CLOUD = {"type": "object", "properties": {"b64": _BASE64, "uri": _TEXT}}
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
_FRAME: Schema = {
    "oneOf": [
        _object({"b64": _BASE64, **_JSON_OPTIONS}, required=("b64",)),
        _object(
            {
                "uri": {"type": "string", "description": "Must start with a prefix that the operator allows"},
                **_JSON_OPTIONS,
            },
            required=("uri",),
        ),
        _object(
            {
                "points": _CLOUD,
                "sweeps": _SWEEP_LIST,
                "timestamp_s": {"type": "number"},
                **_JSON_OPTIONS_WITHOUT_SWEEPS,
            },
            required=("points", "sweeps"),
        ),
        _BASE64,
    ]
}
_TENSOR_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 200}
_PARAMETERS: Schema = {
    "type": "object",
    "description": "Texts, numbers or booleans: options of the frames, and timeout_ms",
    "additionalProperties": True,
}
_DATATYPE: Schema = {
    "type": "string",
    "enum": ["BOOL", "UINT8", "INT64", "FP32", "BYTES"],
}
_INFER_REQUEST = _object(
    {
        "id": _TEXT,
        "parameters": _PARAMETERS,
        "inputs": _list(
            _object(
                {
                    "name": _TENSOR_NAME,
                    "shape": _list(_COUNT),
                    "datatype": _DATATYPE,
                    "parameters": _PARAMETERS,
                    "data": _list({}, "flat or nested, row by row"),
                },
                required=("name", "shape", "datatype"),
            )
        ),
        "outputs": _list(_object({"name": _TENSOR_NAME, "parameters": _PARAMETERS}, required=("name",))),
    },
    required=("inputs",),
    description="Tensors in JSON; with the binary tensor extension, their bytes follow this JSON",
)

# Answers

_ANSWER_COMMON: Schema = {
    "names": {**_TEXTS, "description": "class of each detection"},
    "classes": {**_TEXTS, "description": "classes of the model, by label"},
    "units": {"type": "object"},
    "model": _object({"name": _TEXT, "version": _TEXT}),
    "warnings": _list(
        _object({"code": _TEXT, "message": _TEXT}, required=("code", "message")),
        "Likely mistakes of the client; absent if there are none",
    ),
    "track_ids": _list({"type": "integer"}, "id of each detection, -1 without one; with track_session only"),
    "track_session": _TEXT,
    "track_frame": {**_COUNT, "description": "number of the frame in its sequence, from 0 on"},
}
_BOXES_3D = _object(
    {
        "bboxes_3d": _list(_NUMBERS, "x, y, z, dx, dy, dz, yaw (and vx, vy); metres, radians"),
        "scores_3d": _NUMBERS,
        "labels_3d": _list({"type": "integer"}),
        "box_type_3d": {"type": "string", "enum": ["LiDAR", "Camera", "Depth"]},
        **_ANSWER_COMMON,
    },
    description="Boxes in 3D, best first",
)
_BOXES_2D = _object(
    {
        "bboxes": _list(_NUMBERS, "x1, y1, x2, y2 in pixels of the original image"),
        "scores": _NUMBERS,
        "labels": _list({"type": "integer"}),
        "masks": _list(_object({"size": _list(_COUNT), "counts": _TEXT}), "COCO run lengths"),
        **_ANSWER_COMMON,
    },
    description="Boxes in an image, best first",
)
_LABELS = _object(
    {
        "pts_semantic_mask": _object({"dtype": _TEXT, "shape": _list(_COUNT), "b64": _BASE64}),
        "panoptic_seg": _object({"size": _list(_COUNT), "png_b64": _BASE64}),
        "segments_info": _list({"type": "object"}),
        **_ANSWER_COMMON,
    },
    description="Labels of points, or a panoptic map",
)
_ERROR = _object(
    {"error": _object({"code": _TEXT, "message": _TEXT, "request_id": _TEXT}, required=("code", "message"))},
    required=("error",),
)
_DURATION = _object({"count": _COUNT, "ns": _COUNT}, required=("count", "ns"))
_STAGES = {name: _DURATION for name in ("compute_input", "compute_infer", "compute_output")}
_OUTPUT_TENSOR = _object(
    {
        "name": _TENSOR_NAME,
        "datatype": _DATATYPE,
        "shape": _list(_COUNT),
        "data": _list({}),
        "parameters": _PARAMETERS,
    },
    required=("name", "datatype", "shape"),
)
_TENSOR = _object(
    {
        "name": _TENSOR_NAME,
        "datatype": _TEXT,
        "shape": _list({"type": "integer"}),
        "optional": {"type": "boolean"},
    },
    required=("name", "datatype", "shape"),
)
_CONFIG_TENSOR = _object(
    {"name": _TENSOR_NAME, "data_type": _TEXT, "dims": _list({"type": "integer"})},
    required=("name", "data_type", "dims"),
)

COMPONENTS: dict[str, Schema] = {
    "Frame": _FRAME,
    "FrameRequest": {
        "oneOf": [
            *_FRAME["oneOf"],
            _object({"frames": {"type": "array", "items": ref("Frame")}}, required=("frames",)),
        ]
    },
    "Boxes3D": _BOXES_3D,
    "Boxes2D": _BOXES_2D,
    "Labels": _LABELS,
    "Answer": {
        "description": "Answer to one frame, with OpenMMLab's field names; see docs/answers.md",
        "anyOf": [ref("Boxes3D"), ref("Boxes2D"), ref("Labels")],
    },
    "Answers": {
        "oneOf": [
            ref("Answer"),
            _list({"anyOf": [ref("Answer"), ref("Error")]}, "one entry per frame, in order"),
        ]
    },
    "CocoResults": _list(
        _object(
            {
                "image_id": {"type": "integer", "description": "position of the frame in the request"},
                "category_id": {"type": "integer"},
                "bbox": {**_NUMBERS, "description": "x, y, width, height in pixels"},
                "score": {"type": "number"},
                "segmentation": {"type": "object"},
            },
            required=("image_id", "category_id", "bbox", "score"),
        )
    ),
    "Error": _ERROR,
    "ProtocolError": _object({"error": _TEXT, "code": _TEXT}, required=("error",)),
    "InferRequest": _INFER_REQUEST,
    "InferResponse": _object(
        {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": _list(_OUTPUT_TENSOR)},
        required=("model_name", "model_version", "outputs"),
    ),
    "Live": _object({"live": {"type": "boolean"}, "version": _TEXT}, required=("live",)),
    "Ready": _object({"ready": {"type": "boolean"}, "reasons": _TEXTS}, required=("ready",)),
    "Ping": _object({"status": {"type": "string", "enum": ["Healthy", "Unhealthy"]}}, required=("status",)),
    "Model": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "default": {"type": "boolean"},
            "status": {"type": "string", "enum": ["ready", "loading", "refused"]},
            "reason": _TEXT,
            "workers": _object({"ready": _COUNT, "all": _COUNT}),
            "waiting": _COUNT,
            "running": _COUNT,
            "canary_share": {"type": "number"},
            "shadow_share": {"type": "number"},
            "modality": _TEXT,
            "parts": _TEXTS,
            "classes": _TEXTS,
            "box_type_3d": {"type": ["string", "null"]},
            "load_dim": {"type": ["integer", "null"]},
        },
        required=("status",),
        description="One version of a model, or an archive that was refused",
    ),
    "Models": _list(ref("Model")),
    "ServerMetadata": _object(
        {"name": _TEXT, "version": _TEXT, "extensions": _TEXTS}, required=("name", "version", "extensions")
    ),
    "ModelReady": _object({"name": _TEXT, "ready": {"type": "boolean"}}, required=("name", "ready")),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _TEXTS,
            "platform": _TEXT,
            "inputs": _list(_TENSOR),
            "outputs": _list(_TENSOR),
        },
        required=("name", "versions", "platform", "inputs", "outputs"),
    ),
    "ModelConfig": _object(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _COUNT,
            "input": _list(_CONFIG_TENSOR),
            "output": _list(_CONFIG_TENSOR),
            "instance_group": _list({"type": "object"}),
        },
        required=("name", "platform", "backend", "max_batch_size", "input", "output"),
        description="As Triton's model configuration extension has it",
    ),
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": {**_COUNT, "description": "milliseconds since the epoch"},
                        "inference_count": {**_COUNT, "description": "frames"},
                        "execution_count": {**_COUNT, "description": "batches"},
                        "inference_stats": _object(
                            {"success": _DURATION, "fail": _DURATION, "queue": _DURATION, **_STAGES},
                            required=("success", "fail", "queue"),
                        ),
                        "batch_stats": _list(_object({"batch_size": _COUNT, **_STAGES})),
                    },
                    required=("name", "version", "inference_count", "execution_count", "inference_stats"),
                )
            )
        },
        required=("model_stats",),
    ),
    "IndexRequest": _object({"ready": {"type": "boolean", "description": "only models that are ready"}}),
    "Index": _list(
        _object(
            {
                "name": _TEXT,
                "version": _TEXT,
                "state": {"type": "string", "enum": ["READY", "LOADING", "UNAVAILABLE"]},
                "reason": _TEXT,
            },
            required=("name", "state"),
        )
    ),
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
