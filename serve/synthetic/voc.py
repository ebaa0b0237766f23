"""Pictures of shapes as a data set in Pascal VOC's layout, with bounding boxes.

Layout and fields are those of the VOC2007 development kit (M. Everingham et al.): ``VOC2007/JPEGImages``,
``Annotations`` and ``ImageSets/Main``; pixels are counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from serve.synthetic.coco import JPEG_QUALITY, SHAPES, Picture, draw_picture, picture_seed

__all__ = ["write_voc"]


def write_voc(
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
        train: number of pictures of the set ``train``.
        val: number of pictures of the sets ``val`` and ``test``, which are the same.
        first: number of the first picture of either kind.
        progress: wraps the picture numbers, such as `tqdm.tqdm`.

    Returns:
        Number of objects per class.
    """
    root = folder / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    counts = dict.fromkeys(SHAPES, 0)
    names = [f"{index + 1:06d}" for index in range(train + val)]
    for index in progress(range(train + val)):
        picture = draw_picture(picture_seed(index, train, first))
        path = root / "JPEGImages" / f"{names[index]}.jpg"
        cv2.imwrite(str(path), picture.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        annotation = _annotation(path.name, picture)
        ElementTree.indent(annotation)
        ElementTree.ElementTree(annotation).write(root / "Annotations" / f"{names[index]}.xml")
        for label in picture.labels:
            counts[SHAPES[label]] += 1
    sets = {"train": names[:train], "val": names[train:], "trainval": names, "test": names[train:]}
    for split, members in sets.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in members))
    return counts


def _annotation(name: str, picture: Picture) -> ElementTree.Element:
    height, width, depth = picture.image.shape
    root = ElementTree.Element("annotation")
    _add(root, folder="VOC2007", filename=name, segmented=0)
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=depth)
    for mask, label in zip(picture.masks, picture.labels, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        found = ElementTree.SubElement(root, "object")
        _add(found, name=SHAPES[label], pose="Unspecified", truncated=0, difficult=0)
        _add(
            ElementTree.SubElement(found, "bndbox"),
            xmin=columns[0] + 1,
            ymin=rows[0] + 1,
            xmax=columns[-1] + 1,
            ymax=rows[-1] + 1,
        )
    return root


def _add(parent: ElementTree.Element, **members: object) -> None:
    for name, value in members.items():
        ElementTree.SubElement(parent, name).text = str(value)
