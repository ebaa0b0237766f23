"""Pictures of shapes as a data set in nuImages' layout: tables, and masks of objects as run lengths.

Tables and fields are those of nuImages' schema and its development kit (nuscenes.org). A circle is a car, a square
a pedestrian, a triangle a traffic cone. mmdet3d's ``nuimage_converter.py`` makes COCO annotations of it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve.synthetic.coco import JPEG_QUALITY, Picture, draw_picture, picture_seed
from serve.synthetic.releases import token_of

__all__ = ["write_nuimages"]

_TABLES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "log", "object_ann", "sample", "sample_data"),
    *("sensor", "surface_ann"),
)
# By label of the shapes.
_CATEGORIES = ("vehicle.car", "human.pedestrian.adult", "movable_object.trafficcone")
_SURFACE = "flat.driveable_surface"
_CAMERA = "CAM_FRONT"
_START_US = 1_535_000_000_000_000


def write_nuimages(
    folder: Path,
    *,
    train: int,
    val: int,
    first: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, int]:
    """Write a data set into an empty folder, with the tables ``v1.0-train`` and ``v1.0-val``.

    Args:
        folder: root of the data set; made.
        train: number of training pictures.
        val: number of validation pictures.
        first: number of the first picture of either kind.
        progress: wraps the picture numbers, such as `tqdm.tqdm`.

    Returns:
        Number of objects per category.
    """
    (folder / "samples" / _CAMERA).mkdir(parents=True)
    counts = dict.fromkeys(_CATEGORIES, 0)
    splits = {split: _constants() for split in ("train", "val")}
    for index in progress(range(train + val)):
        picture = draw_picture(picture_seed(index, train, first))
        name = f"samples/{_CAMERA}/n000__{_CAMERA}__{_START_US + 500_000 * index}.jpg"
        cv2.imwrite(str(folder / name), picture.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        _add(splits["train" if index < train else "val"], index, name, picture)
        for label in picture.labels:
            counts[_CATEGORIES[label]] += 1
    for split, tables in splits.items():
        (folder / f"v1.0-{split}").mkdir()
        for table, rows in tables.items():
            (folder / f"v1.0-{split}" / f"{table}.json").write_text(json.dumps(rows), encoding="utf-8")
    return counts


def _constants() -> dict[str, list[dict[str, Any]]]:
    """Return the tables with the rows that no picture changes."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    tables["category"] = [
        {"token": token_of("category", name), "name": name, "description": ""}
        for name in (*_CATEGORIES, _SURFACE)
    ]
    tables["sensor"] = [{"token": token_of("sensor"), "channel": _CAMERA, "modality": "camera"}]
    tables["calibrated_sensor"] = [
        {
            "token": token_of("calibrated_sensor"),
            "sensor_token": token_of("sensor"),
            "translation": [1.7, 0.0, 1.5],
            "rotation": [0.5, -0.5, 0.5, -0.5],
            "camera_intrinsic": [[150.0, 0, 96], [0, 150.0, 72], [0, 0, 1]],
            "camera_distortion": [0.0] * 6,
        }
    ]
    tables["log"] = [
        {
            "token": token_of("log"),
            "logfile": "n000-2018-08-23",
            "vehicle": "n000",
            "date_captured": "2018-08-23",
            "location": "synthetic",
        }
    ]
    return tables


def _add(tables: dict[str, list[dict[str, Any]]], index: int, name: str, picture: Picture) -> None:
    """Add a picture and its objects."""
    sample, data, pose = (token_of(kind, index) for kind in ("sample", "sample_data", "ego_pose"))
    time = _START_US + 500_000 * index
    tables["sample"].append(
        {"token": sample, "timestamp": time, "log_token": token_of("log"), "key_camera_token": data}
    )
    tables["ego_pose"].append(
        {
            "token": pose,
            "timestamp": time,
            "translation": [0.0] * 3,
            "rotation": [1.0, 0, 0, 0],
            **{name: [0.0] * 3 for name in ("acceleration", "rotation_rate")},
            "speed": 0.0,
        }
    )
    height, width = picture.image.shape[:2]
    tables["sample_data"].append(
        {
            "token": data,
            "sample_token": sample,
            "ego_pose_token": pose,
            "calibrated_sensor_token": token_of("calibrated_sensor"),
            "filename": name,
            "fileformat": "jpg",
            "width": width,
            "height": height,
            "timestamp": time,
            "is_key_frame": True,
            "prev": "",
            "next": "",
        }
    )
    tables["surface_ann"].append(
        {
            "token": token_of("surface_ann", index),
            "category_token": token_of("category", _SURFACE),
            "sample_data_token": data,
            "mask": _run_lengths(~picture.masks.any(axis=0)),
        }
    )
    for number, (mask, label) in enumerate(zip(picture.masks, picture.labels, strict=True)):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        tables["object_ann"].append(
            {
                "token": token_of("object_ann", index, number),
                "category_token": token_of("category", _CATEGORIES[label]),
                "attribute_tokens": [],
                "sample_data_token": data,
                "bbox": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
                "mask": _run_lengths(mask),
            }
        )


def _run_lengths(mask: Any) -> dict[str, Any]:
    """Encode a mask as nuImages does: COCO's compressed run lengths in base64."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": base64.b64encode(encoded["counts"]).decode()}
