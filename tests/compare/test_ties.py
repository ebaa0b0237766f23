"""Ties are told apart from mismatches, are bounded, and hide no real deviation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from serve.compare.detections import Comparison, compare, compare_answers
from serve.compare.labels import encode_labels, encode_segments
from serve.compare.ties import confirm_ties
from serve.compare.tolerances import MAX_TIE_SHARE, TOLERANCES, tolerances_for

COUNT = 40


def boxes(count: int = COUNT) -> dict[str, Any]:
    """Detections 100 px apart, with different scores."""
    return {
        "bboxes": [[100.0 * k, 0.0, 100.0 * k + 50, 60.0] for k in range(count)],
        "scores": [0.9 - 0.01 * k for k in range(count)],
        "labels": [k % 3 for k in range(count)],
    }


def exchanged(detections: dict[str, Any], *rows: int, score: float = 0.0) -> dict[str, Any]:
    """The same with other boxes in some rows, whose scores differ by `score`."""
    changed = copy.deepcopy(detections)
    for row in rows:
        changed["bboxes"][row] = [value + 7.0 for value in changed["bboxes"][row]]
        changed["scores"][row] += score
    return changed


def shifted(detections: dict[str, Any], row: int, px: float) -> dict[str, Any]:
    """The same with one box moved along x."""
    changed = copy.deepcopy(detections)
    changed["bboxes"][row][0] += px
    changed["bboxes"][row][2] += px
    return changed


def without(detections: dict[str, Any], row: int) -> dict[str, Any]:
    """The same less one detection."""
    return {key: [value for k, value in enumerate(values) if k != row] for key, values in detections.items()}


def confirmed(one: dict[str, Any], two: dict[str, Any], *variants: dict[str, Any]) -> Comparison:
    found = confirm_ties(compare(one, two), one, two, variants)
    assert isinstance(found, Comparison)
    return found


def test_a_box_that_a_variant_moves_as_far_is_a_tie():
    one, two = boxes(), exchanged(boxes(), 3, score=1e-5)
    found = confirmed(one, two, one, two)
    assert found.ok and found.ties == 1 and found.largest_box == 0
    assert "1 tied" in found.verdict()


def test_an_equal_score_alone_makes_no_tie():
    one, two = boxes(), exchanged(boxes(), 3, score=1e-5)
    assert not confirmed(one, two, one, one).ok
    assert not confirmed(one, two, one, exchanged(boxes(), 4), exchanged(boxes(), 5)).ok


def test_a_box_farther_off_than_twice_what_rounding_does_is_a_mismatch():
    one = boxes()
    for px, same in ((0.04, True), (0.9, True), (1.9, True), (2.1, False)):
        assert confirmed(one, shifted(one, 3, px), shifted(one, 3, -1.0)).ok is same


def test_rounding_that_moves_one_detection_excuses_no_other():
    one = boxes()
    assert not confirmed(one, shifted(one, 4, 1.0), shifted(one, 3, 1.0)).ok


def test_another_label_is_a_tie_only_if_a_variant_has_it():
    one = boxes()
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    two["labels"][3], three["labels"][3] = 1, 2
    assert confirmed(one, two, two).ok
    assert not confirmed(one, two, three).ok
    assert not confirmed(one, two, shifted(one, 3, 1.0)).ok


def test_a_score_that_a_variant_moves_as_far_is_a_tie():
    one, two, three = boxes(), boxes(), boxes()
    two["scores"][3] += 0.01
    three["scores"][3] -= 0.008
    assert confirmed(one, two, three).ok
    assert not confirmed(one, two, shifted(one, 3, 1.0)).ok


def test_a_missing_detection_is_a_tie_only_if_a_variant_lacks_it():
    one = boxes()
    assert confirmed(one, without(one, 3), without(one, 3)).ok
    assert not confirmed(one, without(one, 3), without(one, 4)).ok


def test_a_further_detection_is_a_tie_only_if_a_variant_has_it_or_one_beside_it():
    one, two = without(boxes(), 3), boxes()
    assert confirmed(one, two, two).ok
    assert not confirmed(one, two, one).ok
    beside = shifted(boxes(), 3, 1.0)
    assert not confirmed(one, two, beside).ok  # nothing else moves
    assert confirmed(one, two, shifted(beside, 5, 1.0)).ok


def test_a_missing_detection_is_a_tie_where_the_model_cuts_the_scores():
    one = boxes()
    assert confirmed(one, without(one, COUNT - 1), one).ok
    assert confirmed(without(one, COUNT - 1), one, without(one, COUNT - 1)).ok
    assert not confirmed(one, without(one, COUNT - 2), one).ok


def test_more_ties_than_the_share_are_a_mismatch_unless_rounding_moves_as_many():
    rows = range(int(MAX_TIE_SHARE * COUNT) + 1)
    one, two = boxes(), exchanged(boxes(), *rows)
    found = confirmed(one, two, *(exchanged(boxes(), row) for row in rows))
    assert not found.ok and "MISMATCH" in found.verdict()
    assert confirmed(one, two, two).ok


def test_variants_are_asked_only_as_far_as_needed():
    one, two = boxes(), exchanged(boxes(), 3)
    asked = []

    def variants() -> Iterator[dict[str, Any]]:
        for variant in (one, two, one):
            asked.append(variant)
            yield variant

    assert confirm_ties(compare(one, one), one, one, variants()).ok and not asked
    assert confirm_ties(compare(one, two), one, two, variants()).ok and len(asked) == 2


def points(*changed: int) -> dict[str, Any]:
    """1,000 labelled points, of which some have another label."""
    labels = np.arange(1000) % 5
    labels[list(changed)] += 1
    return {"pts_semantic_mask": encode_labels(labels)}


def test_labels_of_points_are_tied_if_a_variant_changes_them():
    one, two = points(), points(1, 2, 3)
    found = compare_answers(one, two)
    assert not found.ok
    assert confirm_ties(found, one, two, [points(1, 2), points(2, 3)]).ok
    assert "3 tied" in confirm_ties(found, one, two, [points(1, 2, 3)]).verdict()
    assert not confirm_ties(found, one, two, [points(4, 5, 6)]).ok


def test_more_tied_labels_than_the_share_are_a_mismatch_unless_rounding_moves_as_many():
    rows = range(int(MAX_TIE_SHARE * 1000) + 2)
    one, two = points(), points(*rows)
    found = compare_answers(one, two)
    assert not confirm_ties(found, one, two, [points(*rows[::2]), points(*rows[1::2])]).ok
    assert confirm_ties(found, one, two, [points(*rows)]).ok


def panoptic(width: int) -> dict[str, Any]:
    """A thing of some columns on the left of an image of 40 x 40, before the sky."""
    ids = np.ones((40, 40), np.int64)
    ids[:, :width] = 1000
    return encode_segments(ids, ("thing", "sky"))


def test_pixels_of_segments_are_tied_if_a_variant_changes_them():
    one, two = panoptic(20), panoptic(21)
    found = compare_answers(one, two)
    assert not found.ok
    assert confirm_ties(found, one, two, [panoptic(22)]).ok
    assert not confirm_ties(found, one, two, [panoptic(19)]).ok


def test_limits_follow_the_precision_of_the_device():
    assert tolerances_for("cpu", "fp16") is TOLERANCES["float32"]
    assert tolerances_for("cuda:0") is TOLERANCES["tf32"]
    assert tolerances_for("cuda:1", "bf16") is TOLERANCES["bf16"]


def test_the_size_of_a_large_3d_box_may_deviate_by_a_share_of_itself():
    one = {
        "bboxes_3d": [[0.0, 0, 0, 50, 2, 2, 0]],
        "scores_3d": [0.9],
        "labels_3d": [0],
        "box_type_3d": "LiDAR",
    }
    for column, off, same in ((3, 0.008, True), (3, 0.02, False), (4, 0.008, False), (0, 0.008, False)):
        two = copy.deepcopy(one)
        two["bboxes_3d"][0][column] += off
        assert compare(one, two).ok is same


def masked(missing: int) -> dict[str, Any]:
    """One detection whose mask is a square of 100 pixels less `missing` of its first column."""
    runs = [missing, 10 - missing, *[30, 10] * 9, 1600 - 370]  # zeros and ones in turn, column by column
    return {**boxes(1), "masks": [{"size": [40, 40], "counts": encode_runs(runs)}]}


def encode_runs(runs: list[int]) -> str:
    from pycocotools import mask as coco

    return coco.frPyObjects({"size": [40, 40], "counts": runs}, 40, 40)["counts"].decode()


def test_a_mask_may_differ_in_few_pixels():
    for missing, same in ((4, True), (5, False)):
        assert compare(masked(0), masked(missing)).ok is same


def test_a_mask_is_tied_if_a_variant_changes_it_as_much():
    one, two = masked(0), masked(8)
    assert confirmed(one, two, masked(5)).ok
    assert not confirmed(one, two, masked(3)).ok
    assert not confirmed(one, two, one).ok
