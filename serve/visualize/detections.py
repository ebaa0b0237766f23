"""Pictures of detections: a cloud from above with its boxes, an image with its boxes and masks.

Takes detections as they travel on the wire (see `serve.compare.detections`) and NumPy arrays; gives BGR uint8 arrays,
which `encode_png` encodes. Lines and points are drawn at twice the size and averaged down, text at full size
with the font that ships with Pillow, so that pictures look the same on every machine.

Knows nothing about models, servers, files or torch. Detections whose boxes are in camera coordinates cannot
be drawn from above.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.protocol.batch import Body
from serve.protocol.frames import FrameOptions, FrameSpec, Limits, decode_frame
from serve.visualize import overlays
from serve.visualize.canvas import (
    Area,
    BgrImage,
    Colour,
    Text,
    class_colour,
    draw_line,
    draw_panel,
    draw_polygon,
    draw_texts,
    place_label,
    text_size,
)

__all__ = ["draw_birds_eye_view", "draw_frame", "draw_image", "encode_png"]

_Floats = NDArray[np.float64]

_OVERSAMPLING = 2
_BACKGROUND: Colour = (20, 14, 10)
_GRID: Colour = (44, 34, 26)
_AXIS: Colour = (80, 64, 52)
_FAINT: Colour = (158, 140, 124)
_BRIGHT: Colour = (246, 240, 234)
#: Steel blues from ground to roof, so that the warm colours of the boxes stand out (BGR).
_HEIGHT_RAMP = np.array(
    [(122, 88, 60), (150, 112, 78), (184, 146, 104), (212, 182, 142), (234, 218, 192), (252, 248, 240)],
    np.float64,
)


class _View(NamedTuple):
    """Metres (x forward, y left) → pixels of the oversampled canvas: forward is up, left is left."""

    x_m: float
    y_m: float
    scale: float
    width: int
    height: int

    def pixels(self, xy: _Floats) -> _Floats:
        """(..., 2) metres → (..., 2) column, row."""
        column = self.width / 2 - (xy[..., 1] - self.y_m) * self.scale
        row = self.height / 2 - (xy[..., 0] - self.x_m) * self.scale
        return np.stack([column, row], -1)

    def range_m(self) -> Area:
        """What is visible: least x, least y, greatest x, greatest y."""
        x, y = self.height / 2 / self.scale, self.width / 2 / self.scale
        return self.x_m - x, self.y_m - y, self.x_m + x, self.y_m + y


def draw_birds_eye_view(
    points: NDArray[Any],
    detections: Mapping[str, Any],
    *,
    size: tuple[int, int] = (1200, 900),
    title: str = "",
    score_thr: float = 0.0,
    extent_m: tuple[float, float, float, float] | None = None,
) -> BgrImage:
    """Draw a cloud from above with its 3D detections: forward is up, left is left.

    Args:
        points: (N, >=3) x, y, z in metres, in the frame of the boxes; rows with NaN are left out.
        detections: a 3D detection dictionary; ``box_type_3d`` LiDAR (x forward, y left) or Depth (x right,
            y forward). Velocities, where boxes have them, are drawn as arrows one second long.
        size: width and height of the picture in pixels.
        title: first line of the caption, for example the file name.
        score_thr: detections that score less are not drawn.
        extent_m: x_min, y_min, x_max, y_max that must be visible; all boxes and nearly all points if None.

    Returns:
        (height, width, 3) uint8, BGR.

    Raises:
        ValueError: no 3D detections, boxes in camera coordinates, or points that are not (N, >=3).
    """
    cloud = np.asarray(points, np.float64)
    if cloud.ndim != 2 or cloud.shape[1] < 3:
        raise ValueError(f"points must be (N, >=3), not {cloud.shape}")
    boxes, scores, labels, names = _arrays(detections, "_3d", 7, score_thr)
    cloud = cloud[np.isfinite(cloud[:, :3]).all(1), :3]
    kind = detections.get("box_type_3d", "LiDAR")
    if kind == "Depth":
        cloud, boxes = cloud[:, [1, 0, 2]] * (1, -1, 1), _depth_to_lidar(boxes)
    elif kind != "LiDAR":
        raise ValueError(f"boxes of type {kind} cannot be drawn from above; LiDAR and Depth can")

    width, height = (side * _OVERSAMPLING for side in size)
    corners = np.stack([_corners(box) for box in boxes]) if len(boxes) else np.empty((0, 4, 2))
    view = _fit(cloud, corners, extent_m, width, height)
    canvas = np.full((height, width, 3), _BACKGROUND, np.uint8)
    texts = _draw_grid(canvas, view)
    heights = _draw_points(canvas, view, cloud)
    _draw_ego(canvas, view)
    order = np.argsort(scores, kind="stable")
    for k in order:
        _draw_box(canvas, view, boxes[k], corners[k], class_colour(labels[k]))
    picture: BgrImage = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA).astype(np.uint8)

    shown = f"{len(cloud):,} points, {len(boxes)} detection{'' if len(boxes) == 1 else 's'}"
    if score_thr > 0:
        shown += f" at score >= {score_thr:g}"
    taken = _caption(picture, texts, title, shown)
    taken += _legend(picture, texts, labels, names)
    taken += _height_bar(picture, texts, heights)
    chips = []
    outlines = view.pixels(corners) / _OVERSAMPLING
    ego = view.pixels(np.zeros((1, 2))) / _OVERSAMPLING
    spare = [(*one.min(0), *one.max(0)) for one in (*outlines, ego)]
    for k in order[::-1]:
        words = f"{names[k]} {scores[k]:.2f}"
        if (at := place_label(outlines[k], words, size, taken, spare=spare)) is not None:
            chips.append(Text(at, words, 13, class_colour(labels[k]), chip=True))
    draw_texts(picture, [*texts, *chips])
    return picture


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
        title: written in the lower left corner.
        score_thr: detections that score less are not drawn.

    Returns:
        (H, W, 3) uint8, BGR.

    Raises:
        ValueError: no 2D detections, or masks that are not COCO RLE of the image's size.
    """
    picture: BgrImage = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image.copy()
    height, width = picture.shape[:2]
    boxes, scores, labels, names = _arrays(detections, "", 4, score_thr)
    kept = [k for k, score in enumerate(detections["scores"]) if score >= score_thr]
    masks: Sequence[Mapping[str, Any]] = detections.get("masks") or ()
    unit = max(1.0, min(width, height) / 720)  # pen width and type grow with the image
    order = np.argsort(scores, kind="stable")
    for k in order if masks else ():
        mask = _decode(masks[kept[k]], height, width)
        colour = np.array(class_colour(labels[k]), np.float64)
        picture[mask] = (picture[mask] * 0.55 + colour * 0.45).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, class_colour(labels[k]), round(unit), cv2.LINE_AA)
    for k in order:
        corner = [(round(float(x)), round(float(y))) for x, y in boxes[k, :4].reshape(2, 2)]
        cv2.rectangle(picture, corner[0], corner[1], (0, 0, 0), round(4 * unit), cv2.LINE_AA)
        cv2.rectangle(picture, corner[0], corner[1], class_colour(labels[k]), round(2 * unit), cv2.LINE_AA)
    texts: list[Text] = []
    taken: list[Area] = []
    type_size = round(14 * unit)
    for k in order[::-1]:
        x1, y1, x2, y2 = boxes[k, :4]
        outline = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
        words = f"{names[k]} {scores[k]:.2f}"
        if (at := place_label(outline, words, (width, height), taken, type_size, tight=True)) is not None:
            texts.append(Text(at, words, type_size, class_colour(labels[k]), chip=True))
    if title:
        texts.append(Text((10 * unit, height - 28 * unit), title, type_size, _BRIGHT, chip=True))
    draw_texts(picture, texts)
    return picture


