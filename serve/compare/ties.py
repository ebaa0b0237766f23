"""Set apart detections that differ because scores are tied, not because the model differs.

Non-maximum suppression and top-k keep the better of two candidates. If their scores are equal within the tolerance,
rounding decides, and the two sides keep different ones. How many may be tied is bounded (`MAX_TIE_SHARE`): altered
weights move most detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from serve.compare.detections import Comparison, compare

__all__ = ["confirm_ties", "find_ties"]


def find_ties(found: Comparison, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Comparison:
    """Set ties apart by the scores alone, where only a recorded answer is at hand.

    Tied are pairs of equal score whose boxes or labels differ, unmatched detections for which the other side has
    an unmatched one of the same score, and unmatched ones at the lowest score, where the model's own threshold cuts.

    Args:
        found: comparison of the two.
        expected: detections of the reference.
        actual: detections under test.
    """
    if found.ok or found.problems:
        return found
    limit = found.tolerances.score
    box = found.tolerances.box_m if found.is_3d else found.tolerances.box_px
    pairs = [
        pair
        for pair in found.pairs
        if pair.score <= limit
        and (
            pair.box > box or pair.yaw > found.tolerances.yaw_rad or pair.expected_label != pair.actual_label
        )
    ]
    tied = ({pair.expected for pair in pairs}, {pair.actual for pair in pairs})
    scores = [
        np.asarray(side.get("scores_3d", side.get("scores", ())), np.float64) for side in (expected, actual)
    ]
    unmatched = (found.unmatched_expected, found.unmatched_actual)
    lowest = [float(side.min(initial=np.inf)) for side in scores]
    for own, other in ((0, 1), (1, 0)):
        for k in unmatched[own]:
            partners = np.abs(scores[other][list(unmatched[other])] - scores[own][k]) <= limit
            if partners.any() or scores[own][k] - min(lowest) <= limit:
                tied[own].add(k)
    return replace(found, tied_expected=frozenset(tied[0]), tied_actual=frozenset(tied[1]))


def confirm_ties(
    found: Comparison,
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    variants: Sequence[Mapping[str, Any]],
) -> Comparison:
    """Set ties apart by what the reference itself gives when its weights are changed by as little as rounding changes.

    A detection of the reference is tied if one of the variants lacks it, one of the other side if one of the variants
    has it. So a detection that the reference never gives stays a mismatch, whatever its score.

    Args:
        found: comparison of the two.
        expected: detections of the reference.
        actual: detections under test.
        variants: detections of the changed references.
    """
    if found.ok or found.problems:
        return found
    limits, threshold = found.tolerances, found.score_thr
    lacking: set[int] = set()
    having: set[int] = set()
    for variant in variants:
        kept = {pair.expected for pair in compare(expected, variant, limits, threshold).pairs if pair.ok}
        lacking |= set(range(found.expected_count)) - kept
        having |= {pair.actual for pair in compare(variant, actual, limits, threshold).pairs if pair.ok}
    pairs = [
        pair for pair in found.pairs if not pair.ok and pair.expected in lacking and pair.actual in having
    ]
    return replace(
        found,
        tied_expected=frozenset(
            {pair.expected for pair in pairs} | (lacking & set(found.unmatched_expected))
        ),
        tied_actual=frozenset({pair.actual for pair in pairs} | (having & set(found.unmatched_actual))),
    )
