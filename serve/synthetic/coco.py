"""Pictures of shapes as a data set in COCO's layout: boxes and polygons of instances.

Layout and fields are COCO's (cocodataset.org, "Data format", object detection): ``annotations/instances_*2017.json``
and a folder of JPEG files per split. Shapes lie over each other, so that a mask is what is left to see of its shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["JPEG_QUALITY", "SHAPES", "Picture", "draw_picture", "picture_seed", "write_coco"]

#: Names of the classes; their ids in the annotation files are 1, 2, 3.
SHAPES = ("circle", "square", "triangle")
WIDTH, HEIGHT = 192, 144  # pixels
_MOST_SHAPES = 5
_RADIUS_PX = (10.0, 30.0)
JPEG_QUALITY = 92
_HELD_OUT_BASE = 1_000_000
_LEAST_VISIBLE = 0.4  # share of a shape; what shows less is neither kept nor annotated
_CORNERS = {"square": 4, "triangle": 3}


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and the instances in it.

    Attributes:
        image: (144, 192, 3) uint8, BGR.
        masks: (M, 144, 192) bool, the visible part of each shape.
        labels: (M,) index into `SHAPES`.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: tuple[int, ...]


def draw_picture(seed: int) -> Picture:
    """Draw the picture of a seed (any integer >= 0), the same on every call: one to five shapes on a noisy gradient."""
    rng = np.random.Generator(np.random.PCG64(seed))
    image = _background(rng)
    owner = np.full((HEIGHT, WIDTH), -1)
    labels: list[int] = []
    sizes: list[int] = []
    for _ in range(int(rng.integers(1, _MOST_SHAPES + 1))):
        label = int(rng.integers(len(SHAPES)))
        mask = _shape(rng, SHAPES[label])
        colour = _colour(rng, image[mask].mean(axis=0))
        left = [int(((owner == k) & ~mask).sum()) for k in range(len(labels))]
        if any(seen < _LEAST_VISIBLE * size for seen, size in zip(left, sizes, strict=True)):
            continue  # it would hide another shape
        image[mask] = colour
        owner[mask] = len(labels)
        labels.append(label)
        sizes.append(int(mask.sum()))
    noisy = image + rng.normal(0, 7, image.shape)
    masks = np.stack([owner == k for k in range(len(labels))])
    return Picture(np.clip(noisy, 0, 255).round().astype(np.uint8), masks, tuple(labels))


def picture_seed(index: int, train: int, first: int) -> int:
    """Seed of a picture of a data set: the first `train` ones are of training, the others held out."""
    return first + index if index < train else _HELD_OUT_BASE + first + index - train


def write_coco(
    folder: Path,
    *,
    train: int,
    val: int,
    first: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, int]:
    """Write a data set into an empty folder; the same files for the same arguments.

    Args:
        folder: root of the data set; made.
        train: number of training pictures.
        val: number of validation pictures; their seeds are no training seeds.
        first: number of the first picture of either kind.
        progress: wraps the picture numbers, such as `tqdm.tqdm`.

    Returns:
        Number of instances per class.
    """
    counts = dict.fromkeys(SHAPES, 0)
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        splits[split] = {
            "info": {"description": "pictures of shapes, drawn by mmdet3d-serve", "version": "1.0"},
            "licenses": [],
            "categories": [
                {"id": label + 1, "name": name, "supercategory": "shape"} for label, name in enumerate(SHAPES)
            ],
            "images": [],
            "annotations": [],
        }
    for index in progress(range(train + val)):
        split = "train2017" if index < train else "val2017"
        picture = draw_picture(picture_seed(index, train, first))
        name = f"{index + 1:012d}.jpg"
        cv2.imwrite(str(folder / split / name), picture.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        into = splits[split]
        into["images"].append({"id": index + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for mask, label in zip(picture.masks, picture.labels, strict=True):
            counts[SHAPES[label]] += 1
            into["annotations"].append(_annotation(len(into["annotations"]) + 1, index + 1, mask, label))
    (folder / "annotations").mkdir()
    for split, content in splits.items():
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return counts


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a gradient of two dark colours with blurred noise, (H, W, 3) in 0 to 255."""
    angle = float(rng.uniform(0, 2 * math.pi))
    x, y = np.meshgrid(np.linspace(-1, 1, WIDTH), np.linspace(-1, 1, HEIGHT))
    share = (0.5 + 0.35 * (math.cos(angle) * x + math.sin(angle) * y))[..., None]
    ends = rng.uniform(30, 190, (2, 3))
    cloud = cv2.GaussianBlur(rng.normal(0, 1, (HEIGHT, WIDTH)), (0, 0), 6.0)[..., None]
    return np.asarray(share * ends[0] + (1 - share) * ends[1] + 90 * cloud)


def _shape(rng: np.random.Generator, name: str) -> NDArray[np.bool_]:
    """Return the pixels (H, W) of a shape of random size, place and rotation, whole within the image."""
    radius = float(rng.uniform(*_RADIUS_PX))
    centre = rng.uniform([radius + 1, radius + 1], [WIDTH - radius - 2, HEIGHT - radius - 2])
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    if name == "circle":
        cv2.circle(canvas, (round(float(centre[0])), round(float(centre[1]))), round(radius), 1, -1)
    else:
        corners = _CORNERS[name]
        turn = float(rng.uniform(0, 2 * math.pi)) + 2 * math.pi * np.arange(corners) / corners
        outline = centre + radius * np.column_stack([np.cos(turn), np.sin(turn)])
        cv2.fillPoly(canvas, [outline.round().astype(np.int32)], 1)
    return canvas.astype(bool)


def _colour(rng: np.random.Generator, behind: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw a colour that differs from what is behind."""
    while True:
        colour = rng.uniform(20, 240, 3)
        if np.abs(colour - behind).max() > 60:
            return np.asarray(colour)


def _annotation(number: int, image: int, mask: NDArray[np.bool_], label: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "segmentation": _polygons(mask),
        "iscrowd": 0,
    }


def _polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Outlines of the parts of a mask, each x1, y1, x2, y2, … in pixels, of three corners or more."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = [contour.reshape(-1).astype(float).tolist() for contour in found if len(contour) >= 3]
    x, y = np.flatnonzero(mask.any(axis=0))[0], np.flatnonzero(mask.any(axis=1))[0]
    return outlines or [[float(n) for n in (x, y, x + 1, y, x + 1, y + 1)]]
