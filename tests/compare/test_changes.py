"""Pairing of the detections of two versions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.compare.changes import Change, ChangeRules, find_changes
from serve.errors import SettingsError

CLASSES = ["Car", "Pedestrian"]


def answer(*found: tuple[str, float, float, float], kind: str = "LiDAR") -> dict[str, Any]:
    """A 3D answer: class, score, and two coordinates on the ground of each detection."""
    ground = {"LiDAR": (0, 1), "Camera": (0, 2)}[kind]
    boxes = np.ones((len(found), 7))
    for row, each in zip(boxes, found, strict=True):
        row[list(ground)] = each[2:]
    return {
        "bboxes_3d": boxes.tolist(),
        "scores_3d": [each[1] for each in found],
        "labels_3d": [CLASSES.index(each[0]) for each in found],
        "classes": CLASSES,
        "box_type_3d": kind,
    }


def image(*found: tuple[str, float, list[float]]) -> dict[str, Any]:
    return {
        "bboxes": [each[2] for each in found],
        "scores": [each[1] for each in found],
        "labels": [CLASSES.index(each[0]) for each in found],
        "classes": CLASSES,
    }


def kinds(changes: list[Change]) -> list[str]:
    return sorted(f"{each.kind} {each.name}" for each in changes)


def test_the_nearest_of_a_class_are_paired_and_the_rest_is_lost_or_new() -> None:
    before = answer(("Car", 0.9, 10, 0), ("Car", 0.8, 11.5, 0), ("Car", 0.7, 50, 0))
    after = answer(("Car", 0.6, 11.4, 0), ("Car", 0.9, 10.2, 0), ("Pedestrian", 0.5, -5, 0))
    changes = find_changes(before, after)
    assert kinds(changes) == ["lost Car", "matched Car", "matched Car", "new Pedestrian"]
    rows = {each.rows: each for each in changes}
    assert rows[(0, 1)].moved == pytest.approx(0.2) and rows[(1, 0)].score_shift == pytest.approx(-0.2)
    assert rows[(2, None)].range_m == pytest.approx(50) and rows[(None, 2)].range_m == pytest.approx(5)


def test_another_class_at_the_same_place_is_a_renaming() -> None:
    changes = find_changes(answer(("Car", 0.9, 10, 0)), answer(("Pedestrian", 0.8, 10.5, 0)))
    assert [(each.kind, each.name, each.renamed_to) for each in changes] == [("renamed", "Car", "Pedestrian")]


def test_its_own_class_comes_before_a_nearer_one_of_another() -> None:
    before = answer(("Car", 0.9, 10, 0))
    after = answer(("Pedestrian", 0.8, 10, 0), ("Car", 0.8, 11.9, 0))
    assert kinds(find_changes(before, after)) == ["matched Car", "new Pedestrian"]


@pytest.mark.parametrize(("score", "expected"), [(0.2, ["matched Car"]), (0.1, ["lost Car"])])
def test_a_score_that_falls_below_the_threshold_is_a_shift_down_to_the_low_score(
    score: float, expected: list[str]
) -> None:
    changes = find_changes(answer(("Car", 0.35, 10, 0)), answer(("Car", score, 10, 0)))
    assert kinds(changes) == expected
    assert changes[0].crossed == (expected == ["matched Car"])


def test_pairs_below_the_threshold_on_both_sides_do_not_count() -> None:
    assert find_changes(answer(("Car", 0.2, 10, 0)), answer(("Car", 0.25, 10, 0))) == []


def test_camera_boxes_are_compared_on_the_plane_of_x_and_z() -> None:
    before = answer(("Car", 0.9, 1, 20), kind="Camera")
    after = answer(("Car", 0.9, 1, 21), kind="Camera")
    (change,) = find_changes(before, after)
    assert change.kind == "matched" and change.moved == pytest.approx(1)
    assert change.range_m == pytest.approx(np.hypot(1, 20))


@pytest.mark.parametrize(("right", "expected"), [(14, "matched"), (31, "lost")])
def test_boxes_of_an_image_are_paired_by_their_overlap(right: float, expected: str) -> None:
    before, after = image(("Car", 0.9, [0, 0, 10, 10])), image(("Car", 0.9, [0, 0, right, 10]))
    changes = find_changes(before, after)
    assert changes[0].kind == expected and changes[0].range_m is None
    if expected == "matched":
        assert changes[0].moved == pytest.approx(1 - 10 / right)


def test_boxes_without_an_area_and_empty_answers_are_no_error() -> None:
    flat = image(("Car", 0.9, [5, 5, 5, 5]))
    assert kinds(find_changes(flat, flat)) == ["lost Car", "new Car"]
    assert find_changes(image(), image()) == [] and find_changes(answer(), answer()) == []
    assert kinds(find_changes(answer(), answer(("Car", 0.9, 1, 1)))) == ["new Car"]


DETECTIONS = st.lists(
    st.tuples(st.sampled_from(CLASSES), st.floats(0, 1), st.floats(-9, 9), st.floats(-9, 9)), max_size=5
)


@given(DETECTIONS, DETECTIONS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_every_detection_that_counts_is_in_one_change_and_swapping_swaps_lost_and_new(
    first: list[Any], second: list[Any]
) -> None:
    one, two = answer(*first), answer(*second)
    changes = find_changes(one, two)
    for column, found in ((0, first), (1, second)):
        rows = [each.rows[column] for each in changes if each.rows[column] is not None]
        assert len(rows) == len(set(rows))
        assert {k for k, each in enumerate(found) if each[1] >= 0.3} <= set(rows)
    back = find_changes(two, one)
    counted, counted_back = (Counter(each.kind for each in found) for found in (changes, back))
    assert counted["matched"] == counted_back["matched"] and counted["lost"] == counted_back["new"]


def test_an_answer_compared_with_itself_has_not_changed() -> None:
    same = answer(("Car", 0.9, 10, 0), ("Car", 0.9, 10.5, 0), ("Pedestrian", 0.3, 10, 0.2))
    changes = find_changes(same, same)
    assert all(each.kind == "matched" and not each.moved and not each.score_shift for each in changes)
    assert len(changes) == 3


def test_answers_of_different_kinds_are_refused() -> None:
    with pytest.raises(SettingsError):
        find_changes(answer(), image())
    with pytest.raises(SettingsError):
        find_changes({"pts_semantic_mask": {}}, {"pts_semantic_mask": {}})


@pytest.mark.parametrize(
    "values",
    [{"score_thr": 2}, {"low_score": 0.5}, {"distance_m": 0}, {"iou": 0}, {"distance_m": float("nan")}],
)
def test_rules_that_pair_nothing_or_everything_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        ChangeRules(**values)


def test_boxes_in_other_frames_or_of_an_unknown_kind_are_not_compared() -> None:
    lidar, camera = answer(("Car", 0.9, 10, 0)), answer(("Car", 0.9, 10, 0), kind="Camera")
    for pair in ((lidar, camera), (camera, lidar), ({**lidar, "box_type_3d": "Radar"}, lidar)):
        with pytest.raises(SettingsError):
            find_changes(*pair)
    assert kinds(find_changes(camera, camera)) == ["matched Car"]
