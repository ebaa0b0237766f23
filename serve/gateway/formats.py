"""Answers in the formats of `serve.formats`, by the media types that `Accept` names.

`COCO` and `TABLE` hold several frames, by their position in the request; `KITTI` holds one, because a label file does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from serve.errors import BadRequest, ServeError
from serve.formats.coco import CocoIds, results_of
from serve.formats.kitti import Camera, camera_of, format_labels
from serve.formats.table import write_table
from serve.protocol.batch import Body
from serve.protocol.calibration import parse_calibration
from serve.protocol.image_size import image_size

__all__ = ["COCO", "KITTI", "TABLE", "FormatMedia", "find_camera", "format_answers"]

FormatMedia = Literal["text/x-kitti", "application/vnd.coco+json", "text/csv"]
KITTI: FormatMedia = "text/x-kitti"
COCO: FormatMedia = "application/vnd.coco+json"
TABLE: FormatMedia = "text/csv"


def format_answers(
    answers: Sequence[Mapping[str, Any]], media: FormatMedia, camera: Camera | None = None
) -> bytes:
    """Write answers in a format.

    Args:
        answers: one answer per frame, in order.
        media: the format.
        camera: of the frame, for KITTI's labels of boxes in 3D.

    Raises:
        BadRequest: the format cannot hold these answers.
    """
    if media == COCO:
        lines = ({"frame": str(i), "answer": answer} for i, answer in enumerate(answers))
        return orjson.dumps(list(results_of(lines, CocoIds())))
    if media == TABLE:
        with io.StringIO(newline="") as text:
            write_table(text, ((str(i), answer) for i, answer in enumerate(answers)))
            return text.getvalue().encode()
    if len(answers) != 1:
        raise BadRequest("a KITTI label file holds one frame; send one, or accept text/csv")
    return format_labels(answers[0], camera).encode()


def find_camera(body: Body, answer: Mapping[str, Any], given: Camera | None) -> Camera | None:
    """Return the camera of a frame for KITTI's labels; None if the labels need none.

    Args:
        body: the frame.
        answer: its answer.
        given: the camera that the request names, which goes first.

    Raises:
        BadRequest: it is not known; the message says how to name it.
    """
    if "bboxes_3d" not in answer or given is not None:
        return given
    needed = ("cam2img", "lidar2cam") if answer.get("box_type_3d") == "LiDAR" else ("cam2img",)
    parts = body if isinstance(body, Mapping) else {}
    if "calibration" not in parts or "image" not in parts:
        raise BadRequest(
            "KITTI's labels of boxes in 3D need the camera, and this frame has none; send it as the header X-Camera: "
            '{"cam2img": [[…]], "lidar2cam": [[…]], "image_size": [width, height]}'
        )
    try:
        return camera_of(parse_calibration(parts["calibration"], needed), image_size(parts["image"]))
    except ServeError as error:
        raise BadRequest(f"the calibration does not do for KITTI's labels: {error}") from None
