"""``Accept`` of KITTI, COCO and CSV: the answers of the gateway are what `serve.predict` writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve.formats.kitti import Camera, format_labels
from serve.gateway.response import choose_media
from serve.predict.frames import Clip, Frame, Prediction
from serve.predict.kitti import CameraFinder
from serve.predict.writers import CocoWriter, CsvWriter, KittiWriter
from tests.gateway import fake_torchserve
from tests.gateway.fake_torchserve import FUSION, FakeModel

KITTI, COCO, TABLE = "text/x-kitti", "application/vnd.coco+json", "text/csv"
BOXES_3D = {
    "bboxes_3d": [[20.0, 1.0, -1.5, 4.0, 2.0, 1.6, 0.3], [12.0, -2.0, -1.0, 0.8, 0.6, 1.7, 1.0]],
    "scores_3d": [0.75, 0.5],
    "labels_3d": [0, 1],
    "names": ["Car", "Pedestrian"],
    "box_type_3d": "LiDAR",
    "classes": ["Car", "Pedestrian"],
}
BOXES_2D = {
    "bboxes": [[1.0, 2.0, 11.0, 22.0], [3.0, 3.0, 4.0, 5.0]],
    "scores": [0.75, 0.5],
    "labels": [1, 0],
    "names": ["Pedestrian", "Car"],
    "classes": ["Car", "Pedestrian"],
}
POINTS = {"pts_semantic_mask": {"dtype": "uint8", "shape": [1], "b64": "AA=="}, "classes": ["road"]}
CALIBRATION = {
    "cam2img": [[700.0, 0, 600], [0, 700, 180], [0, 0, 1]],
    "lidar2cam": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
}
CAMERA = json.dumps({**CALIBRATION, "image_size": [1242, 375]})


@pytest.fixture
def answers(monkeypatch):
    """Make the fake worker give this answer; returns the encoding of it."""

    def give(answer: dict[str, Any]) -> None:
        monkeypatch.setattr(fake_torchserve, "answer_for", lambda frame, options: json.dumps(answer).encode())

    return give


def predicted(answer: dict[str, Any], name: str = "0", body: Any = b"") -> Prediction:
    frame = Frame(name, name, Clip("clip"), read=lambda: body)
    return Prediction(frame, json.dumps(answer).encode(), answer, body=body)


def record(*found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"frame": str(i), "answer": answer} for i, answer in enumerate(found)]


@pytest.mark.parametrize("answer", [BOXES_3D, BOXES_2D])
def test_table_is_that_of_predict(gateway, cloud, answers, tmp_path: Path, answer) -> None:
    answers(answer)
    CsvWriter(tmp_path / "p.csv").finish(record(answer))
    found = gateway.post(content=cloud(1), headers={"accept": TABLE})
    assert found.headers["content-type"].startswith(TABLE)
    assert found.content == (tmp_path / "p.csv").read_bytes()
    assert [row["name"] for row in csv.DictReader(io.StringIO(found.text))] == answer["names"]


def test_table_of_several_frames_has_their_positions(gateway, cloud, answers, tmp_path: Path) -> None:
    answers(BOXES_2D)
    files = [("data", cloud(1)), ("data", cloud(2))]
    found = gateway.post(files=files, headers={"accept": TABLE})
    CsvWriter(tmp_path / "p.csv").finish(record(BOXES_2D, BOXES_2D))
    assert found.content == (tmp_path / "p.csv").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_coco_results_are_those_of_predict(gateway, cloud, answers, tmp_path: Path, count) -> None:
    answers(BOXES_2D)
    found = gateway.post(files=[("data", cloud(k)) for k in range(count)], headers={"accept": COCO})
    CocoWriter(tmp_path / "coco.json").finish(record(*[BOXES_2D] * count))
    assert found.headers["content-type"].startswith(COCO)
    assert found.json() == json.loads((tmp_path / "coco.json").read_text())
    assert {each["image_id"] for each in found.json()} == set(range(count))


def test_kitti_labels_of_images_need_no_camera(gateway, cloud, answers) -> None:
    answers(BOXES_2D)
    found = gateway.post(content=cloud(1), headers={"accept": KITTI})
    assert found.headers["content-type"].startswith(KITTI)
    assert found.text == format_labels(BOXES_2D, None)


def test_kitti_labels_of_a_cloud_are_those_of_predict_with_the_camera_of_the_header(
    gateway, cloud, answers, tmp_path: Path
) -> None:
    answers(BOXES_3D)
    found = gateway.post(content=cloud(1), headers={"accept": KITTI, "x-camera": CAMERA})
    (tmp_path / "calib.json").write_text(json.dumps(CALIBRATION))
    cameras = CameraFinder(tmp_path / "calib.json", (1242, 375))
    assert found.text == KittiWriter(tmp_path, cameras).encode(predicted(BOXES_3D)).decode()
    assert len(found.text.splitlines()) == 2


def test_kitti_labels_of_a_frame_with_its_camera_need_no_header(
    start_gateway, torchserve, cloud, answers, tmp_path: Path
) -> None:
    torchserve.models["fusion"] = {"1.0": FakeModel(dict(FUSION))}
    answers(BOXES_3D)
    picture = cv2.imencode(".png", np.zeros((375, 1242, 3), np.uint8))[1].tobytes()
    parts = {"points": cloud(1), "image": picture, "calibration": json.dumps(CALIBRATION).encode()}
    found = start_gateway().post("/predictions/fusion", files=parts, headers={"accept": KITTI})
    writer = KittiWriter(tmp_path, CameraFinder())
    assert found.text == writer.encode(predicted(BOXES_3D, body=parts)).decode() != ""


@pytest.mark.parametrize(
    ("answer", "accept", "headers", "code"),
    [
        (BOXES_3D, KITTI, {}, "bad_request"),  # no camera
        (BOXES_3D, COCO, {}, "bad_request"),
        (POINTS, KITTI, {}, "bad_request"),
        (POINTS, TABLE, {}, "bad_request"),
        (BOXES_2D, TABLE, {"x-fields": "names"}, "unknown_option"),
        (BOXES_2D, "image/png", {"x-fields": "names"}, "unknown_option"),
        (BOXES_3D, KITTI, {"x-camera": "{}"}, "unknown_option"),
        (BOXES_3D, KITTI, {"x-camera": "["}, "unknown_option"),
        (BOXES_3D, KITTI, {"x-camera": CAMERA.replace("700.0", "NaN")}, "unknown_option"),
        (BOXES_3D, KITTI, {"x-camera": CAMERA.replace("1242", "-1")}, "unknown_option"),
        (
            BOXES_3D,
            KITTI,
            {"x-camera": json.dumps({"cam2img": CALIBRATION["cam2img"], "image_size": [9, 9]})},
            "bad_request",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(gateway, cloud, answers, answer, accept, headers, code) -> None:
    answers(answer)
    found = gateway.post(content=cloud(1), headers={"accept": accept, **headers})
    assert (found.status_code, found.json()["error"]["code"]) == (400, code), found.text


def test_label_file_of_two_frames_is_refused(gateway, cloud, answers) -> None:
    answers(BOXES_2D)
    found = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))], headers={"accept": KITTI})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "bad_request")


def test_frame_that_fails_fails_a_table(start_gateway, cloud, answers) -> None:
    answers(BOXES_2D)
    gateway = start_gateway(max_frame_bytes=len(cloud(1)))
    files = [("data", cloud(1)), ("data", cloud(1) * 2)]
    found = gateway.post(files=files, headers={"accept": TABLE})
    assert (found.status_code, found.json()["error"]["code"]) == (413, "frame_too_large")
    assert "frame 1" in found.json()["error"]["message"]


def test_options_of_a_selection_reach_the_worker(gateway, cloud) -> None:
    query = "classes=Car,Pedestrian&class_thr=Car%3D0.5&fields=names,scores_3d"
    found = gateway.post(f"/predictions/second?{query}", content=cloud(1)).json()["options"]
    assert found == {
        "classes": ["Car", "Pedestrian"],
        "class_thr": [["Car", 0.5]],
        "fields": ["names", "scores_3d"],
    }


def test_camera_of_a_matrix_is_filled_up() -> None:
    from serve.formats.kitti import camera_of

    camera = camera_of(CALIBRATION, (1242, 375))
    assert isinstance(camera, Camera) and camera.cam2img.shape == (4, 4) and camera.cam2img[3, 3] == 1


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("text/*", TABLE), ("TEXT/CSV", TABLE), ("text/csv; charset=utf-8", TABLE), ("text/html, text/*;q=0.1", TABLE),
        ("application/json;q=0, */*", "application/x-msgpack"), ("application/json;q=0.1, text/*;q=0.2", TABLE),
        ("text/csv;q=0, text/*", KITTI), ("application/json, text/csv", "application/json"),
        ("text/csv, application/json", TABLE),
        ("*/*;q=0.1, image/*", "image/png"), ("application/*", "application/json"),
        ("text/html,image/webp,*/*;q=0.8", "application/json"), ("", "application/json"), (None, "application/json"),
        ("*/*, application/json", "application/json"), ("application/*, application/json", "application/json"),
        ("*/*, image/png", "application/json"), ("image/png, */*", "image/png"), ("text/*, text/x-kitti", TABLE),
        ("application/*;q=0, */*", "image/png"), ("application/vnd.msgpack", "application/x-msgpack"),
    ],
)  # fmt: skip
def test_most_specific_range_of_accept_counts(accept: str | None, media: str) -> None:
    assert choose_media(accept) == media


@pytest.mark.parametrize(
    "accept", ["text/html", "*/*;q=0", "csv", "text/csv;q=x", "application/vnd.*", "text/*;q=0", "text"]
)
def test_format_that_there_is_not_is_not_acceptable(gateway, cloud, accept: str) -> None:
    found = gateway.post(content=cloud(1), headers={"accept": accept})
    assert (found.status_code, found.json()["error"]["code"]) == (406, "not_acceptable")


def test_several_lines_of_accept_are_one_list(gateway, cloud) -> None:
    found = gateway.post(content=cloud(1), headers=[("accept", "text/html"), ("accept", TABLE)])
    assert found.headers["content-type"].startswith(TABLE)


@pytest.mark.parametrize("answer", [BOXES_3D, BOXES_2D])
def test_table_without_rows_has_the_columns_of_its_boxes(gateway, cloud, answers, answer) -> None:
    answers(answer)
    full = gateway.post(content=cloud(1), headers={"accept": TABLE}).text
    answers({name: [] if name != "box_type_3d" else value for name, value in answer.items()})
    empty = gateway.post(content=cloud(1), headers={"accept": TABLE}).text
    assert empty.split() == full.split("\r\n")[:1] and empty.endswith("\r\n")


def test_names_of_any_kind_come_out_of_a_table_as_they_were(gateway, cloud, answers) -> None:
    names = ['a, "b"', "行人\r\nzwei"]
    answers({**BOXES_2D, "names": names})
    found = gateway.post(content=cloud(1), headers={"accept": TABLE})
    rows = csv.DictReader(io.StringIO(found.content.decode(), newline=""))
    assert [row["name"] for row in rows] == names
