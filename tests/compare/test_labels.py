"""Labels of points and pixels survive the wire, and are told apart."""

from __future__ import annotations

import base64

import cv2
import numpy as np
import pytest

from serve.compare.labels import (
    compare_labels,
    decode_labels,
    decode_segments,
    encode_labels,
    encode_segments,
    has_labels,
)

CLASSES = ["person", "car", "sky"]


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, "uint8"), (255, "uint8"), (256, "uint16"), (70_000, "uint32")]
)
def test_labels_round_trip_in_the_smallest_type(largest, dtype):
    labels = np.random.default_rng(0).integers(0, largest + 1, 1000)
    labels[-1] = largest
    encoded = encode_labels(labels)
    assert (encoded["dtype"], encoded["shape"]) == (dtype, [1000])
    np.testing.assert_array_equal(decode_labels(encoded), labels)
    assert len(base64.b64decode(encoded["b64"])) == 1000 * np.dtype(dtype).itemsize


def test_empty_labels_round_trip():
    assert decode_labels(encode_labels(np.zeros(0, np.int64))).shape == (0,)


@pytest.mark.parametrize(
    "encoded", [{}, {"dtype": "object", "shape": [1], "b64": "AA=="}, {"dtype": "uint8", "shape": [2], "b64": "AA=="},
                {"dtype": "uint8", "shape": [1], "b64": "%"}, {"dtype": "uint8", "shape": None, "b64": "AA=="}]
)  # fmt: skip
def test_malformed_labels_are_rejected(encoded):
    with pytest.raises(ValueError):
        decode_labels(encoded)


def panoptic() -> np.ndarray:
    """Two persons, a car, sky, and a corner of nothing (label 3 of 3 classes)."""
    found = np.full((20, 30), 2)
    found[5:15, 2:8], found[5:15, 10:14], found[12:20, 16:29] = 1000, 2000, 1001
    found[:2, :2] = 3
    return found


def test_segments_follow_the_coco_format():
    answer = encode_segments(panoptic(), CLASSES)
    assert [(s["name"], s["isthing"], s["area"]) for s in answer["segments_info"]] == [
        ("sky", 0, 20 * 30 - 60 - 40 - 104 - 4), ("person", 1, 60), ("car", 1, 104), ("person", 1, 40),
    ]  # fmt: skip
    assert answer["segments_info"][1]["bbox"] == [2, 5, 6, 10]
    ids = decode_segments(answer)
    assert (ids[:2, :2] == 0).all() and len(np.unique(ids)) == 5
    raw = cv2.imdecode(
        np.frombuffer(base64.b64decode(answer["panoptic_seg"]["png_b64"]), np.uint8), cv2.IMREAD_COLOR
    )
    red, green, blue = (raw[..., k].astype(int) for k in (2, 1, 0))
    np.testing.assert_array_equal(red + 256 * green + 65536 * blue, ids)


def test_many_segments_round_trip():
    crowd = np.arange(400).reshape(20, 20) * 1000 + 1000
    np.testing.assert_array_equal(
        decode_segments(encode_segments(crowd, CLASSES)), np.arange(400).reshape(20, 20) + 1
    )


def test_panoptic_comparison_ignores_segment_ids_only():
    one = encode_segments(panoptic(), CLASSES)
    swapped = panoptic()
    swapped[panoptic() == 1000], swapped[panoptic() == 2000] = 2000, 1000
    assert compare_labels(one, encode_segments(swapped, CLASSES), 1.0).ok
    renamed = panoptic()
    renamed[panoptic() == 2000] = 3001  # a person has become a car
    found = compare_labels(one, encode_segments(renamed, CLASSES), 0.9)
    assert found.count - found.agreeing == 40 and found.ok
    assert not compare_labels(one, encode_segments(renamed, CLASSES), 0.95).ok


def test_label_comparison_counts_points_and_names_problems():
    one, two = (
        {"pts_semantic_mask": encode_labels(np.array(labels))} for labels in ([1, 2, 3, 4], [1, 2, 3, 0])
    )
    assert compare_labels(one, two, 0.75).ok and not compare_labels(one, two, 0.76).ok
    assert "3 of 4 points" in compare_labels(one, two, 1).verdict()
    shorter = {"pts_semantic_mask": encode_labels(np.array([1]))}
    assert "(4,) points in native and (1,) in served" in compare_labels(one, shorter, 0).problems[0]
    assert compare_labels(one, {"bboxes": []}, 0).problems
    assert has_labels(one) and not has_labels({"bboxes": []})