def draw_frame(
    body: Body,
    detections: Mapping[str, Any],
    *,
    load_dim: int = 4,
    size: tuple[int, int] = (1200, 900),
    title: str = "",
    score_thr: float = 0.0,
) -> BgrImage:
    """Draw what a frame's bytes hold: a cloud from above or an image, as the answer is of one or the other.

    Args:
        body: the bytes of a ``.bin``, ``.npy`` or image file; of each part by name where there are several. Boxes
            in camera coordinates, and those of a frame without a cloud, are drawn into its image.
        detections: an answer: detections, labels of points or segments of an image.
        load_dim: floats per point of a cloud.
        size: width and height of the picture of a cloud; an image keeps its own.
        title: see the two functions.
        score_thr: detections that score less are not drawn.

    Raises:
        UndecodableFrame: the bytes are no frame of that kind.
        ValueError: the detections cannot be drawn.
    """
    cloud = "bboxes_3d" in detections or "pts_semantic_mask" in detections
    if isinstance(body, Mapping):
        cloud = cloud and "points" in body
        if "bboxes_3d" in detections and not cloud:
            return overlays.draw_projected(body, detections, title=title, score_thr=score_thr)
        body = body["points" if cloud else "image"]
    spec = FrameSpec("lidar" if cloud else "image", load_dim=load_dim)
    # Declared: the server has taken this frame already; an empty .bin is an empty cloud here.
    options = FrameOptions(num_points=0 if not body else None, load_dim=load_dim) if cloud else FrameOptions()
    data: Any = decode_frame(body, spec, options, Limits()).data
    if "pts_semantic_mask" in detections:
        return overlays.draw_point_labels(data, detections, size=size, title=title)
    if "panoptic_seg" in detections:
        return overlays.draw_segments(data, detections, title=title)
    if cloud:
        return draw_birds_eye_view(data, detections, size=size, title=title, score_thr=score_thr)
    return draw_image(data, detections, title=title, score_thr=score_thr)


