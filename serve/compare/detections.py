"""Match two sets of detections one to one and measure their deviations.

Detections are plain dictionaries with OpenMMLab's names, as in a response: 3D (``bboxes_3d``, ``scores_3d``,
``labels_3d``, ``box_type_3d``) or 2D (``bboxes``, ``scores``, ``labels`` and optionally ``masks`` as COCO RLE). Their
order is irrelevant. Predictions of labels are left to `serve.compare.labels`.

`serve.compare.assignment` pairs the detections. An unmatched one whose score is within the score tolerance of the
threshold may be missing on the other side because of rounding: it is reported as borderline, not as a failure. Masks
are not used for pairing and are compared afterwards. `serve.compare.ties` sets apart what rounding decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.compare.assignment import YAW, Rows, angle_between, match_rows
from serve.compare.labels import LabelComparison, compare_labels, has_labels
from serve.compare.tolerances import MAX_TIE_SHARE, Tolerances

__all__ = [
    "Comparison",
    "Pair",
    "Tolerances",
    "compare",
    "compare_answers",
    "detection_count",
    "is_3d",
]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

Z, SIZES = 2, slice(3, 6)  # columns of the bottom, and of length, width and height, in a 3D box
_REACH_3D = 2.0  # m between values of boxes that may still be the same object
_REACH_2D = 50.0  # px


class Pair(NamedTuple):
    """Two detections of the same object, by their positions in the two dictionaries.

    ``box`` is the largest deviation of a box value in metres or pixels (of a size less its share), ``yaw`` is in
    radians (0 for 2D), ``mask_iou`` is None if a side has no masks.
    """

    expected: int
    actual: int
    expected_label: int
    actual_label: int
    box: float
    yaw: float
    score: float
    mask_iou: float | None
    ok: bool


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; positions refer to the compared dictionaries.

    ``moved_by_rounding`` is the largest number of detections that a variant of `serve.compare.ties` changes.
    """

    is_3d: bool
    tolerances: Tolerances
    score_thr: float
    expected_count: int
    actual_count: int
    pairs: tuple[Pair, ...]
    unmatched_expected: tuple[int, ...]
    unmatched_actual: tuple[int, ...]
    borderline_expected: tuple[int, ...]
    borderline_actual: tuple[int, ...]
    problems: tuple[str, ...]
    sides: tuple[str, str]
    described: tuple[tuple[str, ...], tuple[str, ...]]
    tied_expected: frozenset[int] = frozenset()
    tied_actual: frozenset[int] = frozenset()
    moved_by_rounding: int = 0

    @property
    def ok(self) -> bool:
        """Whether no detection is outside the tolerances, unmatched or malformed, but for a small share of ties."""
        return not self.problems and not self.failing and self.ties <= self.most_ties

    @property
    def failing(self) -> int:
        """Number of detections (pairs count once) that differ and are no ties."""
        return (
            sum(not pair.ok and not self.is_tied(pair) for pair in self.pairs)
            + len(set(self.unmatched_expected) - self.tied_expected)
            + len(set(self.unmatched_actual) - self.tied_actual)
        )

    @property
    def ties(self) -> int:
        """Number of detections that differ because rounding decides them."""
        return max(len(self.tied_expected), len(self.tied_actual))

    @property
    def most_ties(self) -> float:
        """Number of ties above which the two sides count as different."""
        return max(MAX_TIE_SHARE * max(self.expected_count, self.actual_count), self.moved_by_rounding)

    def is_tied(self, pair: Pair) -> bool:
        """Whether both detections of a pair are ties."""
        return pair.expected in self.tied_expected and pair.actual in self.tied_actual

    @property
    def _compared(self) -> list[Pair]:
        """Pairs whose deviations count."""
        return [pair for pair in self.pairs if not self.is_tied(pair)]

    @property
    def largest_box(self) -> float:
        """Largest deviation of a box value over all pairs, in metres or pixels."""
        return max((pair.box for pair in self._compared), default=0.0)

    @property
    def largest_yaw(self) -> float:
        """Largest deviation of a heading over all pairs, in radians."""
        return max((pair.yaw for pair in self._compared), default=0.0)

    @property
    def largest_score(self) -> float:
        """Largest deviation of a score over all pairs."""
        return max((pair.score for pair in self._compared), default=0.0)

    @property
    def smallest_mask_iou(self) -> float | None:
        """Smallest mask IoU over all pairs; None without masks."""
        return min((pair.mask_iou for pair in self._compared if pair.mask_iou is not None), default=None)

    @property
    def wrong_labels(self) -> int:
        """Number of pairs with different labels."""
        return sum(pair.expected_label != pair.actual_label for pair in self._compared)

    def verdict(self) -> str:
        """Format one line: match or mismatch, counts, and the largest deviations with their tolerances."""
        if not (self.expected_count or self.actual_count or self.problems):
            return f"match: no detections on either side at score >= {self.score_thr:g}"
        tol, unit = self.tolerances, "m" if self.is_3d else "px"
        parts = [f"box {self.largest_box:.1e} {unit} (<= {tol.box_m if self.is_3d else tol.box_px:g})"]
        if self.is_3d:
            parts.append(f"yaw {self.largest_yaw:.1e} rad (<= {tol.yaw_rad:g})")
        parts.append(f"score {self.largest_score:.1e} (<= {tol.score:g})")
        if self.smallest_mask_iou is not None:
            parts.append(f"mask IoU {self.smallest_mask_iou:.4f} (>= {tol.mask_iou:g})")
        both = f"{self.expected_count} {self.sides[0]} and {self.actual_count} {self.sides[1]}"
        counts = [f"{len(self.pairs)} pairs of {both}"]
        if self.wrong_labels:
            counts.append(f"{self.wrong_labels} with different labels")
        if self.ties:
            counts.append(f"{self.ties} tied (at most {self.most_ties:g})")
        tied = len(self.tied_expected & set(self.unmatched_expected))
        tied += len(self.tied_actual & set(self.unmatched_actual))
        if unmatched := len(self.unmatched_expected) + len(self.unmatched_actual) - tied:
            counts.append(f"{unmatched} unmatched")
        if borderline := len(self.borderline_expected) + len(self.borderline_actual):
            counts.append(f"{borderline} borderline (not counted)")
        word = "match" if self.ok else "MISMATCH"
        return f"{word}: {', '.join(counts)}; largest deviation: {', '.join(parts)}"


