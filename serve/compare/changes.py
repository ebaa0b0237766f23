"""What changes from one version of a model to another: detections matched, renamed, lost and new.

Unlike `serve.compare.detections`, which asks whether two computations of one model are equal, this compares models
whose answers are known to differ. Detections are paired by place within a class, nearest first: in 3D by the distance
of their centres on the ground, as nuScenes' metric pairs them (https://www.nuscenes.org/object-detection), in 2D by
intersection over union. A detection counts from `score_thr` on; its partner may have a lower score, down to
`low_score`, so that a score that crosses the threshold by little is a shift and not a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve.errors import SettingsError, quote

__all__ = ["Change", "ChangeRules", "Kind", "find_changes"]

Kind = Literal["matched", "renamed", "lost", "new"]
Floats = npt.NDArray[np.float64]

# Columns of a 3D box that lie in the ground plane, by the frame of the boxes.
_GROUND = {"LiDAR": (0, 1), "Depth": (0, 1), "Camera": (0, 2)}
_FRAMES: Mapping[str | None, str] = {
    None: "2D boxes",
    **{kind: f"3D boxes of {kind} coordinates" for kind in _GROUND},
}


@dataclass(frozen=True)
class ChangeRules:
    """Rules of pairing.

    Attributes:
        score_thr: score from which a detection counts.
        low_score: least score of its partner; half of `score_thr` if None.
        distance_m: largest distance of two centres on the ground, metres (3D).
        iou: least intersection over union of two boxes (2D).
    """

    score_thr: float = 0.3
    low_score: float | None = None
    distance_m: float = 2.0
    iou: float = 0.5

    def __post_init__(self) -> None:
        """Reject rules that pair nothing or everything."""
        if not 0 <= self.score_thr <= 1:
            raise SettingsError(f"the score threshold must lie between 0 and 1, not {self.score_thr}")
        if self.low_score is not None and not 0 <= self.low_score <= self.score_thr:
            raise SettingsError(
                f"the low score must lie between 0 and {self.score_thr}, not {self.low_score}"
            )
        if not 0 < self.distance_m < np.inf:
            raise SettingsError(f"the distance must be more than 0 m and finite, not {self.distance_m}")
        if not 0 < self.iou <= 1:
            raise SettingsError(f"the IoU must be more than 0 and at most 1, not {self.iou}")

    @property
    def lowest(self) -> float:
        """Score from which a detection can be a partner."""
        return self.score_thr / 2 if self.low_score is None else self.low_score


@dataclass(frozen=True)
class Change:
    """What became of one detection.

    Attributes:
        kind: paired, paired with another class, only in the first answer, only in the second.
        name: its class; of a pair that in the first answer.
        renamed_to: class in the second answer, if it is another one.
        score: score in the first answer, of a new one in the second.
        score_shift: second score less the first; 0 of an unpaired one.
        crossed: whether only one score of a pair reaches the threshold.
        moved: distance of the centres on the ground in metres (3D), 1 - IoU (2D); 0 of an unpaired one.
        range_m: distance from the sensor on the ground, metres (3D); None in 2D.
        rows: row in the first and in the second answer; None where it has no partner.
    """

    kind: Kind
    name: str
    renamed_to: str | None
    score: float
    score_shift: float
    crossed: bool
    moved: float
    range_m: float | None
    rows: tuple[int | None, int | None]


@dataclass(frozen=True)
class _Side:
    """Detections of one answer that count, or may be partners: names, scores, places."""

    rows: npt.NDArray[np.int64]
    names: list[str]
    scores: Floats
    boxes: Floats  # (N, 2) centres on the ground, or (N, 4) corners in pixels
    frame: str | None  # of 3D boxes

    @property
    def is_3d(self) -> bool:
        return self.frame is not None

    def range_of(self, row: int) -> float | None:
        return float(np.hypot(*self.boxes[row])) if self.is_3d else None


def find_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], rules: ChangeRules | None = None
) -> list[Change]:
    """Compare the detections of two answers to one frame (docs/answers.md).

    Raises:
        SettingsError: one of the answers has no detections but labels, or their boxes are in different frames.
    """
    rules = rules or ChangeRules()
    one, two = _read(before, rules.lowest), _read(after, rules.lowest)
    if one.frame != two.frame:
        raise SettingsError(
            f"one answer has {_FRAMES[one.frame]} and the other {_FRAMES[two.frame]}; compare versions of one model"
        )
    cost = _cost(one, two, rules)
    same = np.array(one.names, np.str_)[:, None] == np.array(two.names, np.str_)[None]
    paired = _pair(np.where(same, cost, np.inf))
    left = cost.copy()
    for a, b in paired:
        left[a, :] = left[:, b] = np.inf
    paired += _pair(left)
    return list(_describe(one, two, paired, cost, rules))


def _describe(
    one: _Side, two: _Side, paired: list[tuple[int, int]], cost: Floats, rules: ChangeRules
) -> Iterator[Change]:
    unit = rules.distance_m if one.is_3d else 1 - rules.iou
    for a, b in paired:
        if max(one.scores[a], two.scores[b]) < rules.score_thr:
            continue
        renamed = one.names[a] != two.names[b]
        yield Change(
            "renamed" if renamed else "matched",
            one.names[a],
            two.names[b] if renamed else None,
            float(one.scores[a]),
            float(two.scores[b] - one.scores[a]),
            bool(min(one.scores[a], two.scores[b]) < rules.score_thr),
            float(cost[a, b] * unit),
            one.range_of(a),
            (int(one.rows[a]), int(two.rows[b])),
        )
    kinds: tuple[tuple[Kind, _Side, int], ...] = (("lost", one, 0), ("new", two, 1))
    for kind, side, column in kinds:
        partnered = {pair[column] for pair in paired}
        for k in range(len(side.names)):
            if k in partnered or side.scores[k] < rules.score_thr:
                continue
            row = int(side.rows[k])
            yield Change(
                kind,
                side.names[k],
                None,
                float(side.scores[k]),
                0.0,
                False,
                0.0,
                side.range_of(k),
                (row, None) if column == 0 else (None, row),
            )


def _read(answer: Mapping[str, Any], lowest: float) -> _Side:
    is_3d = "bboxes_3d" in answer
    ending = "_3d" if is_3d else ""
    if f"bboxes{ending}" not in answer:
        raise SettingsError("the answers have labels of points or pixels, not boxes; only boxes are compared")
    scores = np.asarray(answer[f"scores{ending}"], np.float64).reshape(-1)
    rows = np.flatnonzero(scores >= lowest)
    frame = answer.get("box_type_3d", "LiDAR") if is_3d else None
    if frame not in _FRAMES:
        raise SettingsError(f"the boxes are of an unknown kind: box_type_3d is {quote(str(frame))}")
    boxes = np.empty((0, 2 if is_3d else 4))
    if len(rows):
        boxes = np.asarray(answer[f"bboxes{ending}"], np.float64)[rows]
        if frame is not None:
            boxes = boxes[:, _GROUND[frame]]
    classes, labels = answer.get("classes") or (), answer[f"labels{ending}"]
    names = [str(classes[labels[k]]) if labels[k] < len(classes) else str(labels[k]) for k in rows]
    return _Side(rows, names, scores[rows], boxes, frame)


def _cost(one: _Side, two: _Side, rules: ChangeRules) -> Floats:
    """Measure every pair, (N, M): 0 at the same place, 1 at the limit, infinite beyond."""
    if one.is_3d:
        offsets = one.boxes[:, None] - two.boxes[None]
        cost = np.hypot(offsets[..., 0], offsets[..., 1]) / rules.distance_m
    else:
        cost = (1 - _iou(one.boxes, two.boxes)) / max(1 - rules.iou, 1e-9)
    return np.where(cost <= 1, cost, np.inf)


def _iou(one: Floats, two: Floats) -> Floats:
    """Compute the intersection over union of every pair of boxes x1, y1, x2, y2: (N, 4), (M, 4) to (N, M)."""
    low = np.maximum(one[:, None, :2], two[None, :, :2])
    high = np.minimum(one[:, None, 2:], two[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (one, two)]
    union = areas[0][:, None] + areas[1][None] - shared
    iou: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def _pair(cost: Floats) -> list[tuple[int, int]]:
    """Pair rows with columns, cheapest first; ties by row and column, so that the result is one."""
    paired: list[tuple[int, int]] = []
    order = np.argsort(cost, axis=None, kind="stable")
    order = order[: np.count_nonzero(np.isfinite(cost))]
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for a, b in zip(*np.unravel_index(order, cost.shape), strict=True):
        if a not in taken_rows and b not in taken_columns:
            taken_rows.add(int(a))
            taken_columns.add(int(b))
            paired.append((int(a), int(b)))
    return paired
