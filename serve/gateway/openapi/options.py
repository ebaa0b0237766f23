"""Options in the OpenAPI document: of a frame, of a request, of its sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.gateway.openapi.schema import TEXT, TEXTS, Schema
from serve.protocol.selection import FIELDS
from serve.protocol.sweeps import ACCUMULATED

__all__ = [
    "FRAME_OPTIONS",
    "INFER_PARAMETERS",
    "JSON_OPTIONS",
    "JSON_OPTIONS_WITHOUT_SWEEPS",
    "QUERY_PARAMETERS",
]

_THRESHOLD = r"[^=,\[{]+=(0?\.[0-9]+|0|1)"
_FIELD = "|".join(FIELDS)
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
        {"type": "string", "pattern": rf"^{_THRESHOLD}(,{_THRESHOLD})*$|^\{{.+\}}$"},
        "Pedestrian=0.2",
    ),
    "fields": (
        "Fields of the answer, with commas between them, or a JSON list; the others are left out",
        {"type": "string", "pattern": rf"^({_FIELD})(,({_FIELD}))*$|^\[.+\]$"},
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


def _in_query(options: Mapping[str, tuple[str, Schema, Any]]) -> list[Schema]:
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"{description}. Also a header, X-{name.replace('_', '-').title()}.",
            "schema": schema,
            "example": example,
        }
        for name, (description, schema, example) in options.items()
    ]


#: Of ``/predictions``.
QUERY_PARAMETERS = _in_query({**FRAME_OPTIONS, **_REQUEST_OPTIONS, **_TRACK_OPTIONS})
#: Of ``infer``, which has ``outputs`` in place of ``fields``.
INFER_PARAMETERS = [
    each
    for each in _in_query({**FRAME_OPTIONS, **_REQUEST_OPTIONS})
    if each["name"] not in ("fields", "camera")
]
JSON_OPTIONS = {
    **{name: schema for name, (_, schema, _) in FRAME_OPTIONS.items()},
    "classes": {"oneOf": [TEXT, {**TEXTS, "minItems": 1}]},
    "class_thr": {"oneOf": [TEXT, {"type": "object", "additionalProperties": {"type": "number"}}]},
    "fields": {"oneOf": [TEXT, {**TEXTS, "minItems": 1}]},
}
JSON_OPTIONS_WITHOUT_SWEEPS = {name: value for name, value in JSON_OPTIONS.items() if name != "sweeps"}
