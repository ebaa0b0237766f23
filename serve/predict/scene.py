"""A frame and its predictions as shapes in space and in the image, for viewers of recordings.

Boxes come out as centre, size and turn, whatever the coordinates of the model: LiDAR and Depth with z up, Camera with
y down. Colours are those of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.predict.frames import Prediction, encode_pixels
from serve.protocol.batch import Body
from serve.visualize.canvas import class_colour
from serve.visualize.detections import decode_points

__all__ = ["Boxes2D", "Boxes3D", "Shapes", "shapes_of"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes3D:
    """Boxes in space.

    Attributes:
        centres: (N, 3) metres.
        sizes: (N, 3) along the box's own axes, metres.
        quaternions: (N, 4) x, y, z, w.
        titles: class, id of the track and score.
        names: class.
        ids: id of the track, -1 without one.
        colours: (N, 3) RGB.
    """

    centres: Floats
    sizes: Floats
    quaternions: Floats
    titles: list[str]
    names: list[str]
    ids: list[int]
    colours: NDArray[np.uint8]


@dataclass(frozen=True)
class Boxes2D:
    """Boxes in the image.

    Attributes:
        corners: (N, 4) x1, y1, x2, y2, pixels.
        titles: class, id of the track and score.
        colours: (N, 3) RGB.
    """

    corners: Floats
    titles: list[str]
    colours: NDArray[np.uint8]


@dataclass(frozen=True)
class Shapes:
    """What there is to see of a frame.

    Attributes:
        frame_id: coordinates of points and boxes: ``lidar``, ``depth`` or ``camera``.
        points: (N, C >= 3) float32 metres; None without a cloud.
        image: bytes of an image file, JPEG, PNG or BMP; None without one.
        boxes_3d: boxes in space; None if the model gives none.
        boxes_2d: boxes in the image; None if the model gives none.
    """

    frame_id: str
    points: NDArray[np.float32] | None
    image: bytes | None
    boxes_3d: Boxes3D | None
    boxes_2d: Boxes2D | None


def shapes_of(
    prediction: Prediction, *, load_dim: int | None, columns: str | None = None, score_thr: float
) -> Shapes:
    """Read a prediction.

    Args:
        prediction: with an answer, and with the bytes of its frame if it is not of a video.
        load_dim: float32 numbers per point of a ``.bin``.
        columns: option of the frames; None without one.
        score_thr: lowest score.

    Raises:
        UndecodableFrame: the frame cannot be decoded.
    """
    answer = prediction.answer or {}
    frame = prediction.frame
    body: Body = prediction.body if prediction.body is not None else frame.read()
    in_space = "bboxes_3d" in answer or "pts_semantic_mask" in answer
    kind = str(answer.get("box_type_3d", "LiDAR" if in_space else "Camera"))
    parts: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    if not parts:
        parts = {"points" if in_space and kind != "Camera" else "image": body}
    points = None
    if "points" in parts:
        points = decode_points(parts["points"], load_dim or 4, columns)
    image = next((bytes(part) for name, part in parts.items() if name.startswith("image")), None)
    if frame.pixels is not None:
        image = encode_pixels(frame.pixels(), small=True)
    return Shapes(
        kind.lower(),
        points,
        image,
        _boxes_3d(answer, kind, score_thr) if "bboxes_3d" in answer else None,
        _boxes_2d(answer, score_thr) if "bboxes" in answer else None,
    )


def _boxes_3d(answer: Mapping[str, Any], kind: str, score_thr: float) -> Boxes3D:
    rows = np.array(answer["bboxes_3d"], np.float64)
    rows = rows.reshape(len(answer["bboxes_3d"]), -1) if rows.size else np.empty((0, 7))
    kept = _kept(answer["scores_3d"], rows, score_thr)
    boxes = rows[kept]
    if boxes.shape[1] == 6:
        boxes = np.column_stack([boxes, np.zeros(len(boxes))])
    half = boxes[:, 6] / 2
    still, sine, cosine = np.zeros(len(boxes)), np.sin(half), np.cos(half)
    up, upright = (1, -0.5) if kind == "Camera" else (2, 0.5)
    centres = boxes[:, :3].copy()
    centres[:, up] += upright * boxes[:, 3 + up]  # the origin is the bottom
    turns = [still, sine, still, cosine] if kind == "Camera" else [still, still, sine, cosine]
    names, ids, titles, colours = _texts(answer, "_3d", kept)
    return Boxes3D(centres, boxes[:, 3:6], np.stack(turns, 1), titles, names, ids, colours)


def _boxes_2d(answer: Mapping[str, Any], score_thr: float) -> Boxes2D:
    rows = np.array(answer["bboxes"], np.float64)
    rows = rows.reshape(len(answer["bboxes"]), -1)[:, :4] if rows.size else np.empty((0, 4))
    kept = _kept(answer["scores"], rows, score_thr)
    _, _, titles, colours = _texts(answer, "", kept)
    return Boxes2D(rows[kept], titles, colours)


def _kept(scores: Any, rows: Floats, score_thr: float) -> NDArray[np.int64]:
    return np.flatnonzero((np.asarray(scores, np.float64) >= score_thr) & np.isfinite(rows).all(1))


def _texts(
    answer: Mapping[str, Any], suffix: str, kept: NDArray[np.int64]
) -> tuple[list[str], list[int], list[str], NDArray[np.uint8]]:
    names = [str(answer["names"][k]) for k in kept]
    given = answer.get("track_ids") or [-1] * len(answer["names"])
    ids = [int(given[k]) for k in kept]
    scores = [float(answer[f"scores{suffix}"][k]) for k in kept]
    titles = [
        f"{name} {track} {score:.2f}" if track > 0 else f"{name} {score:.2f}"
        for name, track, score in zip(names, ids, scores, strict=True)
    ]
    colours = [class_colour(int(answer[f"labels{suffix}"][k]))[::-1] for k in kept]
    return names, ids, titles, np.array(colours, np.uint8).reshape(-1, 3)
