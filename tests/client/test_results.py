"""Typed results: arrays, names, masks, labels, KITTI and COCO."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_masks

from serve.client import Result
from serve.client.results import MissingField
from serve.compare.labels import encode_labels, encode_segments
from serve.errors import BadRequest, UndecodableFrame
from serve.formats.coco import CocoIds, results_of
from serve.formats.kitti import camera_of, format_labels
from serve.formats.labels import decode_mask

BOXES_3D = {
    "bboxes_3d": [[20.0, 1.0, -1.5, 4.0, 2.0, 1.6, 0.3], [12.0, -2.0, -1.0, 0.8, 0.6, 1.7, 1.0]],
    "scores_3d": [0.75, 0.5],
    "labels_3d": [0, 1],
    "names": ["Car", "Pedestrian"],
    "box_type_3d": "LiDAR",
    "classes": ["Car", "Pedestrian"],
    "model": {"name": "second", "version": "1.0"},
    "warnings": [{"code": "one_sweep", "message": "…"}],
}
CALIBRATION = {
    "cam2img": [[700.0, 0, 600], [0, 700, 180], [0, 0, 1]],
    "lidar2cam": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
}
KITTI = "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"


def result(answer: dict[str, Any], **headers: str) -> Result:
    return Result(answer, json.dumps(answer).encode(), headers)


def images(masks: np.ndarray) -> dict[str, Any]:
    encoded = [coco_masks.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    count = len(masks)
    return {
        "bboxes": [[1.0, 2.0, 11.0, 22.0]] * count,
        "scores": [0.5] * count,
        "labels": [0] * count,
        "names": ["person"] * count,
        "classes": ["person"],
        "masks": [
            {"size": [int(n) for n in each["size"]], "counts": each["counts"].decode()} for each in encoded
        ],
    }


def test_boxes_in_3d_are_arrays() -> None:
    found = result(
        BOXES_3D, **{"x-request-id": "id", "server-timing": "queue;dur=1.500, inference;dur=20.000"}
    )
    assert (found.boxes.shape, found.boxes.dtype, found.is_3d) == ((2, 7), np.float32, True)
    assert found.boxes.tolist() == np.float32(BOXES_3D["bboxes_3d"]).tolist()
    assert (found.scores.tolist(), found.labels.tolist()) == ([0.75, 0.5], [0, 1])
    assert (found.names, found.classes) == (("Car", "Pedestrian"), ("Car", "Pedestrian"))
    assert (found.box_type, found.model["name"], found.request_id) == ("LiDAR", "second", "id")
    assert found.seconds == {"queue": 0.0015, "inference": 0.02}
    assert found.warnings[0]["code"] == "one_sweep"
    assert repr(found) == "<Result of second: 2 detections>"


@pytest.mark.parametrize(("answer", "width"), [({"bboxes_3d": [], "scores_3d": []}, 7), ({"bboxes": []}, 4)])
def test_no_detections_are_empty_arrays(answer: dict[str, Any], width: int) -> None:
    assert result(answer).boxes.shape == (0, width)


def test_result_cannot_be_changed() -> None:
    found = result(BOXES_3D)
    with pytest.raises(TypeError):
        found["names"] = []  # type: ignore[index]
    with pytest.raises(AttributeError):
        found.names = ()  # type: ignore[misc]
    for array in (found.boxes, found.scores, found.labels):
        with pytest.raises(ValueError):
            array[0] = 0


def test_result_is_passed_to_other_processes() -> None:
    sent = result(BOXES_3D, **{"x-request-id": "7"})
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived == sent and arrived.encoded == sent.encoded and arrived.request_id == "7"
    assert np.array_equal(copy.deepcopy(sent).boxes, sent.boxes)


def test_result_is_the_answer_by_the_servers_names() -> None:
    found = result(BOXES_3D)
    assert found == BOXES_3D and dict(found) == BOXES_3D and json.loads(found.encoded) == BOXES_3D
    assert "masks" not in found and found["box_type_3d"] == "LiDAR"


def test_what_an_answer_does_not_have_is_an_attribute_error() -> None:
    found = result({"scores_3d": [0.5]})
    assert found.is_3d and found.scores.tolist() == [0.5] and not hasattr(found, "boxes")
    with pytest.raises(MissingField, match="scores_3d"):
        _ = found.names
    with pytest.raises(MissingField):
        _ = result(BOXES_3D).masks


@given(arrays.arrays(bool, st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))))
def test_masks_are_those_of_pycocotools(masks: np.ndarray) -> None:
    found = result(images(masks)).masks
    assert found.dtype == bool and (len(masks) == 0 or (found == masks).all())


@pytest.mark.parametrize(
    "encoded",
    [{}, {"size": [2, 2]}, {"size": [2, 2], "counts": "1"}, {"size": [2], "counts": "4"},
     {"size": [2, 2], "counts": "o"}, {"size": [2, 2], "counts": "O5"}, {"size": [2, 2], "counts": 4}],
)  # fmt: skip
def test_mask_that_is_none_is_a_value_error(encoded: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        decode_mask(encoded)


def test_labels_of_points_are_an_array() -> None:
    labels = np.random.default_rng(1).integers(0, 300, 50)
    assert (result({"pts_semantic_mask": encode_labels(labels)}).point_labels == labels).all()


def test_panoptic_map_has_the_ids_of_its_segments() -> None:
    panoptic = np.array([[0, 0, 1001], [1, 5, 1001]])
    answer = encode_segments(panoptic, ["road", "car"])
    found = result(answer)
    ids = cv2.imdecode(np.frombuffer(base64.b64decode(answer["panoptic_seg"]["png_b64"]), np.uint8), 1)
    assert (found.segment_ids == ids[..., 2]).all() and found.panoptic_png.startswith(b"\x89PNG")
    assert [each["name"] for each in found.segments] == ["road", "car", "car"]


def test_kitti_labels_are_those_of_predict(tmp_path: Any) -> None:
    (tmp_path / "calib.txt").write_text(KITTI)
    expected = format_labels(BOXES_3D, camera_of(CALIBRATION, (1242, 375)))
    found = result(BOXES_3D)
    assert len(expected.splitlines()) == 2
    for calibration in (tmp_path / "calib.txt", str(tmp_path / "calib.txt"), CALIBRATION):
        assert found.to_kitti(calibration, (1242, 375)) == expected
    assert found.to_kitti(camera_of(CALIBRATION, (1242, 375))) == expected
    two = images(np.ones((1, 2, 2), bool))
    assert result(two).to_kitti() == format_labels(two, None)


def test_kitti_labels_need_a_camera_in_3d(tmp_path: Any) -> None:
    found = result(BOXES_3D)
    for arguments in ((), (CALIBRATION,), (None, (1242, 375))):
        with pytest.raises(BadRequest):
            found.to_kitti(*arguments)
    for calibration in (
        tmp_path / "none.txt",
        {"lidar2cam": np.eye(4)},
        {"cam2img": [[1]]},
        {"cam2img": "x"},
    ):
        with pytest.raises(UndecodableFrame):
            found.to_kitti(calibration, (9, 9))
    with pytest.raises(BadRequest, match="lidar2cam"):
        found.to_kitti({"cam2img": CALIBRATION["cam2img"]}, (1242, 375))


def test_coco_results_are_those_of_predict() -> None:
    answer = images(np.ones((2, 3, 4), bool))
    (expected, _) = results_of([{"frame": "7.png", "answer": answer}], CocoIds())
    found = result(answer).to_coco(7)
    assert found[0] == expected and len(found) == 2
    assert result(answer).to_coco(7, {"person": 99})[0]["category_id"] == 99
    with pytest.raises(BadRequest, match="person"):
        result(answer).to_coco(7, {"car": 1})
    with pytest.raises(BadRequest):
        result(BOXES_3D).to_coco()


@pytest.mark.parametrize("missing", ["names", "scores_3d", "box_type_3d"])
def test_format_of_an_answer_that_lacks_a_field_is_a_missing_field(missing: str) -> None:
    found = result({name: value for name, value in BOXES_3D.items() if name != missing})
    with pytest.raises(MissingField):
        found.to_kitti(CALIBRATION, (1242, 375))
    image = images(np.zeros((1, 2, 2), bool))
    with pytest.raises(MissingField):
        result({name: value for name, value in image.items() if name != "classes"}).to_coco()
