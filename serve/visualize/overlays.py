"""Draw labels of points, segments of images, and 3D boxes projected into camera images.

Images are BGR uint8 arrays, as in `serve.visualize.detections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.compare.labels import decode_labels, decode_segments
from serve.protocol.batch import Bytes
from serve.protocol.calibration import parse_calibration
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits
from serve.visualize.canvas import Area, BgrImage, Text, class_colour, draw_line, draw_texts, place_label

__all__ = ["draw_point_labels", "draw_projected", "draw_segments"]

_GROUND = (20, 14, 10)
_BRIGHT = (246, 240, 234)
# Corners of a box in units of its size, and the edges between them; the first four look forward.
_CORNERS = np.array([(x, y, z) for x in (0.5, -0.5) for y in (-0.5, 0.5) for z in (0, 1)], np.float64)
_EDGES = [(i, j) for i in range(8) for j in range(i) if int(np.abs(_CORNERS[i] - _CORNERS[j]).sum()) == 1]
_NEAR_M = 0.1


def draw_point_labels(
    points: NDArray[Any], answer: Mapping[str, Any], *, size: tuple[int, int] = (1200, 900), title: str = ""
) -> BgrImage:
    """Draw a point cloud from above, each point in the colour of its class.

    Args:
        points: (N, >=3) x, y, z.
        answer: with ``pts_semantic_mask`` of N labels and ``classes``.
        size: width and height, pixels.
        title: first line of the caption.

    Raises:
        ValueError: not as many labels as points.
    """
    labels = decode_labels(answer["pts_semantic_mask"])
    if len(labels) != len(points):
        raise ValueError(f"{len(labels)} labels for {len(points)} points")
    width, height = size
    canvas: BgrImage = np.full((height, width, 3), _GROUND, np.uint8)
    if len(points):
        # x right and y up suits indoor scans, and shows the LiDAR frame turned by 90 degrees.
        xy = np.asarray(points[:, :2], np.float64)
        low, high = np.percentile(xy, 0.5, axis=0), np.percentile(xy, 99.5, axis=0)
        scale = 0.92 * min(width / max(high[0] - low[0], 1e-3), height / max(high[1] - low[1], 1e-3))
        pixels = (xy - (low + high) / 2) * (scale, -scale) + (width / 2, height / 2)
        order = np.argsort(points[:, 2], kind="stable")  # higher points cover lower ones
        column, row = np.floor(pixels[order]).astype(np.int64).T
        inside = (column >= 0) & (column < width - 1) & (row >= 0) & (row < height - 1)
        colours = np.array([class_colour(label) for label in range(12)], np.uint8)[labels[order] % 12]
        for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
            canvas[row[inside] + down, column[inside] + right] = colours[inside]
    counts = np.bincount(labels, minlength=len(answer["classes"]))
    named = [(label, str(name), int(counts[label])) for label, name in enumerate(answer["classes"])]
    _legend(canvas, title or f"{len(points):,} points", named)
    return canvas


def draw_segments(image: BgrImage, answer: Mapping[str, Any], *, title: str = "") -> BgrImage:
    """Draw panoptic segments over their image.

    Args:
        image: (H, W, 3) uint8, BGR, or (H, W) grey.
        answer: with ``panoptic_seg`` and ``segments_info``.
        title: written in the upper left corner.

    Raises:
        ValueError: the map and the image differ in size.
    """
    drawn: BgrImage = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image.copy()
    ids = decode_segments(answer)
    if ids.shape != drawn.shape[:2]:
        raise ValueError(f"a panoptic map of {ids.shape} over an image of {drawn.shape[:2]}")
    counts: dict[int, tuple[str, int]] = {}
    for segment in answer["segments_info"]:
        mask, label = ids == segment["id"], int(segment["category_id"])
        drawn[mask] = (drawn[mask] * 0.5 + np.array(class_colour(label)) * 0.5).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, class_colour(label), 1, cv2.LINE_AA)
        counts[label] = (str(segment["name"]), counts.get(label, ("", 0))[1] + 1)
    _legend(drawn, title, [(label, name, count) for label, (name, count) in sorted(counts.items())])
    return drawn


def draw_projected(
    parts: Mapping[str, Bytes], answer: Mapping[str, Any], *, title: str = "", score_thr: float = 0.0
) -> BgrImage:
    """Draw the images of a frame side by side, with its 3D boxes projected into them.

    Args:
        parts: the frame's bytes by part, with a calibration.
        answer: 3D detections; in camera coordinates ``cam2img`` projects them, else ``lidar2img`` (or
            ``cam2img`` and ``lidar2cam``) or ``depth2img``.
        title: written in the upper left corner.
        score_thr: boxes that score less are not drawn.

    Raises:
        UndecodableFrame: a part cannot be read, or the calibration lacks that matrix.
        ValueError: there is no image.
    """
    images = [name for name in parts if name.startswith("image")]
    if not images:
        raise ValueError("the frame has no image to draw into")
    kind = str(answer.get("box_type_3d", "LiDAR"))
    needed = {"Camera": "cam2img", "Depth": "depth2img"}.get(kind, "lidar2img")
    cameras = [name.partition(".")[2] for name in images if name != "image"]
    calibration: Any = parse_calibration(parts["calibration"], (needed,), cameras)
    drawn = []
    for name in images:
        frame = decode_frame(parts[name], FrameSpec("image"), FrameOptions(), Limits())
        matrices = calibration[name.partition(".")[2]] if cameras else calibration
        drawn.append(_with_boxes(np.asarray(frame.data), matrices[needed], answer, kind, score_thr))
    height = max(image.shape[0] for image in drawn)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0))) for p in drawn]
    whole: BgrImage = np.ascontiguousarray(np.concatenate(padded, axis=1))
    if title:
        draw_texts(whole, [Text((10, 10), title, 15, _BRIGHT, chip=True)])
    return whole


def _with_boxes(
    image: BgrImage, projection: NDArray[np.float64], answer: Mapping[str, Any], kind: str, score_thr: float
) -> BgrImage:
    drawn: BgrImage = image.copy()
    matrix = np.eye(4)
    matrix[: projection.shape[0], : projection.shape[1]] = projection
    shown = []
    for box, score, label, name in zip(
        answer["bboxes_3d"], answer["scores_3d"], answer["labels_3d"], answer["names"], strict=True
    ):
        if score < score_thr and score_thr > 0:
            continue
        corners = _corners(np.asarray(box, np.float64), kind)
        seen = np.hstack([corners, np.ones((8, 1))]) @ matrix.T
        if (seen[:, 2] < _NEAR_M).any():
            continue  # behind the camera, or reaching there
        pixels = seen[:, :2] / seen[:, 2:3]
        shown.append((float(seen[:, 2].mean()), pixels, f"{name} {score:.2f}", class_colour(label)))
    shown.sort(key=lambda one: one[0])
    for _, pixels, _, colour in reversed(shown):  # near boxes cover far ones
        for pen, widen in (((0, 0, 0), 2), (colour, 0)):
            for i, j in _EDGES:
                draw_line(drawn, pixels[[i, j]], pen, (2 if max(i, j) < 4 else 1) + widen)
    texts: list[Text] = []
    taken: list[Area] = []
    for _, pixels, words, colour in shown[:40]:
        if (at := place_label(pixels, words, drawn.shape[1::-1], taken, tight=True)) is not None:
            texts.append(Text(at, words, 13, colour, chip=True))
    draw_texts(drawn, texts)
    return drawn


def _corners(box: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """(8, 3) corners of a box of x, y, z of its bottom centre, sizes and yaw, in its own frame."""
    cosine, sine = np.cos(box[6]), np.sin(box[6])
    if kind == "Camera":  # x right, y down, z forward; turned about y; sizes along x, y, z
        local = _CORNERS * (box[3], box[5], box[4])
        x, z = local[:, 0] * cosine + local[:, 1] * sine, -local[:, 0] * sine + local[:, 1] * cosine
        return np.asarray(np.stack([x, -local[:, 2], z], 1) + box[:3])
    local = _CORNERS * box[3:6]
    x, y = local[:, 0] * cosine - local[:, 1] * sine, local[:, 0] * sine + local[:, 1] * cosine
    return np.asarray(np.stack([x, y, local[:, 2]], 1) + box[:3])


def _legend(image: BgrImage, title: str, rows: Sequence[tuple[int, str, int]]) -> None:
    shown = sorted((row for row in rows if row[2]), key=lambda row: -row[2])[:14]
    texts = [Text((12, 12), title, 17, _BRIGHT, chip=True)] if title else []
    texts += [
        Text((12, 42 + 24 * k), f"{name}  {count:,}", 14, class_colour(label), chip=True)
        for k, (label, name, count) in enumerate(shown)
    ]
    draw_texts(image, texts)
