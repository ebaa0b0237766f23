"""Set apart what differs because rounding decides it, not because the model differs.

Non-maximum suppression and top-k keep the better of two candidates, point networks the points within a radius or the
farthest ones, masks and labels the side of a threshold on which a value lies. Where a value lies within a rounding of
such a limit, two correct computations of the same model differ by more than a rounding.

How much rounding moves an answer is a property of the model and the frame, and is measured: variants of the model at
hand, whose weights are changed by as little as rounding changes them, give their answers. A difference is a tie if the
variants differ as much in the same place. A detection that one side lacks is a tie as well if its score is the lowest
within the tolerance, where the model's own threshold, or its largest number of detections, cuts. How many may be tied
is bounded: by what the variants change, or by `MAX_TIE_SHARE`. Altered weights move detections that no variant moves,
or move them farther.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.compare.detections import Comparison, Pair, compare
from serve.compare.labels import LabelComparison, label_differences

__all__ = ["VARIANTS", "confirm_ties"]

#: Variants of a model to ask, numbered from 1; a difference of equal chances is missed by all of them once in 64 times.
VARIANTS = 6
# The other side may lie beyond what a few variants show, on the other side of the reference as well.
_MARGIN = 2.0


class _Deviation(NamedTuple):
    """What two detections differ by: metres or pixels, radians, score, one less the masks' IoU."""

    box: float = 0.0
    yaw: float = 0.0
    score: float = 0.0
    mask: float = 0.0

    @classmethod
    def of(cls, pair: Pair) -> _Deviation:
        return cls(pair.box, pair.yaw, pair.score, 0.0 if pair.mask_iou is None else 1.0 - pair.mask_iou)

    def widened(self, other: _Deviation) -> _Deviation:
        return _Deviation(*map(max, self, other))

    def covers(self, other: _Deviation, limits: _Deviation) -> bool:
        """Whether `other` is within `limits`, or within what rounding does."""
        return all(
            value <= max(limit, _MARGIN * own) for value, limit, own in zip(other, limits, self, strict=True)
        )


def confirm_ties(
    found: Comparison | LabelComparison,
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    variants: Iterable[Mapping[str, Any]],
) -> Comparison | LabelComparison:
    """Set ties apart by what the model of the expected side gives when its weights are changed by some roundings.

    Args:
        found: comparison of the two.
        expected: predictions of the model at hand.
        actual: predictions of the other side.
        variants: predictions of the changed models; as many are taken as are needed.

    Returns:
        The comparison with its ties; `found` itself if it is a match, or beyond comparing.
    """
    if found.ok or found.problems:
        return found
    if isinstance(found, LabelComparison):
        return _confirm_labels(found, expected, actual, variants)
    observed = _Observed(found, _at_the_cut(found, expected, actual))
    for variant in variants:
        observed.add(
            compare(expected, variant, found.tolerances, found.score_thr),
            compare(variant, actual, found.tolerances, found.score_thr),
        )
        confirmed = observed.judge(found)
        if confirmed.ok:
            return confirmed
        found = confirmed
    return found


class _Observed:
    """What the variants did to the detections of the expected side."""

    def __init__(self, found: Comparison, at_the_cut: tuple[set[int], set[int]]) -> None:
        limits = found.tolerances
        self._at_the_cut = at_the_cut
        self._limits = _Deviation(
            limits.box_m if found.is_3d else limits.box_px, limits.yaw_rad, limits.score, 1 - limits.mask_iou
        )
        self._moved: dict[int, _Deviation] = defaultdict(_Deviation)
        self._labels: dict[int, set[int]] = defaultdict(set)
        self._lacking: set[int] = set()
        self._near: dict[int, list[_Deviation]] = defaultdict(
            list
        )  # of the other side: to an extra of a variant
        self._most = 0

    def add(self, moved: Comparison, other: Comparison) -> None:
        """Take a variant: its comparison with the expected side, and with the actual one."""
        for pair in moved.pairs:
            self._moved[pair.expected] = self._moved[pair.expected].widened(_Deviation.of(pair))
            self._labels[pair.expected].add(pair.actual_label)
        self._lacking |= {*moved.unmatched_expected, *moved.borderline_expected}
        extra = {*moved.unmatched_actual, *moved.borderline_actual}
        for pair in other.pairs:
            same_label = pair.expected_label == pair.actual_label
            if pair.ok or (pair.expected in extra and same_label):
                self._near[pair.actual].append(_Deviation() if pair.ok else _Deviation.of(pair))
        self._most = max(self._most, moved.failing)

    def judge(self, found: Comparison) -> Comparison:
        """Return the comparison with the ties that the variants taken so far confirm."""
        farthest = _Deviation()
        for deviation in self._moved.values():
            farthest = farthest.widened(deviation)
        appears = {
            row
            for row, near in self._near.items()
            if any(farthest.covers(each, self._limits) for each in near)
        }
        pairs = [
            pair
            for pair in found.pairs
            if not pair.ok
            and (self._explains(pair) or (pair.expected in self._lacking and pair.actual in appears))
        ]
        lacking, appears = (
            mine & set(unmatched) | cut
            for mine, unmatched, cut in zip(
                (self._lacking, appears),
                (found.unmatched_expected, found.unmatched_actual),
                self._at_the_cut,
                strict=True,
            )
        )
        return replace(
            found,
            tied_expected=frozenset({pair.expected for pair in pairs} | lacking),
            tied_actual=frozenset({pair.actual for pair in pairs} | appears),
            moved_by_rounding=self._most,
        )

    def _explains(self, pair: Pair) -> bool:
        labels = self._labels[pair.expected] | {pair.expected_label}
        return pair.actual_label in labels and self._moved[pair.expected].covers(
            _Deviation.of(pair), self._limits
        )


def _at_the_cut(
    found: Comparison, expected: Mapping[str, Any], actual: Mapping[str, Any]
) -> tuple[set[int], set[int]]:
    """Unmatched detections of both sides whose score is the lowest within the tolerance."""
    scores = [
        np.asarray(side.get("scores_3d", side.get("scores", ())), np.float64) for side in (expected, actual)
    ]
    lowest = min(float(side.min(initial=np.inf)) for side in scores)
    one, two = (
        {row for row in unmatched if side[row] - lowest <= found.tolerances.score}
        for side, unmatched in zip(scores, (found.unmatched_expected, found.unmatched_actual), strict=True)
    )
    return one, two


def _confirm_labels(
    found: LabelComparison,
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    variants: Iterable[Mapping[str, Any]],
) -> LabelComparison:
    """Set apart labels of points or pixels that a variant changes too."""
    differing = label_differences(expected, actual)
    changed: NDArray[np.bool_] = np.zeros_like(differing)
    most = 0
    for variant in variants:
        own = label_differences(expected, variant)
        changed, most = changed | own, max(most, int(own.sum()))
        found = replace(found, tied=int((differing & changed).sum()), moved_by_rounding=most)
        if found.ok:
            break
    return found
