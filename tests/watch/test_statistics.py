"""Counting: what falls into which bin, whatever a frame's options leave of its answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from serve.compare.labels import encode_labels, encode_segments
from serve.watch.observation import ObservedFrame, count_frames
from serve.watch.statistics import CLASS, MAX_CLASSES, OTHER, SEGMENT, STATISTICS, Layout

CLASSES = ("Pedestrian", "Cyclist", "Car")
LAYOUT = Layout.of_classes(CLASSES)


def answer(
    scores: list[float], labels: list[int], boxes: list[list[float]], kind: str = "LiDAR"
) -> dict[str, Any]:
    return {
        "bboxes_3d": np.array(boxes, np.float32).reshape(-1, 7),
        "scores_3d": np.array(scores, np.float32),
        "labels_3d": np.array(labels, np.int64),
        "classes": list(CLASSES),
        "box_type_3d": kind,
    }


CAR = [3, 4, -1.6, 3.9, 1.6, 1.5, 0]


def bin_of(name: str, value: float) -> int:
    """The bin that Prometheus would take: the first whose bound is not below the value."""
    return next(
        (k for k, edge in enumerate(STATISTICS[name].edges) if value <= edge), len(STATISTICS[name].edges)
    )


def test_a_car_is_counted_in_every_statistic_of_its_box() -> None:
    frame = ObservedFrame(answer([0.9], [2], [CAR]), 17_000, 0.95, ("one_sweep",))
    counts = count_frames([frame], LAYOUT)
    expected = {
        "detections": 1, "points": 17_000, "points_in_range": 0.95, "score": float(np.float32(0.9)), "distance": 5,
        "elevation": float(np.float32(-1.6)), "length": float(np.float32(3.9)), "width": float(np.float32(1.6)),
        "height": 1.5,
    }  # fmt: skip
    for name, value in expected.items():
        assert np.flatnonzero(counts.of(name)).tolist() == [bin_of(name, value)], name
        assert counts.sums[name] == pytest.approx(value)
    assert counts.of(CLASS).tolist() == [0, 0, 1, 0] and not counts.of("area").any()
    assert counts.frames == 1 and counts.warnings == {"one_sweep": 1}


def test_low_scores_count_nowhere_and_middling_ones_as_scores_only() -> None:
    frame = ObservedFrame(answer([0.9, 0.29, 0.09], [2, 0, 0], [CAR] * 3))
    counts = count_frames([frame], LAYOUT)
    assert (counts.of("score").sum(), counts.of("length").sum(), counts.sums["detections"]) == (2, 1, 1)
    assert count_frames([frame], LAYOUT, score_thr=0.05).sums["detections"] == 3


def test_a_camera_box_has_its_height_second_and_down_as_its_vertical() -> None:
    box = [3, 1.6, 4, 3.9, 1.5, 1.6, 0]  # x right, y down, z forward; length, height, width
    counts = count_frames([ObservedFrame(answer([0.9], [2], [box], "Camera"))], LAYOUT)
    found = {name: counts.sums[name] for name in ("distance", "elevation", "length", "width", "height")}
    assert found == pytest.approx(
        {"distance": 5, "elevation": -1.6, "length": 3.9, "width": 1.6, "height": 1.5}
    )


def test_an_image_has_areas() -> None:
    found = {
        "bboxes": np.array([[10, 10, 30, 20]], np.float32), "scores": np.array([0.5], np.float32),
        "labels": np.array([1]), "classes": list(CLASSES),
    }  # fmt: skip
    counts = count_frames([ObservedFrame(found)], LAYOUT)
    assert counts.sums["area"] == 200 and counts.of(CLASS).tolist() == [0, 1, 0, 0]
    assert not counts.of("points").any() and not counts.of("length").any()


def test_frames_of_a_batch_count_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    frames = [
        ObservedFrame(
            answer(rng.random(n).tolist(), rng.integers(0, 3, n).tolist(), (rng.random((n, 7)) * 9).tolist()),
            100 * n,
        )
        for n in (0, 1, 5, 40)
    ]
    together, each = count_frames(frames, LAYOUT), LAYOUT.empty()
    for frame in frames:
        each.add(count_frames([frame], LAYOUT))
    assert (together.bins == each.bins).all() and together.frames == each.frames == 4
    assert dict(together.sums) == pytest.approx(dict(each.sums))
    assert together.of("detections").sum() == 4  # a frame without detections is a value: 0


def test_numbers_that_are_none_are_left_out() -> None:
    boxes = [[np.nan, 0, 0, np.inf, 1, 1, 0], CAR]
    counts = count_frames([ObservedFrame(answer([0.9, np.nan], [2, 2], boxes))], LAYOUT)
    assert counts.of("distance").sum() == counts.of("length").sum() == 0
    assert counts.of("width").sum() == 1 and np.isfinite(list(counts.sums.values())).all()


def test_points_of_a_segmentation_are_counted_by_class_and_unknown_labels_are_others() -> None:
    labels = np.array([2, 2, 0, 2, 255, 3])
    found = {"pts_semantic_mask": encode_labels(labels), "classes": list(CLASSES)}
    counts = count_frames([ObservedFrame(found, 6), ObservedFrame(found, 6)], LAYOUT)
    assert counts.of(SEGMENT).tolist() == [2, 0, 6, 4] and counts.frames == 2
    assert not counts.of(CLASS).any() and not counts.of("detections").any()
    assert counts.document()["segments"] == {"Pedestrian": 2, "Car": 6, OTHER: 4}
    assert (LAYOUT.read(counts.document()).bins == counts.bins).all()


def test_a_cloud_without_points_has_no_segments() -> None:
    found = {"pts_semantic_mask": encode_labels(np.zeros(0, np.int64)), "classes": list(CLASSES)}
    assert not count_frames([ObservedFrame(found, 0)], LAYOUT).of(SEGMENT).any()


def test_pixels_of_a_panoptic_map_are_counted_by_class_and_those_of_no_segment_are_others() -> None:
    panoptic = np.full((4, 5), len(CLASSES))  # no segment
    panoptic[0], panoptic[1, :3], panoptic[2, :2] = 0, 2 + 1000, 2 + 2000
    found = {**encode_segments(panoptic, CLASSES), "classes": list(CLASSES)}
    counts = count_frames([ObservedFrame(found)], LAYOUT)
    assert counts.of(SEGMENT).tolist() == [5, 0, 5, 10]


def test_classes_beyond_the_cap_share_a_bin_and_the_frequent_ones_have_their_own() -> None:
    names = [f"c{k}" for k in range(1203)]
    assert Layout.of_classes(names).classes == tuple(names[:MAX_CLASSES])
    layout = Layout.of_classes(names, {"c1200": 5, "c7": 3})
    assert len(layout.classes) == MAX_CLASSES and {"c1200", "c7"} <= set(layout.classes)
    found = {**answer([0.9, 0.9], [1200, 900], [CAR, CAR]), "classes": names}
    counts = count_frames([ObservedFrame(found)], layout)
    assert counts.of(CLASS)[layout.class_index["c1200"]] == 1 and counts.of(CLASS)[-1] == 1
    assert counts.document()["classes"] == {"c1200": 1, OTHER: 1}


def test_what_a_worker_sends_is_what_the_gateway_reads() -> None:
    rng = np.random.default_rng(1)
    frame = ObservedFrame(
        answer(rng.random(30).tolist(), rng.integers(-1, 4, 30).tolist(), (rng.random((30, 7)) * 9).tolist()),
        500, 0.2, ("points_out_of_range",),
    )  # fmt: skip
    counts = count_frames([frame], LAYOUT)
    again = LAYOUT.read(orjson.loads(orjson.dumps(counts.document())))
    assert (again.bins == counts.bins).all() and again.warnings == counts.warnings and again.frames == 1
    assert dict(again.sums) == pytest.approx(dict(counts.sums))


@pytest.mark.parametrize(
    "change",
    [
        {"frames": -1}, {"frames": True}, {"frames": 1 << 60}, {"statistics": []}, {"classes": {"Car": "x"}},
        {"statistics": {"score": {"bins": [[99, 1]], "sum": 0}}}, {"statistics": {"score": {"bins": [[0]]}}},
        {"statistics": {"score": {"bins": [[0, 1]], "sum": "nan"}}}, {"warnings": {"a": 1.5}},
    ],
)  # fmt: skip
def test_a_malformed_observation_is_an_error(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"frames": 1, "statistics": {}, "classes": {}, "warnings": {}}
    assert LAYOUT.read(good).frames == 1
    with pytest.raises(ValueError):
        LAYOUT.read({**good, **change})


def test_labels_of_metrics_are_bounded_whatever_a_worker_sends() -> None:
    counts = LAYOUT.empty()
    counts.add_warnings({f"code_{k}": 1 for k in range(500)})
    counts.add_warnings({'x"} 1\nevil': 1})
    assert len(counts.warnings) <= 33 and all("\n" not in code for code in counts.warnings)
    assert counts.warnings.total() == 501
    document = {
        "frames": 1,
        "statistics": {"new": {}},
        "classes": {f"n{k}": 1 for k in range(50)},
        "warnings": {},
    }
    assert LAYOUT.read(document).of(CLASS).tolist() == [0, 0, 0, 50]
