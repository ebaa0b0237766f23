"""What requests are answered with, in the OpenAPI document.

`tests/gateway/test_openapi_examples.py` compares answers with these schemas.
"""

from __future__ import annotations

from serve.gateway.openapi.schema import (
    BASE64,
    COUNT,
    DATATYPE,
    NUMBERS,
    PARAMETERS,
    TENSOR_NAME,
    TEXT,
    TEXTS,
    Schema,
    json_list,
    json_object,
    ref,
)

__all__ = ["ANSWERS"]

_ANSWER_COMMON: Schema = {
    "names": {**TEXTS, "description": "class of each detection"},
    "classes": {**TEXTS, "description": "classes of the model, by label"},
    "units": {"type": "object"},
    "model": json_object({"name": TEXT, "version": TEXT}),
    "warnings": json_list(
        json_object({"code": TEXT, "message": TEXT}, required=("code", "message")),
        "Likely mistakes of the client; absent if there are none",
    ),
    "track_ids": json_list(
        {"type": "integer"}, "id of each detection, -1 without one; with track_session only"
    ),
    "track_session": TEXT,
    "track_frame": {**COUNT, "description": "number of the frame in its sequence, from 0 on"},
}
_BOXES_3D = json_object(
    {
        "bboxes_3d": json_list(NUMBERS, "x, y, z, dx, dy, dz, yaw (and vx, vy); metres, radians"),
        "scores_3d": NUMBERS,
        "labels_3d": json_list({"type": "integer"}),
        "box_type_3d": {"type": "string", "enum": ["LiDAR", "Camera", "Depth"]},
        **_ANSWER_COMMON,
    },
    description="Boxes in 3D, best first",
)
_BOXES_2D = json_object(
    {
        "bboxes": json_list(NUMBERS, "x1, y1, x2, y2 in pixels of the original image"),
        "scores": NUMBERS,
        "labels": json_list({"type": "integer"}),
        "masks": json_list(json_object({"size": json_list(COUNT), "counts": TEXT}), "COCO run lengths"),
        **_ANSWER_COMMON,
    },
    description="Boxes in an image, best first",
)
_LABELS = json_object(
    {
        "pts_semantic_mask": json_object({"dtype": TEXT, "shape": json_list(COUNT), "b64": BASE64}),
        "panoptic_seg": json_object({"size": json_list(COUNT), "png_b64": BASE64}),
        "segments_info": json_list({"type": "object"}),
        **_ANSWER_COMMON,
    },
    description="Labels of points, or a panoptic map",
)
_ERROR = json_object(
    {"error": json_object({"code": TEXT, "message": TEXT, "request_id": TEXT}, required=("code", "message"))},
    required=("error",),
)
_DURATION = json_object({"count": COUNT, "ns": COUNT}, required=("count", "ns"))
_STAGES = {name: _DURATION for name in ("compute_input", "compute_infer", "compute_output")}
_OUTPUT_TENSOR = json_object(
    {
        "name": TENSOR_NAME,
        "datatype": DATATYPE,
        "shape": json_list(COUNT),
        "data": json_list({}),
        "parameters": PARAMETERS,
    },
    required=("name", "datatype", "shape"),
)
_TENSOR = json_object(
    {
        "name": TENSOR_NAME,
        "datatype": TEXT,
        "shape": json_list({"type": "integer"}),
        "optional": {"type": "boolean"},
    },
    required=("name", "datatype", "shape"),
)
_CONFIG_TENSOR = json_object(
    {"name": TENSOR_NAME, "data_type": TEXT, "dims": json_list({"type": "integer"})},
    required=("name", "data_type", "dims"),
)

