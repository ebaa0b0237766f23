"""Encode, decode and compare labels of points and panoptic maps of images.

Labels of points are encoded as ``{"dtype": "uint8", "shape": [N], "b64": "…"}``: little-endian bytes of that dtype in
base64. A panoptic map is encoded in COCO's panoptic format (cocodataset.org): a PNG in base64 whose pixels hold
red + 256 green + 65536 blue = segment id, and one record per segment; id 0 is no segment.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from serve.compare.tolerances import MAX_TIE_SHARE
from serve.formats.labels import LABEL_DTYPES, decode_labels

__all__ = [
    "LabelComparison",
    "compare_labels",
    "decode_labels",
    "decode_segments",
    "encode_labels",
    "encode_segments",
    "has_labels",
    "label_differences",
]

PANOPTIC_OFFSET = 1000  # mmdet's INSTANCE_OFFSET: a pixel is label + 1000 × number of the instance


def encode_labels(labels: npt.NDArray[Any]) -> dict[str, Any]:
    """Encode labels (N,), integers >= 0, in the smallest of uint8, uint16, uint32 that holds them."""
    largest = int(labels.max(initial=0))
    dtype = next(name for name in LABEL_DTYPES if largest <= np.iinfo(name).max)
    packed = np.ascontiguousarray(labels, dtype=np.dtype(dtype).newbyteorder("<"))
    return {
        "dtype": dtype,
        "shape": [int(n) for n in packed.shape],
        "b64": base64.b64encode(packed.tobytes()).decode(),
    }


def encode_segments(panoptic: npt.NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """Encode mmdet's panoptic map as ``panoptic_seg`` and ``segments_info``.

    Args:
        panoptic: (H, W) label + 1000 × instance number, which is 0 for uncountable classes (sky, road); a
            label outside `classes` is no segment.
        classes: class names by label.
    """
    height, width = panoptic.shape
    ids = np.zeros((height, width), dtype=np.uint32)
    segments: list[dict[str, Any]] = []
    for value in np.unique(panoptic).tolist():
        label, instance = value % PANOPTIC_OFFSET, value // PANOPTIC_OFFSET
        if not 0 <= label < len(classes):
            continue
        mask = panoptic == value
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        segments.append(
            {
                "id": len(segments) + 1,
                "category_id": int(label),
                "name": classes[label],
                "isthing": int(instance > 0),
                "area": int(mask.sum()),
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
            }
        )
        ids[mask] = segments[-1]["id"]
    # OpenCV writes blue first.
    image = np.stack([ids >> 16, (ids >> 8) & 255, ids & 255], axis=-1).astype(np.uint8)
    png = cv2.imencode(".png", image)[1].tobytes()
    return {
        "panoptic_seg": {"size": [height, width], "png_b64": base64.b64encode(png).decode()},
        "segments_info": segments,
    }


def decode_segments(answer: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Decode ``panoptic_seg`` of `encode_segments` to segment ids (H, W).

    Raises:
        ValueError: malformed.
    """
    try:
        raw = base64.b64decode(answer["panoptic_seg"]["png_b64"], validate=True)
        image: Any = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
        if image is None or list(image.shape[:2]) != list(answer["panoptic_seg"]["size"]):
            raise ValueError(f"the panoptic map is not of size {answer['panoptic_seg']['size']}")
    except (KeyError, TypeError, binascii.Error, cv2.error) as error:
        raise ValueError(f"malformed panoptic map: {error!r}") from None
    blue, green, red = (image[..., channel].astype(np.int64) for channel in range(3))
    return np.asarray(red + (green << 8) + (blue << 16))


def has_labels(answer: Mapping[str, Any]) -> bool:
    """Whether the predictions are labels instead of detections."""
    return "pts_semantic_mask" in answer or "panoptic_seg" in answer


