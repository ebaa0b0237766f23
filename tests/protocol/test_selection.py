"""What a client asks of an answer: classes, thresholds of classes, counts and fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import UnknownOption
from serve.protocol.options import FrameOptions, parse_options
from serve.protocol.selection import FIELDS, check_selection, select
from serve.protocol.worker import EncodedFrame, batch_chunks, read_batch

CLASSES = ("Car", "Pedestrian", "Van, large")


def answer(scores: list[float], labels: list[int], *, arrays: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bboxes": np.arange(4.0 * len(scores), dtype=np.float32).reshape(-1, 4),
        "scores": np.array(scores, np.float32),
        "labels": np.array(labels, np.int64),
        "names": [CLASSES[label] for label in labels],
        "masks": [{"size": [1, 1], "counts": str(k)} for k in range(len(scores))],
        "classes": list(CLASSES),
    }
    return found if arrays else {name: np.asarray(value).tolist() for name, value in found.items()}


def by_hand(found: dict[str, Any], options: FrameOptions) -> list[int]:
    thresholds, kept = dict(options.class_thr), []
    for k, (name, score) in enumerate(zip(found["names"], found["scores"], strict=True)):
        lowest = np.float32(thresholds.get(name, options.score_thr))
        if (lowest <= 0 or score >= lowest) and (options.classes is None or name in options.classes):
            kept.append(k)
    return kept[: options.max_detections]


names = st.sampled_from(CLASSES)
numbers = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])


@given(
    found=st.lists(st.tuples(st.sampled_from([-0.5, 0.0, 0.1, 0.3, 0.7]), st.integers(0, 2)), max_size=8),
    classes=st.none() | st.lists(names, min_size=1, unique=True),
    class_thr=st.dictionaries(names, numbers),
    score_thr=numbers,
    most=st.none() | st.integers(0, 5),
)
def test_selection_keeps_what_counting_by_hand_keeps(found, classes, class_thr, score_thr, most):
    found = sorted(found, reverse=True)
    whole = answer([score for score, _ in found], [label for _, label in found])
    options = FrameOptions(
        score_thr=score_thr,
        max_detections=most,
        classes=None if classes is None else tuple(classes),
        class_thr=tuple(class_thr.items()),
    )
    kept = by_hand(whole, options)
    chosen = select(whole, options)
    assert chosen["bboxes"].tolist() == whole["bboxes"][kept].tolist()
    assert chosen["names"] == [whole["names"][k] for k in kept]
    assert [each["counts"] for each in chosen["masks"]] == [str(k) for k in kept]
    assert chosen["classes"] == list(CLASSES) and set(chosen) == set(whole)


def test_threshold_of_a_class_replaces_that_of_the_request():
    whole = answer([0.9, 0.4, 0.3, 0.2], [0, 1, 0, 1])
    options = parse_options({"score_thr": "0.35", "class_thr": "Pedestrian=0.2"})
    assert select(whole, options)["names"] == ["Car", "Pedestrian", "Pedestrian"]


def test_score_of_float32_reaches_the_threshold_of_the_same_text():
    whole = answer([0.3], [0])  # as float64 0.30000001
    assert select(whole, parse_options({"class_thr": "Car=0.3"}))["names"] == ["Car"]
    assert select(whole, parse_options({"class_thr": "Car=0.3001"}))["names"] == []


def test_fields_leave_out_what_was_not_asked_for():
    whole = {**answer([0.9], [0]), "warnings": [{"code": "empty_cloud", "message": ""}]}
    assert list(select(whole, parse_options({"fields": "names,scores"}))) == ["names", "scores"]
    assert "warnings" in select(whole, parse_options({"fields": ["names", "warnings"]}))
    assert "warnings" not in select(answer([], []), parse_options({"fields": ["names", "warnings"]}))
    with pytest.raises(UnknownOption, match="bboxes_3d"):
        select(whole, parse_options({"fields": "bboxes_3d"}))


def test_labels_have_fields_but_no_classes_to_select():
    labels = {"pts_semantic_mask": {"dtype": "uint8"}, "classes": ["road"], "model": {}}
    assert select(labels, parse_options({"classes": "road"})) == labels
    assert list(select(labels, parse_options({"fields": "pts_semantic_mask"}))) == ["pts_semantic_mask"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"classes": "Car, Pedestrian"}, ("Car", "Pedestrian")),
        ({"classes": '["Van, large"]'}, ("Van, large",)),
        ({"classes": ["Car", "Car"]}, ("Car",)),
        ({"class_thr": "a=b=0.5"}, (("a=b", 0.5),)),
        ({"class_thr": '{"Van, large": 0.25}'}, (("Van, large", 0.25),)),
        ({"class_thr": {"Car": 1}}, (("Car", 1.0),)),
    ],
)
def test_selection_is_text_or_json(given, expected):
    (name,) = given
    assert getattr(parse_options(given), name) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"classes": ""}, {"classes": []}, {"classes": [1]}, {"classes": '["Car"'}, {"classes": 3},
        {"classes": "a," * 40_000}, {"classes": ["Car"] * 5000}, {"class_thr": "Car"}, {"class_thr": "Car=2"},
        {"class_thr": "Car=nan"}, {"class_thr": {"Car": True}}, {"class_thr": "Car=0.1,Car=0.2"}, {"class_thr": {}},
        {"class_thr": ["Car"]}, {"class_thr": "=0.5"}, {"fields": "bboxes_4d"}, {"fields": ""}, {"fields": {"a": 1}},
    ],
)  # fmt: skip
def test_what_is_no_selection_is_an_unknown_option(given):
    with pytest.raises(UnknownOption):
        parse_options(given)


def test_class_that_the_model_lacks_is_an_unknown_option():
    check_selection(parse_options({"classes": "Car", "class_thr": "Pedestrian=0.5"}), CLASSES)
    with pytest.raises(UnknownOption, match=r"'Caar'.*'Car'"):
        check_selection(parse_options({"classes": "Caar"}), CLASSES)
    with pytest.raises(UnknownOption, match=r"'unicorn'.*Car.*Pedestrian"):
        check_selection(parse_options({"class_thr": "unicorn=0.5"}), CLASSES)


def test_selection_travels_to_the_worker_as_it_was_parsed():
    options = parse_options(
        {"classes": ["Car", "Van, large"], "class_thr": {"Car": 0.25}, "fields": list(FIELDS)}
    )
    (frame,) = read_batch(b"".join(batch_chunks([EncodedFrame(b"body", options)])))
    assert isinstance(frame, EncodedFrame) and frame.options == options
