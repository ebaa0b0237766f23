"""Ties are told apart from mismatches, are bounded, and hide no real deviation."""

from __future__ import annotations

import copy
from typing import Any

from serve.compare.detections import compare
from serve.compare.ties import confirm_ties, find_ties
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


def test_a_box_exchanged_at_the_same_score_is_a_tie():
    one, two = boxes(), exchanged(boxes(), 3, score=1e-5)
    found = find_ties(compare(one, two), one, two)
    assert found.ok and found.ties == 1 and found.largest_box == 0
    assert "1 tied" in found.verdict()


def test_a_box_exchanged_at_another_score_is_a_mismatch():
    one, two = boxes(), exchanged(boxes(), 3, score=-0.003)
    assert not find_ties(compare(one, two), one, two).ok


def test_more_ties_than_the_share_are_a_mismatch():
    one, two = boxes(), exchanged(boxes(), *range(int(MAX_TIE_SHARE * COUNT) + 1))
    found = find_ties(compare(one, two), one, two)
    assert not found.ok and "MISMATCH" in found.verdict()


def test_a_detection_at_the_models_own_threshold_may_be_missing():
    one = boxes()
    two = {key: values[:-1] for key, values in one.items()}
    assert find_ties(compare(one, two), one, two).ok
    two = {key: values[1:] for key, values in one.items()}
    assert not find_ties(compare(one, two), one, two).ok


def test_a_tie_is_confirmed_by_a_variant_of_the_reference_that_has_it():
    one, two = boxes(), exchanged(boxes(), 3)
    found = compare(one, two)
    assert confirm_ties(found, one, two, [one, two]).ok
    assert not confirm_ties(found, one, two, [one, one]).ok


def test_a_box_that_no_variant_has_stays_a_mismatch():
    one, two = boxes(), exchanged(boxes(), 3)
    assert not confirm_ties(compare(one, two), one, two, [exchanged(boxes(), 4), exchanged(boxes(), 5)]).ok


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


def test_a_mask_may_differ_in_few_pixels_and_is_never_a_tie():
    for missing, same in ((4, True), (5, False)):
        one, two = masked(0), masked(missing)
        found = compare(one, two)
        assert found.ok is same
        assert find_ties(found, one, two).ties == 0