@dataclass(frozen=True)
class LabelComparison:
    """Result of `compare_labels`.

    Attributes:
        count: number of points or pixels compared.
        agreeing: number of them with the same label on both sides.
        least_share: required share of them.
        problems: reasons why the two are incomparable.
        sides: names of the two sides.
        unit: ``points`` or ``pixels``.
        tied: number of those with another label that rounding decides (`serve.compare.ties`).
        moved_by_rounding: largest number of labels that a variant of `serve.compare.ties` changes.
    """

    count: int
    agreeing: int
    least_share: float
    problems: tuple[str, ...]
    sides: tuple[str, str]
    unit: str
    tied: int = 0
    moved_by_rounding: int = 0

    @property
    def share(self) -> float:
        """Share with the same label; 1 for empty predictions."""
        return self.agreeing / self.count if self.count else 1.0

    @property
    def ok(self) -> bool:
        """Whether enough labels agree, without the tied ones, of which there are few."""
        if self.problems:
            return False
        return self.share >= self.least_share or (
            self.agreeing + self.tied >= self.least_share * self.count and self.tied <= self.most_ties
        )

    @property
    def most_ties(self) -> float:
        """Number of ties above which the two sides count as different."""
        return max(MAX_TIE_SHARE * self.count, self.moved_by_rounding)

    def verdict(self) -> str:
        """Format one line: match or mismatch, and how many labels agree."""
        word = "match" if self.ok else "MISMATCH"
        share = f"{self.agreeing} of {self.count} {self.unit} have the same label (>= {self.least_share:.2%})"
        tied = f", {self.tied} tied (at most {self.most_ties:g})" if self.tied else ""
        return f"{word}: {share} in {' and '.join(self.sides)} predictions{tied}"


def compare_labels(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    least_share: float,
    *,
    sides: tuple[str, str] = ("native", "served"),
) -> LabelComparison:
    """Compare two predictions of labels, point by point or pixel by pixel.

    Pixels of panoptic maps agree if their segments have the same class and overlap most among all: segment ids are
    not comparable between predictions.

    Args:
        expected: predictions of the reference.
        actual: predictions under test.
        least_share: required share of points or pixels with the same label, 0 to 1.
        sides: names of the two sides.

    Returns:
        A `LabelComparison`. Malformed input is reported in ``problems``; no exception is raised.
    """
    unit = "points" if "pts_semantic_mask" in expected else "pixels"
    try:
        one, two = _decode_both(expected, actual)
    except (ValueError, KeyError, TypeError) as error:
        return LabelComparison(0, 0, least_share, (f"malformed predictions: {error!r}",), sides, unit)
    if one.shape != two.shape:
        problem = f"{one.shape} {unit} in {sides[0]} and {two.shape} in {sides[1]} predictions"
        return LabelComparison(max(one.size, two.size), 0, least_share, (problem,), sides, unit)
    return LabelComparison(one.size, int((one == two).sum()), least_share, (), sides, unit)


def label_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Mark the points (N,) or pixels (H, W) whose labels differ between two predictions of equal shape.

    Raises:
        ValueError: malformed, or of unequal shape.
    """
    one, two = _decode_both(expected, actual)
    if one.shape != two.shape:
        raise ValueError(f"labels of shape {one.shape} and {two.shape}")
    return np.asarray(one != two)


def _decode_both(
    expected: Mapping[str, Any], actual: Mapping[str, Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labels of both sides; segments of the second are numbered like those of the first."""
    if "pts_semantic_mask" in expected:
        return decode_labels(expected["pts_semantic_mask"]), decode_labels(actual["pts_semantic_mask"])
    return _match_segments(expected, actual)


def _match_segments(
    expected: Mapping[str, Any], actual: Mapping[str, Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two maps of segment ids, the second renumbered like the first: greedily by overlap within a class."""
    one, two = decode_segments(expected), decode_segments(actual)
    if one.shape != two.shape:
        return one, two
    class_of = [
        {int(segment["id"]): int(segment["category_id"]) for segment in side["segments_info"]}
        for side in (expected, actual)
    ]
    pairs, counts = np.unique(np.stack([one.ravel(), two.ravel()]), axis=1, return_counts=True)
    renamed, taken = {0: 0}, {0}
    for k in np.argsort(-counts, kind="stable").tolist():
        first, second = (int(value) for value in pairs[:, k])
        if second in renamed or first in taken or class_of[0].get(first) != class_of[1].get(second):
            continue
        renamed[second] = first
        taken.add(first)
    table = np.full(int(two.max(initial=0)) + 1, -1, dtype=np.int64)
    for second, first in renamed.items():
        table[second] = first
    return one, table[two]
