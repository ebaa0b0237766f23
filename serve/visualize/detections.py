"""Draw the predictions of a frame: a point cloud from above or an image, with boxes, masks or labels.

`draw_frame` chooses among `serve.visualize.birds_eye`, `serve.visualize.overlays` and `draw_image`. All return BGR
uint8 arrays, which `encode_png` encodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.protocol.batch import Body
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits
from serve.visualize import overlays
from serve.visualize.birds_eye import draw_birds_eye_view, read_detections
from serve.visualize.canvas import Area, BgrImage, Colour, Text, class_colour, draw_texts, place_label

__all__ = ["draw_frame", "draw_image", "encode_png"]

_BRIGHT: Colour = (246, 240, 234)


def draw_frame(
    body: Body,
    detections: Mapping[str, Any],
    *,
    load_dim: int = 4,
    columns: str | None = None,
    size: tuple[int, int] = (1200, 900),
    title: str = "",
    score_thr: float = 0.0,
) -> BgrImage:
    """Draw predictions into their frame: a point cloud from above, or its image.

    Args:
        body: bytes of a ``.bin``, ``.npy`` or image file, or of each part by name. Boxes in camera coordinates, and
            those of a frame without a point cloud, are drawn into its image.
        detections: predictions: detections, labels of points or segments of an image.
        load_dim: floats per point of a point cloud.
        columns: the option of the frame; None without one.
        size: width and height of the drawing of a point cloud, pixels; an image keeps its own.
        title: caption.
        score_thr: lowest score of the drawn detections.

    Raises:
        UndecodableFrame: the bytes are not such a frame.
        ValueError: the predictions cannot be drawn.
    """
    cloud = "bboxes_3d" in detections or "pts_semantic_mask" in detections
    if isinstance(body, Mapping):
        cloud = cloud and "points" in body
        if "bboxes_3d" in detections and not cloud:
            return overlays.draw_projected(body, detections, title=title, score_thr=score_thr)
        body = body["points" if cloud else "image"]
    data: Any = (
        decode_points(body, load_dim, columns)
        if cloud
        else decode_frame(body, FrameSpec("image"), FrameOptions(), Limits()).data
    )
    if "pts_semantic_mask" in detections:
        return overlays.draw_point_labels(data, detections, size=size, title=title)
    if "panoptic_seg" in detections:
        return overlays.draw_segments(data, detections, title=title)
    if cloud:
        return draw_birds_eye_view(data, detections, size=size, title=title, score_thr=score_thr)
    return draw_image(data, detections, title=title, score_thr=score_thr)


def decode_points(body: Body, load_dim: int, columns: str | None = None) -> NDArray[np.float32]:
    """Decode a point cloud of which x, y and z are looked at, (N, load_dim): other columns that it lacks are 0.

    Args:
        body: its bytes; none at all for a cloud without points, as a server accepts it.
        load_dim: floats per point.
        columns: the option of the frame; None without one.

    Raises:
        UndecodableFrame: the bytes are no point cloud.
    """
    spec = FrameSpec("lidar", load_dim=load_dim, used_columns=(0, 1, 2))
    # A declared number of points makes an empty .bin an empty point cloud, as the server accepted it.
    declared = load_dim if columns is None else None
    options = FrameOptions(num_points=None if len(body) else 0, load_dim=declared, columns=columns)
    return np.asarray(decode_frame(body, spec, options, Limits()).data, np.float32)


def draw_image(
    image: BgrImage,
    detections: Mapping[str, Any],
    *,
    title: str = "",
    score_thr: float = 0.0,
) -> BgrImage:
    """Draw 2D detections into a copy of their image: translucent masks, boxes, names and scores.

    Args:
        image: (H, W, 3) uint8, BGR, or (H, W) grey.
        detections: a 2D detection dictionary; boxes in pixels of ``image``, ``masks`` COCO RLE of its size.
        title: caption in the lower left corner.
        score_thr: lowest score of the drawn detections.

    Returns:
        (H, W, 3) uint8, BGR.

    Raises:
        ValueError: no 2D detections, or masks that are not COCO RLE of the image's size.
    """
    drawn: BgrImage = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image.copy()
    height, width = drawn.shape[:2]
    boxes, scores, labels, _, titles = read_detections(detections, "", 4, score_thr)
    kept = [k for k, score in enumerate(detections["scores"]) if score >= score_thr]
    masks: Sequence[Mapping[str, Any]] = detections.get("masks") or ()
    unit = max(1.0, min(width, height) / 720)  # pen width and font size grow with the image
    order = np.argsort(scores, kind="stable")
    for k in order if masks else ():
        mask = _decode(masks[kept[k]], height, width)
        colour = np.array(class_colour(labels[k]), np.float64)
        drawn[mask] = (drawn[mask] * 0.55 + colour * 0.45).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, class_colour(labels[k]), round(unit), cv2.LINE_AA)
    for k in order:
        corner = [(round(float(x)), round(float(y))) for x, y in boxes[k, :4].reshape(2, 2)]
        cv2.rectangle(drawn, corner[0], corner[1], (0, 0, 0), round(4 * unit), cv2.LINE_AA)
        cv2.rectangle(drawn, corner[0], corner[1], class_colour(labels[k]), round(2 * unit), cv2.LINE_AA)
    texts: list[Text] = []
    taken: list[Area] = []
    type_size = round(14 * unit)
    for k in order[::-1]:
        x1, y1, x2, y2 = boxes[k, :4]
        outline = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
        words = f"{titles[k]} {scores[k]:.2f}"
        if (at := place_label(outline, words, (width, height), taken, type_size, tight=True)) is not None:
            texts.append(Text(at, words, type_size, class_colour(labels[k]), chip=True))
    if title:
        texts.append(Text((10 * unit, height - 28 * unit), title, type_size, _BRIGHT, chip=True))
    draw_texts(drawn, texts)
    return drawn


def encode_png(image: BgrImage) -> bytes:
    """Encode a BGR image as PNG."""
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def _decode(mask: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """Decode COCO RLE to (H, W) bool."""
    from pycocotools import mask as coco

    try:
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"a mask is {mask['size']}, the image [{height}, {width}]")
        with warnings.catch_warnings():  # numpy 2 deprecates how pycocotools 2.0.11 wraps its result
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.asarray(coco.decode(mask), bool)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a mask is not COCO RLE: {error}") from error
