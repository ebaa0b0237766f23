"""COCO results from predictions: a list of ``image_id``, ``category_id``, ``bbox``, ``score`` and ``segmentation``.

The ids are those of an annotation file, by file name and class name, if there is one. Without one an image's id is the
number that its name consists of (COCO's own ``000000000139.jpg`` is image 139), else its position; categories count
from 0, as mmdet's labels do, except COCO's own 80 classes, which have COCO's own ids. A second file lists these ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.errors import BadRequest

__all__ = ["CocoIds", "results_of"]

# Ids that COCO left out between 1 and 90, of its 80 classes.
_GAPS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_COCO_IDS = tuple(number for number in range(1, 91) if number not in _GAPS)
_FIRST_AND_LAST = ("person", "toothbrush")


class CocoIds:
    """Ids of images and categories.

    Args:
        annotations: COCO annotation file, or None.

    Raises:
        BadRequest: it is no such file.
    """

    def __init__(self, annotations: Path | None = None) -> None:
        """See the class."""
        self._images: dict[str, Any] | None = None
        self._by_name: dict[str, list[Any]] = {}
        self._categories: dict[str, Any] = {}
        self._source = annotations
        self._taken: set[int] = set()
        self.images: list[dict[str, Any]] = []
        self.categories: dict[int, str] = {}
        if annotations is None:
            return
        try:
            document = json.loads(annotations.read_bytes())
            self._images = {image["file_name"]: image["id"] for image in document["images"]}
            for path, number in self._images.items():
                self._by_name.setdefault(Path(path).name, []).append(number)
            self._categories = {each["name"]: each["id"] for each in document["categories"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRequest(
                f"{annotations} is not a COCO annotation file with images and categories: {error}"
            ) from error

    def image(self, name: str) -> Any:
        """Return the id of an image by the name of its frame: with its folders, or else without them.

        Raises:
            BadRequest: the annotation file does not have it, or several of that name in other folders.
        """
        if self._images is not None:
            if name in self._images:
                return self._images[name]
            found = self._by_name.get(Path(name).name, [])
            if not found:
                raise BadRequest(
                    f"{name} is not among the images of {self._source}; take the file of these images"
                )
            if len(found) > 1:
                raise BadRequest(
                    f"{self._source} has {len(found)} images {Path(name).name}, none of them {name}; name frames as "
                    "its file_name does, by a manifest"
                )
            return found[0]
        stem = Path(name).stem
        number = int(stem) if stem.isdecimal() else len(self.images)
        while number in self._taken:
            number += 1
        self._taken.add(number)
        self.images.append({"id": number, "file_name": name})
        return number

    def category(self, label: int, name: str, classes: list[str]) -> Any:
        """Return the id of a class.

        Raises:
            BadRequest: the annotation file does not have it.
        """
        if self._images is not None:
            if name not in self._categories:
                raise BadRequest(f"class {name!r} is not among the categories of {self._source}")
            return self._categories[name]
        is_coco = len(classes) == 80 and (classes[0], classes[-1]) == _FIRST_AND_LAST
        number = _COCO_IDS[label] if is_coco else label
        self.categories[number] = name
        return number


def results_of(lines: Iterable[Mapping[str, Any]], ids: CocoIds) -> Iterator[dict[str, Any]]:
    """Convert recorded predictions to COCO's results.

    Args:
        lines: lines of a run's record; frames that failed have none.
        ids: ids of images and categories.

    Raises:
        BadRequest: the predictions are not boxes in images.
    """
    for line in lines:
        if (answer := line.get("answer")) is None:
            continue
        if "bboxes" not in answer:
            raise BadRequest(
                "COCO's results hold boxes in images; this model gives others; choose json, kitti or csv"
            )
        image = ids.image(line["frame"])
        masks = answer.get("masks")
        for k, (box, score, label, name) in enumerate(
            zip(answer["bboxes"], answer["scores"], answer["labels"], answer["names"], strict=True)
        ):
            left, top, right, bottom = box[:4]
            result = {
                "image_id": image,
                "category_id": ids.category(label, name, answer["classes"]),
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            if masks:
                result["segmentation"] = masks[k]
            yield result