def encode_png(picture: BgrImage) -> bytes:
    """Encode a BGR picture as PNG."""
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def _arrays(
    detections: Mapping[str, Any], suffix: str, columns: int, score_thr: float
) -> tuple[_Floats, _Floats, NDArray[np.int64], list[str]]:
    """Boxes, scores, labels and names of what scores enough."""
    if f"bboxes{suffix}" not in detections:
        raise ValueError(f"these are no {'3D' if suffix else '2D'} detections: bboxes{suffix} is missing")
    scores = np.asarray(detections[f"scores{suffix}"], np.float64)
    boxes = np.asarray(detections[f"bboxes{suffix}"], np.float64).reshape(
        len(scores), -1 if len(scores) else columns
    )
    labels = np.asarray(detections[f"labels{suffix}"], np.int64)
    names = detections.get("names") or [f"class {label}" for label in labels]
    if boxes.shape[1] < columns or not len(boxes) == len(labels) == len(names):
        raise ValueError("boxes, scores, labels and names do not fit together")
    keep = np.flatnonzero((scores >= score_thr) & np.isfinite(boxes).all(1))
    return boxes[keep], scores[keep], labels[keep], [str(names[k]) for k in keep]


def _depth_to_lidar(boxes: _Floats) -> _Floats:
    """From x right, y forward to x forward, y left: a quarter turn to the right about z."""
    turned = boxes.copy()
    turned[:, 0], turned[:, 1], turned[:, 6] = boxes[:, 1], -boxes[:, 0], boxes[:, 6] - np.pi / 2
    if boxes.shape[1] >= 9:
        turned[:, 7], turned[:, 8] = boxes[:, 8], -boxes[:, 7]
    return turned


def _corners(box: _Floats) -> _Floats:
    """(4, 2) x, y in metres: front left, front right, rear right, rear left."""
    ahead = np.array([np.cos(box[6]), np.sin(box[6])]) * box[3] / 2
    left = np.array([-np.sin(box[6]), np.cos(box[6])]) * box[4] / 2
    return np.asarray(box[:2] + np.stack([ahead + left, ahead - left, -ahead - left, -ahead + left]))


def _fit(
    cloud: _Floats, corners: _Floats, extent_m: Sequence[float] | None, width: int, height: int
) -> _View:
    """The view that shows ``extent_m``, or else the sensor, every box and nearly every point."""
    if extent_m is None:
        seen = [np.zeros((1, 2)), corners.reshape(-1, 2)]
        if len(cloud):
            seen.append(np.quantile(cloud[:, :2], [0.01, 0.99], axis=0))
        both = np.concatenate(seen)
        low, high = both.min(0) - 2.5, both.max(0) + 2.5
    else:
        low, high = np.array(extent_m[:2], np.float64), np.array(extent_m[2:], np.float64)
    span = np.clip(high - low, 30.0, 400.0)
    middle = (low + high) / 2
    scale = min(height / span[0], width / span[1])
    return _View(float(middle[0]), float(middle[1]), float(scale), width, height)