def is_3d(detections: Mapping[str, Any]) -> bool:
    """Whether a detection dictionary is 3D (has ``bboxes_3d``)."""
    return "bboxes_3d" in detections


def detection_count(detections: Mapping[str, Any]) -> int:
    """Count the detections in a dictionary."""
    return len(detections.get("bboxes_3d", detections.get("bboxes", ())))


def compare(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    tolerances: Tolerances | None = None,
    score_thr: float = 0.0,
    *,
    sides: tuple[str, str] = ("native", "served"),
) -> Comparison:
    """Match two detection dictionaries one to one.

    Args:
        expected: detections of the reference.
        actual: detections under test.
        tolerances: limits of equality; the defaults of `Tolerances` if None.
        score_thr: score threshold of both sides, used to recognise borderline detections.
        sides: names of the two sides in tables and problems.

    Returns:
        A `Comparison`. Malformed input (missing keys, unequal lengths, NaN, different kinds of boxes, masks
        on one side only) is reported in ``problems``; no exception is raised.
    """
    tolerances = tolerances or Tolerances()
    problems: list[str] = []
    boxes_3d = is_3d(expected)
    one = _read(expected, sides[0], boxes_3d, problems)
    two = _read(actual, sides[1], boxes_3d, problems)
    problems += _compare_kinds(expected, actual, one, two, sides)

    # 1. Pair. Boxes of different width (7 and 9 values) cannot be paired and are a problem already.
    if one.rows.boxes.shape[1] == two.rows.boxes.shape[1]:
        matched = match_rows(
            one.rows,
            two.rows,
            box=tolerances.box_m if boxes_3d else tolerances.box_px,
            score=tolerances.score,
            yaw=tolerances.yaw_rad if boxes_3d else None,
            reach=_REACH_3D if boxes_3d else _REACH_2D,
        )
        matched = matched[np.argsort(matched[:, 0], kind="stable")]
        pairs = _measure_pairs(one, two, matched, boxes_3d, tolerances, problems, sides)
    else:
        matched, pairs = np.empty((0, 2), np.int64), ()
    # 2. Unmatched detections fail, unless their score is at the threshold.
    unmatched, borderline = [], []
    for column, side in enumerate((one, two)):
        rows = np.setdiff1d(np.arange(len(side.rows.scores)), matched[:, column])
        near = np.abs(side.rows.scores[rows] - score_thr) <= tolerances.score
        unmatched.append(tuple(rows[~near].tolist()))
        borderline.append(tuple(rows[near].tolist()))
    return Comparison(
        is_3d=boxes_3d,
        tolerances=tolerances,
        score_thr=score_thr,
        expected_count=len(one.rows.scores),
        actual_count=len(two.rows.scores),
        pairs=pairs,
        unmatched_expected=unmatched[0],
        unmatched_actual=unmatched[1],
        borderline_expected=borderline[0],
        borderline_actual=borderline[1],
        problems=tuple(problems),
        sides=sides,
        described=(one.describe(), two.describe()),
    )


