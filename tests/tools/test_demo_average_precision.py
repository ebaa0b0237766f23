"""Average precision against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.affinity import rotate, translate
from shapely.geometry import box as rectangle

from tools.demo.average_precision import (
    FrameDetections,
    FrameTruth,
    average_precision,
    bev_iou,
    evaluate_class,
)


def cuboid(x: float, y: float, dx: float = 4.0, dy: float = 2.0, yaw: float = 0.0) -> list[float]:
    return [x, y, -1.7, dx, dy, 1.5, yaw]


def found(boxes: list[list[float]], scores: list[float], label: int = 2) -> FrameDetections:
    return FrameDetections(
        np.array(boxes, dtype=np.float64).reshape(-1, 7),
        np.array(scores),
        np.full(len(scores), label, dtype=np.int64),
    )


def truth(boxes: list[list[float]], ignored: list[bool] | None = None, label: int = 2) -> FrameTruth:
    return FrameTruth(
        np.array(boxes, dtype=np.float64).reshape(-1, 7),
        np.full(len(boxes), label, dtype=np.int64),
        np.array(ignored if ignored is not None else [False] * len(boxes), dtype=bool),
    )


def test_iou_of_shifted_turned_and_distant_boxes() -> None:
    base = np.array([cuboid(0, 0)])
    others = np.array(
        [cuboid(0, 0), cuboid(2, 0), cuboid(0, 0, yaw=math.pi / 2), cuboid(0, 0, yaw=math.pi), cuboid(9, 9)]
    )
    # Shift by half the length: 4 of 12 m2. A quarter turn: the shared 2 x 2 square of 8 + 8 - 4.
    assert bev_iou(base, others)[0] == pytest.approx([1.0, 1 / 3, 1 / 3, 1.0, 0.0], abs=1e-6)
    assert bev_iou(base, np.zeros((0, 7))).shape == (1, 0)


number = st.floats(-3, 3)


@settings(max_examples=150, deadline=None)
@given(number, number, st.floats(0.3, 5), st.floats(0.3, 5), st.floats(-4, 4), st.floats(-4, 4))
def test_bev_iou_equals_shapely(x: float, y: float, dx: float, dy: float, yaw_a: float, yaw_b: float) -> None:
    first, second = cuboid(0, 0, 3.9, 1.6, yaw_a), cuboid(x, y, dx, dy, yaw_b)
    shapes = [
        translate(
            rotate(rectangle(-b[3] / 2, -b[4] / 2, b[3] / 2, b[4] / 2), b[6], (0, 0), use_radians=True),
            b[0],
            b[1],
        )
        for b in (first, second)
    ]
    shared = shapes[0].intersection(shapes[1]).area
    expected = shared / (shapes[0].area + shapes[1].area - shared)
    assert bev_iou(np.array([first]), np.array([second]))[0, 0] == pytest.approx(expected, abs=1e-5)


def test_ap_is_1_for_all_right_and_0_for_all_wrong() -> None:
    scores = np.array([0.9, 0.8])
    assert average_precision(scores, np.array([True, True]), 2) == (1.0, 1.0)
    assert average_precision(scores, np.array([False, False]), 2) == (0.0, 0.0)
    assert average_precision(np.zeros(0), np.zeros(0, dtype=bool), 2) == (0.0, 0.0)


def test_ap_without_ground_truth_is_nan() -> None:
    assert all(math.isnan(v) for v in average_precision(np.array([0.5]), np.array([False]), 0))


def test_ap_equals_a_hand_computed_case() -> None:
    """4 objects; right, wrong, right, wrong gives precision 1 up to recall 1/4 (10 of 40), 2/3 to 1/2."""
    ap, recall = average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]), 4)
    assert ap == pytest.approx((10 * 1.0 + 10 * 2 / 3) / 40)
    assert recall == 0.5


def test_equal_scores_count_together_in_any_order() -> None:
    scores = np.array([0.5, 0.5])
    assert average_precision(scores, np.array([True, False]), 1) == average_precision(
        scores, np.array([False, True]), 1
    )
    assert average_precision(scores, np.array([True, False]), 1)[0] == pytest.approx(0.5)


def test_each_object_matches_once() -> None:
    detections = [found([cuboid(10, 0), cuboid(10.1, 0)], [0.9, 0.8])]
    result = evaluate_class(detections, [truth([cuboid(10, 0), cuboid(30, 0)])], 2, 0.5)
    # One right, its double wrong, one missed: precision 1 up to recall 1/2.
    assert result.ap == pytest.approx(0.5) and result.recall == 0.5
    assert (result.ground_truths, result.detections) == (2, 2)


def test_ignored_objects_neither_help_nor_harm() -> None:
    detections = [found([cuboid(10, 0), cuboid(30, 0), cuboid(30.1, 0)], [0.5, 0.9, 0.8])]
    result = evaluate_class(
        detections, [truth([cuboid(10, 0), cuboid(30, 0), cuboid(50, 0)], [False, True, True])], 2, 0.5
    )
    assert result.ap == 1.0 and result.ground_truths == 1 and result.detections == 1


def test_other_classes_and_other_frames_do_not_match() -> None:
    detections = [found([cuboid(10, 0)], [0.9], label=1), found([cuboid(10, 0)], [0.9])]
    truths = [truth([cuboid(10, 0)]), truth([])]
    result = evaluate_class(detections, truths, 2, 0.5)
    assert result.ap == 0.0 and result.detections == 1 and result.ground_truths == 1


def test_iou_threshold_decides_matches() -> None:
    detections = [found([cuboid(11, 0)], [0.9])]  # IoU 6 / 10
    for iou, expected in ((0.5, 1.0), (0.7, 0.0)):
        assert evaluate_class(detections, [truth([cuboid(10, 0)])], 2, iou).ap == expected
    with pytest.raises(ValueError, match="zip"):
        evaluate_class(detections, [], 2, 0.5)