def _draw_grid(canvas: BgrImage, view: _View) -> list[Text]:
    """Lines every 10 m (more where they would crowd), labelled along the left and lower edges."""
    step = next(s for s in (10, 20, 50, 100) if s * view.scale >= 60 * _OVERSAMPLING or s == 100)
    x_min, y_min, x_max, y_max = view.range_m()
    texts = []
    for x in range(int(np.ceil(x_min / step)) * step, int(x_max) + 1, step):
        row = view.pixels(np.array([x, 0.0]))[1]
        draw_line(canvas, [(0, row), (view.width, row)], _AXIS if x == 0 else _GRID, _OVERSAMPLING)
        if 70 < row / _OVERSAMPLING < view.height / _OVERSAMPLING - 40:
            texts.append(Text((8, row / _OVERSAMPLING - 21), f"{x} m", 12, _FAINT, chip=True))
    for y in range(int(np.ceil(y_min / step)) * step, int(y_max) + 1, step):
        column = view.pixels(np.array([0.0, y]))[0]
        draw_line(canvas, [(column, 0), (column, view.height)], _AXIS if y == 0 else _GRID, _OVERSAMPLING)
        if 60 < column / _OVERSAMPLING < view.width / _OVERSAMPLING - 260:
            side = "" if y == 0 else " left" if y > 0 else " right"
            at = (column / _OVERSAMPLING + 2, view.height / _OVERSAMPLING - 24)
            texts.append(Text(at, f"{abs(y)} m{side}", 12, _FAINT, chip=True))
    return texts


def _draw_points(canvas: BgrImage, view: _View, cloud: _Floats) -> tuple[float, float]:
    """Points as small squares shaded by height, the highest on top; the heights of both ends of the ramp."""
    if not len(cloud):
        return -2.0, 2.0
    low, high = np.quantile(cloud[:, 2], [0.02, 0.98])
    high = max(high, low + 1.0)
    place = np.floor(view.pixels(cloud[:, :2])).astype(np.int64)
    inside = ((place >= 1) & (place < (view.width - 2, view.height - 2))).all(1)
    order = np.flatnonzero(inside)[np.argsort(cloud[inside, 2], kind="stable")]
    level = np.clip((cloud[order, 2] - low) / (high - low), 0, 1) * (len(_HEIGHT_RAMP) - 1)
    stops = np.arange(len(_HEIGHT_RAMP))
    colours = np.stack([np.interp(level, stops, _HEIGHT_RAMP[:, k]) for k in range(3)], 1).astype(np.uint8)
    column, row = place[order].T
    reach = 4 if len(cloud) < 30_000 else 3 if len(cloud) < 150_000 else 2
    for right in range(reach):
        for down in range(reach):
            canvas[row + down - 1, column + right - 1] = colours
    return float(low), float(high)


def _draw_ego(canvas: BgrImage, view: _View) -> None:
    """A small arrow head where the sensor stands, pointing forward."""
    origin = view.pixels(np.zeros(2))
    shape = np.array([(0, -11), (8, 9), (0, 4), (-8, 9)]) * _OVERSAMPLING
    draw_polygon(canvas, origin + shape, _BRIGHT, fill=True)


