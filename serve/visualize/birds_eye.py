"""Draw a point cloud from above with its 3D detections.

Takes detections as in a response (see `serve.compare.detections`) and NumPy arrays; returns BGR uint8 arrays. Lines and
points are drawn at twice the size and averaged down, text at full size with the font that ships with Pillow, so that
images look the same on every machine. Boxes in camera coordinates cannot be drawn from above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

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

__all__ = ["draw_birds_eye_view", "read_detections"]

Floats = NDArray[np.float64]

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
    """Map metres (x forward, y left) to pixels of the oversampled canvas: forward is up, left is left."""

    x_m: float
    y_m: float
    scale: float
    width: int
    height: int

    def pixels(self, xy: Floats) -> Floats:
        """Convert (..., 2) metres to (..., 2) column, row."""
        column = self.width / 2 - (xy[..., 1] - self.y_m) * self.scale
        row = self.height / 2 - (xy[..., 0] - self.x_m) * self.scale
        return np.stack([column, row], -1)

    def range_m(self) -> Area:
        """Compute the visible range: x_min, y_min, x_max, y_max."""
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
    """Draw a point cloud from above with its 3D detections: forward is up, left is left.

    Args:
        points: (N, >=3) x, y, z in metres, in the frame of the boxes; rows with NaN are skipped.
        detections: a 3D detection dictionary; ``box_type_3d`` LiDAR (x forward, y left) or Depth (x right,
            y forward). Velocities, if present, are drawn as arrows of one second.
        size: width and height of the image in pixels.
        title: first line of the caption, for example the file name.
        score_thr: lowest score of the drawn detections.
        extent_m: visible x_min, y_min, x_max, y_max; all boxes and nearly all points if None.

    Returns:
        (height, width, 3) uint8, BGR.

    Raises:
        ValueError: no 3D detections, boxes in camera coordinates, or points that are not (N, >=3).
    """
    cloud = np.asarray(points, np.float64)
    if cloud.ndim != 2 or cloud.shape[1] < 3:
        raise ValueError(f"points must be (N, >=3), not {cloud.shape}")
    boxes, scores, labels, names, titles = read_detections(detections, "_3d", 7, score_thr)
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
    image: BgrImage = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA).astype(np.uint8)

    shown = f"{len(cloud):,} points, {len(boxes)} detection{'' if len(boxes) == 1 else 's'}"
    if score_thr > 0:
        shown += f" at score >= {score_thr:g}"
    taken = _caption(image, texts, title, shown)
    taken += _legend(image, texts, labels, names)
    taken += _height_bar(image, texts, heights)
    chips = []
    outlines = view.pixels(corners) / _OVERSAMPLING
    ego = view.pixels(np.zeros((1, 2))) / _OVERSAMPLING
    spare = [(*one.min(0), *one.max(0)) for one in (*outlines, ego)]
    for k in order[::-1]:
        words = f"{titles[k]} {scores[k]:.2f}"
        if (at := place_label(outlines[k], words, size, taken, spare=spare)) is not None:
            chips.append(Text(at, words, 13, class_colour(labels[k]), chip=True))
    draw_texts(image, [*texts, *chips])
    return image


def read_detections(
    detections: Mapping[str, Any], suffix: str, columns: int, score_thr: float
) -> tuple[Floats, Floats, NDArray[np.int64], list[str], list[str]]:
    """Read the finite detections at or above the threshold.

    Returns:
        Boxes, scores, labels, names, and titles: the names with the id of the track, if there is one.
    """
    if f"bboxes{suffix}" not in detections:
        raise ValueError(f"not {'3D' if suffix else '2D'} detections: bboxes{suffix} is missing")
    scores = np.asarray(detections[f"scores{suffix}"], np.float64)
    boxes = np.asarray(detections[f"bboxes{suffix}"], np.float64).reshape(
        len(scores), -1 if len(scores) else columns
    )
    labels = np.asarray(detections[f"labels{suffix}"], np.int64)
    names = detections.get("names") or [f"class {label}" for label in labels]
    if boxes.shape[1] < columns or not len(boxes) == len(labels) == len(names):
        raise ValueError("boxes, scores, labels and names differ in length")
    keep = np.flatnonzero((scores >= score_thr) & np.isfinite(boxes).all(1))
    ids = detections.get("track_ids") or [-1] * len(names)
    if len(ids) != len(names):
        raise ValueError("boxes and track_ids differ in length")
    named = [str(names[k]) for k in keep]
    titles = [f"{name} {ids[k]}" if ids[k] > 0 else name for name, k in zip(named, keep, strict=True)]
    return boxes[keep], scores[keep], labels[keep], named, titles


def _depth_to_lidar(boxes: Floats) -> Floats:
    """Convert boxes from x right, y forward to x forward, y left: a quarter turn to the right about z."""
    turned = boxes.copy()
    turned[:, 0], turned[:, 1], turned[:, 6] = boxes[:, 1], -boxes[:, 0], boxes[:, 6] - np.pi / 2
    if boxes.shape[1] >= 9:
        turned[:, 7], turned[:, 8] = boxes[:, 8], -boxes[:, 7]
    return turned


def _corners(box: Floats) -> Floats:
    """(4, 2) x, y in metres: front left, front right, rear right, rear left."""
    ahead = np.array([np.cos(box[6]), np.sin(box[6])]) * box[3] / 2
    left = np.array([-np.sin(box[6]), np.cos(box[6])]) * box[4] / 2
    return np.asarray(box[:2] + np.stack([ahead + left, ahead - left, -ahead - left, -ahead + left]))


def _fit(cloud: Floats, corners: Floats, extent_m: Sequence[float] | None, width: int, height: int) -> _View:
    """Choose the view that shows ``extent_m``, or else the sensor, every box and nearly every point."""
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
    """Draw lines every 10 m (20, 50 or 100 m if denser than 60 px); returns their labels."""
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


def _draw_points(canvas: BgrImage, view: _View, cloud: Floats) -> tuple[float, float]:
    """Draw points as squares shaded by height, the highest on top; returns the heights at both ends of the ramp."""
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
    """Draw an arrow head at the sensor, pointing forward."""
    origin = view.pixels(np.zeros(2))
    shape = np.array([(0, -11), (8, 9), (0, 4), (-8, 9)]) * _OVERSAMPLING
    draw_polygon(canvas, origin + shape, _BRIGHT, fill=True)


def _draw_box(canvas: BgrImage, view: _View, box: Floats, corners: Floats, colour: Colour) -> None:
    outline = view.pixels(corners)
    low = np.maximum(np.floor(outline.min(0)).astype(int) - 4, 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + 5, (view.width, view.height))
    if (low < high).all():  # translucent floor
        part = canvas[low[1] : high[1], low[0] : high[0]]
        floor = part.copy()
        draw_polygon(floor, outline - low, colour, fill=True)
        part[:] = cv2.addWeighted(floor, 0.22, part, 0.78, 0)
    thick = 2 * _OVERSAMPLING
    draw_polygon(canvas, outline, (0, 0, 0), thick + 2 * _OVERSAMPLING)
    draw_polygon(canvas, outline, colour, thick)
    # Heading: from the centre through the front side.
    centre, front = outline.mean(0), outline[:2].mean(0)
    length = float(np.hypot(*(front - centre))) or 1.0
    tip = front + (front - centre) / length * 7 * _OVERSAMPLING
    draw_line(canvas, [centre, tip], colour, thick)
    if len(box) >= 9 and float(np.hypot(*box[7:9])) > 0.2:
        end = view.pixels(box[:2] + box[7:9])
        tail, head = (tuple(int(v) for v in p) for p in (centre, end))
        cv2.arrowedLine(canvas, tail, head, _BRIGHT, _OVERSAMPLING, cv2.LINE_AA, tipLength=0.15)


def _caption(image: BgrImage, texts: list[Text], title: str, shown: str) -> list[Area]:
    lines = [(title, 19, _BRIGHT), (shown, 14, _FAINT)] if title else [(shown, 14, _BRIGHT)]
    width = max(text_size(words, size)[0] for words, size, _ in lines)
    area = (12.0, 12.0, 12 + width + 24, 12 + sum(size + 8 for _, size, _ in lines) + 14.0)
    draw_panel(image, area)
    top = 20.0
    for words, size, colour in lines:
        texts.append(Text((24, top), words, size, colour))
        top += size + 8
    return [area]


def _legend(
    image: BgrImage, texts: list[Text], labels: NDArray[np.int64], names: Sequence[str]
) -> list[Area]:
    """Draw colour, name and count of every class, upper right."""
    counted = Counter(zip(labels.tolist(), names, strict=True))
    if not counted:
        return []
    rows = [(label, f"{name}", str(count)) for (label, name), count in sorted(counted.items())][:12]
    name_width = max(text_size(name, 14)[0] for _, name, _ in rows)
    count_width = max(text_size(count, 14)[0] for *_, count in rows)
    right = image.shape[1] - 12.0
    left = right - (12 + 14 + 10 + name_width + 18 + count_width + 12)
    area = (left, 12.0, right, 12 + 12 + 22.0 * len(rows) + 6)
    draw_panel(image, area)
    for k, (label, name, count) in enumerate(rows):
        top = 22 + 22 * k
        at = (int(left) + 12, top + 2), (int(left) + 26, top + 14)
        cv2.rectangle(image, at[0], at[1], class_colour(label), -1, cv2.LINE_AA)
        texts.append(Text((left + 36, top), name, 14, _BRIGHT))
        texts.append(Text((right - 12 - text_size(count, 14)[0], top), count, 14, _FAINT))
    return [area]


def _height_bar(image: BgrImage, texts: list[Text], heights: tuple[float, float]) -> list[Area]:
    """Draw the colour ramp of the points with the heights of its ends, lower right."""
    height, width = image.shape[:2]
    if width < 480 or height < 240:
        return []
    area = (width - 222.0, height - 42.0, width - 12.0, height - 12.0)
    draw_panel(image, area)
    low, high = (f"{value:+.1f} m" for value in heights)
    stops = np.linspace(0, len(_HEIGHT_RAMP) - 1, 78)
    ramp = np.stack([np.interp(stops, np.arange(len(_HEIGHT_RAMP)), _HEIGHT_RAMP[:, k]) for k in range(3)], 1)
    left = int(area[0]) + 66
    image[height - 31 : height - 22, left : left + len(ramp)] = ramp.astype(np.uint8)
    texts.append(Text((left - 8 - text_size(low, 12)[0], height - 34), low, 12, _FAINT))
    texts.append(Text((left + len(ramp) + 8, height - 34), high, 12, _FAINT))
    return [area]