def compare_answers(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    tolerances: Tolerances | None = None,
    score_thr: float = 0.0,
    *,
    sides: tuple[str, str] = ("native", "served"),
) -> Comparison | LabelComparison:
    """Compare detections by `compare`, labels by `compare_labels`, depending on the expected predictions."""
    if not has_labels(expected):
        return compare(expected, actual, tolerances, score_thr, sides=sides)
    return compare_labels(expected, actual, (tolerances or Tolerances()).label_share, sides=sides)


@dataclass(frozen=True)
class _Side:
    """One side as arrays."""

    rows: Rows
    names: list[str] | None = None
    masks: list[Any] | None = None

    def describe(self) -> tuple[str, ...]:
        names = self.names or [f"label {label}" for label in self.rows.labels]
        scores = self.rows.scores
        return tuple(f"#{k} {name} {scores[k]:.4f}" for k, name in enumerate(names))


def _read(detections: Mapping[str, Any], name: str, boxes_3d: bool, problems: list[str]) -> _Side:
    """Convert a dictionary to arrays; malformed input becomes a problem and an empty side."""
    least, suffix = (7, "_3d") if boxes_3d else (4, "")
    empty = _Side(Rows(np.empty((0, least)), np.empty(0), np.empty(0, np.int64)))
    if is_3d(detections) != boxes_3d:
        return empty
    try:
        listed = {key: detections[f"{key}{suffix}"] for key in ("scores", "labels", "bboxes")}
        listed |= {key: detections[key] for key in ("names", "masks") if detections.get(key) is not None}
        count = len(listed["scores"])
        for key, values in listed.items():
            if len(values) != count:
                raise ValueError(f"{len(values)} {key} for {count} scores")
        scores = np.asarray(listed["scores"], np.float64).reshape(count)
        labels = np.asarray(listed["labels"], np.float64).reshape(count)
        boxes = np.asarray(listed["bboxes"], np.float64).reshape(count, -1 if count else least)
        if boxes.shape[1] < least:
            raise ValueError(f"{boxes.shape[1]} values per box, at least {least} belong there")
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        problems.append(f"{name} detections are malformed: {what}")
        return empty
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores) & np.isfinite(labels)
    if not finite.all():
        problems.append(f"{int((~finite).sum())} {name} detections hold NaN or infinite values")
        return empty
    return _Side(
        Rows(boxes, scores, labels.astype(np.int64)),
        names=[str(value) for value in listed["names"]] if "names" in listed else None,
        masks=list(listed["masks"]) if "masks" in listed else None,
    )


def _compare_kinds(
    expected: Mapping[str, Any], actual: Mapping[str, Any], one: _Side, two: _Side, sides: tuple[str, str]
) -> list[str]:
    """List the properties that make the two sides incomparable as a whole."""
    if is_3d(expected) != is_3d(actual):
        kinds = ["3D" if is_3d(side) else "2D" for side in (expected, actual)]
        return [f"{sides[0]} detections are {kinds[0]} and {sides[1]} ones {kinds[1]}"]
    found = []
    types = [side.get("box_type_3d") for side in (expected, actual)]
    if types[0] != types[1]:
        found.append(f"box_type_3d is {types[0]} in {sides[0]} and {types[1]} in {sides[1]} detections")
    if len(one.rows.boxes) and len(two.rows.boxes):
        widths = [side.rows.boxes.shape[1] for side in (one, two)]
        if widths[0] != widths[1]:
            found.append(f"{sides[0]} boxes have {widths[0]} values and {sides[1]} ones {widths[1]}")
        if (one.masks is None) != (two.masks is None):
            found.append(f"only {sides[two.masks is not None]} detections have masks")
    return found