def _draw_box(canvas: BgrImage, view: _View, box: _Floats, corners: _Floats, colour: Colour) -> None:
    outline = view.pixels(corners)
    low = np.maximum(np.floor(outline.min(0)).astype(int) - 4, 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + 5, (view.width, view.height))
    if (low < high).all():  # a translucent floor, blended where the box is
        part = canvas[low[1] : high[1], low[0] : high[0]]
        floor = part.copy()
        draw_polygon(floor, outline - low, colour, fill=True)
        part[:] = cv2.addWeighted(floor, 0.22, part, 0.78, 0)
    thick = 2 * _OVERSAMPLING
    draw_polygon(canvas, outline, (0, 0, 0), thick + 2 * _OVERSAMPLING)
    draw_polygon(canvas, outline, colour, thick)
    # Heading: from the middle through the front side, a little beyond it.
    centre, front = outline.mean(0), outline[:2].mean(0)
    length = float(np.hypot(*(front - centre))) or 1.0
    tip = front + (front - centre) / length * 7 * _OVERSAMPLING
    draw_line(canvas, [centre, tip], colour, thick)
    if len(box) >= 9 and float(np.hypot(*box[7:9])) > 0.2:
        end = view.pixels(box[:2] + box[7:9])
        tail, head = (tuple(int(v) for v in p) for p in (centre, end))
        cv2.arrowedLine(canvas, tail, head, _BRIGHT, _OVERSAMPLING, cv2.LINE_AA, tipLength=0.15)


def _caption(picture: BgrImage, texts: list[Text], title: str, shown: str) -> list[Area]:
    lines = [(title, 19, _BRIGHT), (shown, 14, _FAINT)] if title else [(shown, 14, _BRIGHT)]
    width = max(text_size(words, size)[0] for words, size, _ in lines)
    area = (12.0, 12.0, 12 + width + 24, 12 + sum(size + 8 for _, size, _ in lines) + 14.0)
    draw_panel(picture, area)
    top = 20.0
    for words, size, colour in lines:
        texts.append(Text((24, top), words, size, colour))
        top += size + 8
    return [area]


def _legend(
    picture: BgrImage, texts: list[Text], labels: NDArray[np.int64], names: Sequence[str]
) -> list[Area]:
    """Colour, name and count of every class that is drawn, upper right."""
    counted = Counter(zip(labels.tolist(), names, strict=True))
    if not counted:
        return []
    rows = [(label, f"{name}", str(count)) for (label, name), count in sorted(counted.items())][:12]
    name_width = max(text_size(name, 14)[0] for _, name, _ in rows)
    count_width = max(text_size(count, 14)[0] for *_, count in rows)
    right = picture.shape[1] - 12.0
    left = right - (12 + 14 + 10 + name_width + 18 + count_width + 12)
    area = (left, 12.0, right, 12 + 12 + 22.0 * len(rows) + 6)
    draw_panel(picture, area)
    for k, (label, name, count) in enumerate(rows):
        top = 22 + 22 * k
        at = (int(left) + 12, top + 2), (int(left) + 26, top + 14)
        cv2.rectangle(picture, at[0], at[1], class_colour(label), -1, cv2.LINE_AA)
        texts.append(Text((left + 36, top), name, 14, _BRIGHT))
        texts.append(Text((right - 12 - text_size(count, 14)[0], top), count, 14, _FAINT))
    return [area]


def _height_bar(picture: BgrImage, texts: list[Text], heights: tuple[float, float]) -> list[Area]:
    """The ramp of the points with the heights of its ends, lower right."""
    height, width = picture.shape[:2]
    if width < 480 or height < 240:
        return []
    area = (width - 222.0, height - 42.0, width - 12.0, height - 12.0)
    draw_panel(picture, area)
    low, high = (f"{value:+.1f} m" for value in heights)
    stops = np.linspace(0, len(_HEIGHT_RAMP) - 1, 78)
    ramp = np.stack([np.interp(stops, np.arange(len(_HEIGHT_RAMP)), _HEIGHT_RAMP[:, k]) for k in range(3)], 1)
    left = int(area[0]) + 66
    picture[height - 31 : height - 22, left : left + len(ramp)] = ramp.astype(np.uint8)
    texts.append(Text((left - 8 - text_size(low, 12)[0], height - 34), low, 12, _FAINT))
    texts.append(Text((left + len(ramp) + 8, height - 34), high, 12, _FAINT))
    return [area]


def _decode(mask: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """COCO RLE → (H, W) bool."""
    from pycocotools import mask as coco

    try:
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"a mask is {mask['size']}, the image [{height}, {width}]")
        with warnings.catch_warnings():  # pycocotools 2.0.11 wraps its result the way numpy 2 deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.asarray(coco.decode(mask), bool)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a mask is not COCO RLE: {error}") from error
