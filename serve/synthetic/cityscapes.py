"""Pictures of shapes as a data set in Cityscapes' layout: instances as pixels, and COCO annotations of them.

Layout, file names and ids are those of M. Cordts et al. (CVPR 2016) and the project's scripts: ``leftImg8bit`` and
``gtFine`` with a folder per city, ``*_gtFine_instanceIds.png`` with 1000 × class + number. A circle is a person, a
square a rider, a triangle a car. The annotations are what mmdet's ``cityscapes.py`` makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.synthetic.coco import Picture, draw_picture, picture_seed

__all__ = ["CATEGORIES", "write_cityscapes"]

_CITY = "synthetic"
#: Classes with instances that are evaluated → id.
CATEGORIES = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
_CLASSES = ("person", "rider", "car")  # by label of the shapes
_ROAD = 7


def write_cityscapes(
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
        val: number of validation pictures. The first of them is that of the test split too, without instances.
        first: number of the first picture of either kind.
        progress: wraps the picture numbers, such as `tqdm.tqdm`.

    Returns:
        Number of instances per class.
    """
    counts = dict.fromkeys(_CLASSES, 0)
    splits = {split: _no_annotations() for split in ("train", "val")}
    for split in ("train", "val", "test"):
        for part in ("leftImg8bit", "gtFine"):
            (folder / part / split / _CITY).mkdir(parents=True)
    for index in progress(range(train + val)):
        split = "train" if index < train else "val"
        picture = draw_picture(picture_seed(index, train, first))
        stem = f"{_CITY}_{index:06d}_000019"
        ids, numbers = _write(folder, split, stem, picture)
        if index == train:
            _write(folder, "test", stem, Picture(picture.image, picture.masks[:0], ()))
        _annotate(splits[split], stem, ids, numbers)
        for label in picture.labels:
            counts[_CLASSES[label]] += 1
    (folder / "annotations").mkdir()
    for split, content in splits.items():
        path = folder / "annotations" / f"instancesonly_filtered_gtFine_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return counts


def _write(folder: Path, split: str, stem: str, picture: Picture) -> tuple[NDArray[np.uint16], list[int]]:
    """Write a picture and its pixels of classes and instances; returns these and the ids of the instances."""
    ids = np.full(picture.image.shape[:2], _ROAD, np.uint16)
    numbers: list[int] = []
    for mask, label in zip(picture.masks, picture.labels, strict=True):
        base = 1000 * CATEGORIES[_CLASSES[label]]
        number = base + sum(other // 1000 * 1000 == base for other in numbers)
        numbers.append(number)
        ids[mask] = number
    classes = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
    truth = folder / "gtFine" / split / _CITY
    cv2.imwrite(str(folder / "leftImg8bit" / split / _CITY / f"{stem}_leftImg8bit.png"), picture.image)
    cv2.imwrite(str(truth / f"{stem}_gtFine_instanceIds.png"), ids)
    cv2.imwrite(str(truth / f"{stem}_gtFine_labelIds.png"), classes)
    return ids, numbers


def _no_annotations() -> dict[str, Any]:
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    return {"images": [], "categories": categories, "annotations": []}


def _annotate(content: dict[str, Any], stem: str, ids: NDArray[np.uint16], numbers: list[int]) -> None:
    from pycocotools import mask as coco

    image = len(content["images"])
    content["images"].append(
        {
            "id": image,
            "file_name": f"{_CITY}/{stem}_leftImg8bit.png",
            "height": ids.shape[0],
            "width": ids.shape[1],
            "segm_file": f"{_CITY}/{stem}_gtFine_labelIds.png",
        }
    )
    for number in sorted(numbers):
        encoded = coco.encode(np.asfortranarray(ids == number, np.uint8))
        content["annotations"].append(
            {
                "iscrowd": 0,
                "category_id": number // 1000,
                "bbox": coco.toBbox(encoded).tolist(),
                "area": int(coco.area(encoded)),
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                "image_id": image,
                "id": len(content["annotations"]),
            }
        )
