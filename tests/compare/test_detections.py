"""`serve.compare.detections`: sets of detections are matched one to one, whatever their order."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from serve.compare.detections import Tolerances, compare
from serve.errors import SettingsError
from serve.verify.report import comparison_table

FACTORS_ABOVE = st.floats(1.01, 1e5)
FACTORS_BELOW = st.floats(-0.99, 0.99)


def clouds_of_boxes(seed: int, count: int, *, columns: int = 7, spread: float = 40.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-spread, spread, (count, columns))
    boxes[:, 3:6] = rng.uniform(0.5, 5, (count, 3))
    boxes[:, 6] = rng.uniform(-math.pi, math.pi, count)
    return {
        "bboxes_3d": boxes.tolist(),
        "scores_3d": rng.uniform(0.3, 1, count).tolist(),
        "labels_3d": rng.integers(0, 3, count).tolist(),
        "box_type_3d": "LiDAR",
    }


def image_boxes(seed: int, count: int, *, masks: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 30, (count, 2))], 1)
    answer: dict[str, Any] = {
        "bboxes": boxes.tolist(),
        "scores": rng.uniform(0.3, 1, count).tolist(),
        "labels": rng.integers(0, 80, count).tolist(),
    }
    if masks:
        answer["masks"] = [rle(filled(box)) for box in boxes]
    return answer


def filled(box: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = box.astype(int)
    mask = np.zeros((100, 100), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def copy(detections: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [list(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value
        for key, value in detections.items()
    }


def reordered(detections: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in detections.items()}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 40), st.sampled_from(["7", "9", "2d", "masks"]), st.randoms())
def test_shuffled_detections_match_without_deviation(seed: int, count: int, kind: str, random: Any) -> None:
    if kind in "79":
        detections = clouds_of_boxes(seed, count, columns=int(kind))
    else:
        detections = image_boxes(seed, count, masks=kind == "masks")
    order = list(range(count))
    random.shuffle(order)
    found = compare(detections, reordered(detections, order))
    assert found.ok, comparison_table(found)
    assert [order[pair.actual] for pair in found.pairs] == list(range(count))
    assert found.largest_box == found.largest_yaw == found.largest_score == 0
    assert "match" in found.verdict()


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(0, 8), st.data())
def test_single_value_beyond_its_tolerance_is_a_mismatch(
    seed: int, count: int, column: int, data: Any
) -> None:
    tol = Tolerances()
    detections = clouds_of_boxes(seed, count)
    changed = copy(detections)
    row = data.draw(st.integers(0, count - 1))
    sign = data.draw(st.sampled_from([-1, 1]))
    if column == 8:
        changed["labels_3d"][row] += 1
    elif column == 7:
        changed["scores_3d"][row] += sign * tol.score * data.draw(st.floats(1.01, 1e4))
    elif column == 6:
        changed["bboxes_3d"][row][6] += sign * data.draw(st.floats(1.01 * tol.yaw_rad, math.pi))
    else:
        size = detections["bboxes_3d"][row][5 if column == 2 else column] if column >= 2 else 0.0
        limit = tol.box_m + tol.size_share * abs(size)
        changed["bboxes_3d"][row][column] += sign * limit * data.draw(FACTORS_ABOVE)
    found = compare(detections, changed)
    assert not found.ok
    assert sum(not pair.ok for pair in found.pairs) + len(found.unmatched_expected) >= 1
    assert "MISMATCH" in comparison_table(found)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 30), st.randoms(), st.data())
def test_values_within_their_tolerances_match(seed: int, count: int, random: Any, data: Any) -> None:
    tol = Tolerances()
    detections = clouds_of_boxes(seed, count)
    changed = copy(detections)
    for row in range(count):
        factors = [data.draw(FACTORS_BELOW) for _ in range(3)]
        column = data.draw(st.integers(0, 5))
        changed["bboxes_3d"][row][column] += factors[0] * tol.box_m
        changed["bboxes_3d"][row][6] += factors[1] * tol.yaw_rad + random.choice([-2, 0, 2]) * math.pi
        changed["scores_3d"][row] += factors[2] * tol.score
    order = list(range(count))
    random.shuffle(order)
    found = compare(detections, reordered(changed, order))
    assert found.ok, comparison_table(found)
    assert found.largest_box <= tol.box_m


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize(("pixels", "equal"), [(0.049, True), (0.051, False), (-3.0, False)])
def test_corners_are_compared_in_pixels(column: int, pixels: float, equal: bool) -> None:
    detections = image_boxes(3, 12)
    changed = copy(detections)
    changed["bboxes"][5][column] += pixels
    found = compare(detections, changed)
    assert found.ok is equal
    assert found.largest_box == pytest.approx(abs(pixels))
    assert len(found.pairs) == 12


def test_no_detections_on_both_sides_match() -> None:
    for empty in (clouds_of_boxes(0, 0), image_boxes(0, 0), {**image_boxes(0, 0), "masks": []}):
        found = compare(empty, empty, score_thr=0.3)
        assert found.ok
        assert comparison_table(found) == "match: no detections on either side at score >= 0.3"


def test_no_detections_against_some_is_a_mismatch() -> None:
    some, none = clouds_of_boxes(1, 2), clouds_of_boxes(1, 0)
    assert compare(some, none).unmatched_expected == (0, 1)
    assert compare(none, some).unmatched_actual == (0, 1)
    assert not compare(some, none).ok


@pytest.mark.parametrize("missing_side", ["native", "served"])
def test_unmatched_detection_at_the_threshold_is_borderline(missing_side: str) -> None:
    detections = clouds_of_boxes(2, 6)
    detections["scores_3d"][4] = 0.3 + 0.9 * Tolerances().score
    fewer = reordered(detections, [0, 1, 2, 3, 5])
    sides = (fewer, detections) if missing_side == "native" else (detections, fewer)
    found = compare(*sides, score_thr=0.3)
    assert found.ok
    assert found.borderline_expected + found.borderline_actual == (4,)
    assert "borderline" in comparison_table(found) and "(not counted)" in found.verdict()
    detections["scores_3d"][4] = 0.3 + 1.1 * Tolerances().score
    assert not compare(*sides, score_thr=0.3).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("key", ["bboxes_3d", "scores_3d", "labels_3d"])
def test_nan_is_a_mismatch_even_against_itself(key: str, value: float | None) -> None:
    detections = clouds_of_boxes(5, 3)
    if key == "bboxes_3d":
        detections[key][1][2] = value
    else:
        detections[key][1] = value
    found = compare(detections, detections)
    assert not found.ok
    assert "NaN" in comparison_table(found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores_3d": [0.5]}, "malformed"),
        ({"bboxes_3d": [[1, 2]] * 3}, "at least 7"),
        ({"bboxes_3d": [[1.0] * 9] * 3}, "served ones 9"),
        ({"labels_3d": "car"}, "malformed"),
        ({"labels_3d": None}, "malformed"),
        ({"names": ["Car"]}, "1 names for 3 scores"),
        ({"box_type_3d": "Camera"}, "box_type_3d"),
        ({"masks": [{}] * 3}, "only served detections have masks"),
    ],
)
def test_malformed_detections_are_a_mismatch_with_a_problem(change: dict[str, Any], sentence: str) -> None:
    detections = clouds_of_boxes(6, 3)
    found = compare(detections, {**detections, **change})
    assert not found.ok
    assert sentence in comparison_table(found)


def test_missing_key_is_named() -> None:
    detections = clouds_of_boxes(6, 3)
    found = compare(detections, {k: v for k, v in detections.items() if k != "scores_3d"})
    assert "served detections are malformed: 'scores_3d' is missing" in comparison_table(found)


def test_3d_against_2d_boxes_are_a_mismatch() -> None:
    found = compare(clouds_of_boxes(6, 3), image_boxes(6, 3))
    assert not found.ok
    assert "native detections are 3D and served ones 2D" in comparison_table(found)


def test_same_label_under_another_name_is_a_mismatch() -> None:
    detections = clouds_of_boxes(6, 2)
    found = compare(
        {**detections, "names": ["Car", "Car"], "labels_3d": [0, 0]},
        {**detections, "names": ["Car", "Van"], "labels_3d": [0, 0]},
    )
    assert not found.ok
    assert "'Car'" in comparison_table(found) and "'Van'" in comparison_table(found)


def test_wrong_label_is_paired_by_its_box_and_named() -> None:
    detections = clouds_of_boxes(7, 20)
    changed = copy(detections)
    changed["labels_3d"][9] = 2 if detections["labels_3d"][9] != 2 else 0
    found = compare(detections, changed)
    assert (found.wrong_labels, len(found.pairs), found.ok) == (1, 20, False)
    assert "label differs" in comparison_table(found)


def test_full_turns_match_and_opposite_headings_do_not() -> None:
    detections = clouds_of_boxes(8, 4)
    turned = copy(detections)
    turned["bboxes_3d"][2][6] += 2 * math.pi
    assert compare(detections, turned).ok
    turned["bboxes_3d"][2][6] += math.pi
    found = compare(detections, turned)
    assert not found.ok
    assert found.largest_yaw == pytest.approx(math.pi)


def test_near_duplicates_pair_with_least_total_deviation() -> None:
    """A greedy nearest-first choice would leave one of these without a partner."""
    detections = clouds_of_boxes(9, 1)
    base = detections["bboxes_3d"][0]

    def at(*offsets: float) -> dict[str, Any]:
        count = len(offsets)
        return {
            "bboxes_3d": [[base[0] + offset, *base[1:]] for offset in offsets],
            "scores_3d": [0.5] * count,
            "labels_3d": [0] * count,
            "box_type_3d": "LiDAR",
        }

    assert compare(at(0.0, 0.9e-4), at(1.0e-4 * 0.99, 1.8e-4)).ok
    assert compare(at(*[0.0] * 50), at(*[0.0] * 50)).ok


def test_duplicate_detection_matches_once() -> None:
    detections = clouds_of_boxes(10, 5)
    found = compare(detections, reordered(detections, [0, 1, 2, 3, 4, 4]))
    assert not found.ok
    assert len(found.unmatched_actual) == 1


def test_masks_are_compared_by_iou() -> None:
    detections = image_boxes(11, 6, masks=True)
    changed = copy(detections)
    found = compare(detections, changed)
    assert found.smallest_mask_iou == 1.0 and "mask IoU" in comparison_table(found)
    mask = filled(np.asarray(detections["bboxes"][3]))
    rows = np.nonzero(mask)[0]
    mask[rows[0], :] = 0
    changed["masks"][3] = rle(mask)
    found = compare(detections, changed)
    assert not found.ok
    height = len(np.unique(rows))
    assert found.smallest_mask_iou == pytest.approx(1 - 1 / height)
    assert compare(detections, changed, Tolerances(mask_iou=0.5)).ok


def test_two_empty_masks_are_equal() -> None:
    detections = image_boxes(12, 1)
    detections["masks"] = [rle(np.zeros((20, 20), np.uint8))]
    assert compare(detections, detections).ok


@pytest.mark.parametrize(
    "mask", [{"size": [10, 10]}, {}, "text", None, {"size": [7, 7], "counts": "0"}], ids=repr
)
def test_malformed_masks_are_a_mismatch_with_a_problem(mask: Any) -> None:
    detections = image_boxes(13, 2, masks=True)
    found = compare(detections, {**detections, "masks": [mask, mask]})
    assert not found.ok
    assert "masks are" in comparison_table(found)


@pytest.mark.timing
def test_thousands_of_detections_compare_within_a_second() -> None:
    detections = clouds_of_boxes(14, 5000)
    order = np.random.default_rng(0).permutation(5000).tolist()
    started = time.perf_counter()
    assert compare(detections, reordered(detections, order)).ok
    assert not compare(detections, clouds_of_boxes(15, 5000)).ok
    assert time.perf_counter() - started < 10


def test_long_table_is_shortened_with_the_worst_first() -> None:
    detections = clouds_of_boxes(16, 100)
    changed = copy(detections)
    changed["bboxes_3d"][70][0] += 0.5
    table = comparison_table(compare(detections, changed), 5)
    assert table.splitlines()[1].startswith("FAIL  #70")
    assert "and 95 more" in table
    assert len(table.splitlines()) == 8


@pytest.mark.parametrize(
    "limits", [{"box_m": -1.0}, {"score": math.nan}, {"mask_iou": 2.0}, {"yaw_rad": math.inf}]
)
def test_impossible_tolerances_are_rejected(limits: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Tolerances(**limits)


def test_table_uses_the_names_of_the_sides() -> None:
    found = compare(clouds_of_boxes(1, 2), clouds_of_boxes(1, 0), sides=("golden", "now"))
    assert "only golden" in comparison_table(found)