def _measure_pairs(
    one: _Side,
    two: _Side,
    matched: _Ints,
    boxes_3d: bool,
    tolerances: Tolerances,
    problems: list[str],
    sides: tuple[str, str],
) -> tuple[Pair, ...]:
    """Measure the deviations of the matched positions."""
    i, j = matched[:, 0], matched[:, 1]
    deviation = np.abs(one.rows.boxes[i] - two.rows.boxes[j])
    yaw = np.zeros(len(matched))
    limit = tolerances.box_px
    if boxes_3d:
        limit = tolerances.box_m
        yaw = angle_between(deviation[:, YAW])
        deviation[:, YAW] = 0
        if limit:
            # Scaled to one limit for all columns.
            scale = 1 + tolerances.size_share * np.abs(one.rows.boxes[i][:, SIZES]) / limit
            deviation[:, SIZES] /= scale
            deviation[:, Z] /= scale[:, -1]  # the bottom is the centre less half of the height
    box = deviation.max(1, initial=0.0)
    score = np.abs(one.rows.scores[i] - two.rows.scores[j])
    labels = one.rows.labels[i], two.rows.labels[j]
    good = (box <= limit) & (yaw <= tolerances.yaw_rad) & (score <= tolerances.score)
    good &= labels[0] == labels[1]
    if one.names and two.names:
        called = {(one.names[e], two.names[a]) for e, a in matched[labels[0] == labels[1]]}
        for first, second in sorted(names for names in called if names[0] != names[1])[:5]:
            problems.append(
                f"one label is called {first!r} in {sides[0]} and {second!r} in {sides[1]} detections"
            )
    iou = _mask_ious(one, two, matched, problems, sides)
    if iou is not None:
        areas = [np.array(_areas(side, rows)) for side, rows in ((one, i), (two, j))]
        differing = (areas[0] + areas[1]) * (1 - iou) / (1 + iou)  # of A + B = (1 + IoU) × union
        good &= (iou >= tolerances.mask_iou) | (differing <= tolerances.mask_px + 0.5)
    ious = [None] * len(matched) if iou is None else iou.tolist()
    columns = (i, j, *labels, box, yaw, score)
    rows = zip(*(column.tolist() for column in columns), ious, good.tolist(), strict=True)
    return tuple(Pair._make(row) for row in rows)


def _areas(side: _Side, rows: _Ints) -> list[int]:
    """Pixels of the masks in some rows; 0 for one that is no COCO RLE, which `_mask_ious` reports."""
    from pycocotools import mask as coco

    try:
        return [int(coco.area((side.masks or [])[row])) for row in rows.tolist()]
    except (KeyError, TypeError, ValueError):
        return [0] * len(rows)


def _mask_ious(
    one: _Side, two: _Side, matched: _Ints, problems: list[str], sides: tuple[str, str]
) -> _Floats | None:
    """Compute the IoU of COCO RLE masks per pair, by pycocotools; two empty masks are equal."""
    if one.masks is None or two.masks is None or not len(matched):
        return None
    from pycocotools import mask as coco

    values = np.zeros(len(matched))
    try:
        for k, (e, a) in enumerate(matched.tolist()):
            first, second = one.masks[e], two.masks[a]
            if list(first["size"]) != list(second["size"]):
                sizes = f"{first['size']} in {sides[0]} and {second['size']} in {sides[1]} detections"
                problems.append(f"masks are of size {sizes}")
                break
            both_empty = not (coco.area(first) or coco.area(second))
            values[k] = 1.0 if both_empty else coco.iou([first], [second], [0])[0, 0]
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"masks are not COCO RLE: {type(error).__name__}: {error}")
    return values