#: Schemas by name.
ANSWERS: dict[str, Schema] = {
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
            json_list({"anyOf": [ref("Answer"), ref("Error")]}, "one entry per frame, in order"),
        ]
    },
    "CocoResults": json_list(
        json_object(
            {
                "image_id": {"type": "integer", "description": "position of the frame in the request"},
                "category_id": {"type": "integer"},
                "bbox": {**NUMBERS, "description": "x, y, width, height in pixels"},
                "score": {"type": "number"},
                "segmentation": {"type": "object"},
            },
            required=("image_id", "category_id", "bbox", "score"),
        )
    ),
    "Error": _ERROR,
    "ProtocolError": json_object({"error": TEXT, "code": TEXT}, required=("error",)),
    "InferResponse": json_object(
        {"model_name": TEXT, "model_version": TEXT, "id": TEXT, "outputs": json_list(_OUTPUT_TENSOR)},
        required=("model_name", "model_version", "outputs"),
    ),
    "Live": json_object({"live": {"type": "boolean"}, "version": TEXT}, required=("live",)),
    "Ready": json_object({"ready": {"type": "boolean"}, "reasons": TEXTS}, required=("ready",)),
    "Ping": json_object(
        {"status": {"type": "string", "enum": ["Healthy", "Unhealthy"]}}, required=("status",)
    ),
    "Model": json_object(
        {
            "name": TEXT,
            "version": TEXT,
            "default": {"type": "boolean"},
            "status": {"type": "string", "enum": ["ready", "loading", "refused"]},
            "reason": TEXT,
            "workers": json_object({"ready": COUNT, "all": COUNT}),
            "waiting": COUNT,
            "running": COUNT,
            "canary_share": {"type": "number"},
            "shadow_share": {"type": "number"},
            "modality": TEXT,
            "parts": TEXTS,
            "classes": TEXTS,
            "box_type_3d": {"type": ["string", "null"]},
            "load_dim": {"type": ["integer", "null"]},
        },
        required=("status",),
        description="One version of a model, or an archive that was refused",
    ),
    "Models": json_list(ref("Model")),
    "ServerMetadata": json_object(
        {"name": TEXT, "version": TEXT, "extensions": TEXTS}, required=("name", "version", "extensions")
    ),
    "ModelReady": json_object({"name": TEXT, "ready": {"type": "boolean"}}, required=("name", "ready")),
    "ModelMetadata": json_object(
        {
            "name": TEXT,
            "versions": TEXTS,
            "platform": TEXT,
            "inputs": json_list(_TENSOR),
            "outputs": json_list(_TENSOR),
        },
        required=("name", "versions", "platform", "inputs", "outputs"),
    ),
    "ModelConfig": json_object(
        {
            "name": TEXT,
            "platform": TEXT,
            "backend": TEXT,
            "max_batch_size": COUNT,
            "input": json_list(_CONFIG_TENSOR),
            "output": json_list(_CONFIG_TENSOR),
            "instance_group": json_list({"type": "object"}),
        },
        required=("name", "platform", "backend", "max_batch_size", "input", "output"),
        description="As Triton's model configuration extension has it",
    ),
    "Statistics": json_object(
        {
            "model_stats": json_list(
                json_object(
                    {
                        "name": TEXT,
                        "version": TEXT,
                        "last_inference": {**COUNT, "description": "milliseconds since the epoch"},
                        "inference_count": {**COUNT, "description": "frames"},
                        "execution_count": {**COUNT, "description": "batches"},
                        "inference_stats": json_object(
                            {"success": _DURATION, "fail": _DURATION, "queue": _DURATION, **_STAGES},
                            required=("success", "fail", "queue"),
                        ),
                        "batch_stats": json_list(json_object({"batch_size": COUNT, **_STAGES})),
                    },
                    required=("name", "version", "inference_count", "execution_count", "inference_stats"),
                )
            )
        },
        required=("model_stats",),
    ),
    "Index": json_list(
        json_object(
            {
                "name": TEXT,
                "version": TEXT,
                "state": {"type": "string", "enum": ["READY", "LOADING", "UNAVAILABLE"]},
                "reason": TEXT,
            },
            required=("name", "state"),
        )
    ),
}
