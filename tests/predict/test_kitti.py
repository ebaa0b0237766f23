"""KITTI's labels by their definition, beside mmdet3d's own boxes and the case that anyone can check by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve.errors import BadRequest, UndecodableFrame
from serve.formats.kitti import Camera, format_labels, read_calibration
from serve.predict.frames import Clip, Frame
from serve.predict.kitti import CameraFinder

# Of the form and scale of KITTI's: the camera looks along the LiDAR's x, turned by some hundredths.
KITTI = """P0: 721.5377 0 609.5593 0 0 721.5377 172.854 0 0 0 1 0
P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884
R0_rect: 0.9999239 0.00983776 -0.007445048 -0.009869795 0.9999421 -0.004278459 0.007402527 0.004351614 0.9999631
Tr_velo_to_cam: 0.0075337 -0.99997 -0.0006166 -0.00407 0.0148 0.00072807 -0.99989 -0.0763 0.99986 0.0075 0.0148 -0.27178
Tr_imu_to_velo: 0 0 0 0
"""
SIZE = (1242, 375)


def camera() -> Camera:
    return Camera(*read_calibration(KITTI), SIZE)


def plain_camera() -> Camera:
    """At the LiDAR, looking along its x axis."""
    axes = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], np.float64)
    projection = np.eye(4)
    projection[0, 0] = projection[1, 1] = 700
    projection[:2, 2] = 600, 180
    return Camera(projection, axes, SIZE)


def answer(*boxes: list[float], kind: str = "LiDAR") -> dict[str, Any]:
    count = len(boxes)
    return {
        "bboxes_3d": boxes,
        "scores_3d": [0.9] * count,
        "labels_3d": [0] * count,
        "names": ["Car"] * count,
        "box_type_3d": kind,
    }


def fields(text: str) -> list[list[float]]:
    return [[float(word) for word in line.split()[1:]] for line in text.splitlines()]


def test_a_car_ahead_that_drives_away() -> None:
    (found,) = fields(format_labels(answer([20, 0, -1.5, 4, 2, 1.6, 0]), plain_camera()))
    truncated, occluded, alpha, left, top, right, bottom, height, width, length, x, y, z, rotation, score = (
        found
    )
    assert (truncated, occluded) == (-1, -1)
    assert (height, width, length) == (1.6, 2, 4)
    assert (x, y, z) == (0, 1.5, 20)  # bottom centre; y points down
    assert rotation == pytest.approx(-np.pi / 2, abs=1e-4)  # along z
    assert alpha == pytest.approx(-np.pi / 2, abs=1e-4)
    # The rear face, 18 m away, is what is seen: 2 m wide, from 1.5 m below to 0.1 m above the camera.
    assert (left, right) == pytest.approx((600 - 700 / 18, 600 + 700 / 18), abs=1e-3)
    assert (top, bottom) == pytest.approx((180 - 0.1 * 700 / 18, 180 + 1.5 * 700 / 18), abs=1e-3)
    assert score == 0.9


@pytest.mark.parametrize(
    ("yaw", "rotation"), [(0, -np.pi / 2), (np.pi / 2, -np.pi), (-np.pi / 2, 0), (np.pi, np.pi / 2)]
)
def test_headings(yaw: float, rotation: float) -> None:
    (found,) = fields(format_labels(answer([20, 0, -1.5, 4, 2, 1.6, yaw]), plain_camera()))
    assert np.cos(found[13] - rotation) == pytest.approx(1)


def test_alpha_is_the_angle_under_which_the_object_is_seen() -> None:
    (found,) = fields(format_labels(answer([20, 10, -1.5, 4, 2, 1.6, 0]), plain_camera()))
    x, z, rotation, alpha = found[10], found[12], found[13], found[2]
    assert x == -10
    assert alpha == pytest.approx(rotation - np.arctan2(x, z), abs=1e-4)


def test_labels_equal_mmdet3ds_boxes_in_the_camera() -> None:
    import torch
    from mmdet3d.structures import Box3DMode, LiDARInstance3DBoxes, points_cam2img

    rng = np.random.default_rng(4)
    boxes = np.stack(
        [
            rng.uniform(12, 60, 40), rng.uniform(-8, 8, 40), rng.uniform(-2.2, -0.5, 40), rng.uniform(0.5, 5, 40),
            rng.uniform(0.5, 2.5, 40), rng.uniform(1, 2, 40), rng.uniform(-np.pi, np.pi, 40),
        ],
        axis=1,
    )  # fmt: skip
    at = camera()
    found = np.array(fields(format_labels(answer(*boxes.tolist()), at)))
    assert len(found) == 40
    theirs = LiDARInstance3DBoxes(torch.tensor(boxes)).convert_to(
        Box3DMode.CAM, torch.tensor(at.lidar2cam, dtype=torch.float32), correct_yaw=True
    )
    tensor = theirs.tensor.numpy()
    assert found[:, 10:13] == pytest.approx(tensor[:, :3], abs=2e-4)
    assert found[:, [9, 7, 8]] == pytest.approx(tensor[:, 3:6], abs=2e-4)  # x is length, y height, z width
    assert np.sin(found[:, 13] - tensor[:, 6]) == pytest.approx(np.zeros(40), abs=2e-4)
    assert np.cos(found[:, 13] - tensor[:, 6]).min() > 0
    corners = points_cam2img(theirs.corners, torch.tensor(at.cam2img, dtype=torch.float32)).numpy()
    low, high = corners.min(1).clip(0), np.minimum(corners.max(1), np.array(SIZE) - 1)
    assert found[:, 3:7] == pytest.approx(np.hstack([low, high]), abs=0.02)


def test_what_is_not_in_the_image_has_no_label() -> None:
    behind, beside, above = (
        [-20, 0, -1.5, 4, 2, 1.6, 0],
        [5, 30, -1.5, 4, 2, 1.6, 0],
        [20, 0, 40, 4, 2, 1.6, 0],
    )
    assert format_labels(answer(behind, beside, above), plain_camera()) == ""


def test_a_box_that_reaches_behind_the_camera_is_cut_at_its_plane() -> None:
    (found,) = fields(format_labels(answer([1, 3, -1.5, 6, 2, 1.6, 0]), plain_camera()))
    left, top, right, bottom = found[3:7]
    # From 4 m ahead to behind the camera, 2 to 4 m to the left: it leaves the image at the left, below and above.
    assert left == 0 and right == pytest.approx(600 - 700 * 2 / 4, abs=1e-3)
    assert top < 180 - 0.1 * 700 / 4 and bottom == SIZE[1] - 1


def test_boxes_in_camera_coordinates_are_kept() -> None:
    # x, y, z of the bottom centre; sizes along x, y, z; turned about y.
    (found,) = fields(format_labels(answer([1, 1.6, 15, 3.9, 1.5, 1.7, 0.3], kind="Camera"), plain_camera()))
    assert found[7:14] == [1.5, 1.7, 3.9, 1, 1.6, 15, 0.3]


def test_boxes_in_images_leave_the_rest_unknown() -> None:
    flat: dict[str, Any] = {
        "bboxes": [[1, 2, 30, 40]],
        "scores": [0.25],
        "labels": [9],
        "names": ["traffic light"],
    }
    assert format_labels(flat, None) == (
        "traffic_light -1 -1 -10 1.0000 2.0000 30.0000 40.0000 -1 -1 -1 -1000 -1000 -1000 -10 0.250000\n"
    )


def test_other_predictions_are_refused() -> None:
    labels: dict[str, Any] = {"pts_semantic_mask": {}, "classes": []}
    for other in (answer([1, 2, 3, 4, 5, 6, 0], kind="Depth"), labels):
        with pytest.raises(BadRequest):
            format_labels(other, plain_camera())


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """KITTI's folders with one frame."""
    for name in ("velodyne", "calib", "image_2"):
        (tmp_path / name).mkdir()
    (tmp_path / "velodyne" / "000008.bin").touch()
    (tmp_path / "calib" / "000008.txt").write_text(KITTI)
    cv2.imwrite(str(tmp_path / "image_2" / "000008.png"), np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    return tmp_path


def frame_at(layout: Path) -> Frame:
    path = layout / "velodyne" / "000008.bin"
    return Frame(path.name, path.stem, Clip("velodyne"), path.read_bytes, path)


def test_calibration_and_size_are_found_in_kittis_folders(layout: Path) -> None:
    found = CameraFinder().find(frame_at(layout), b"", answer())
    assert found is not None and found.size == SIZE
    assert np.array_equal(found.cam2img, camera().cam2img)


def test_a_given_calibration_and_size_win(layout: Path, tmp_path: Path) -> None:
    other = layout / "other"
    other.mkdir()
    plain = plain_camera()
    assert plain.lidar2cam is not None
    (other / "000008.json").write_bytes(
        __import__("orjson").dumps({"cam2img": plain.cam2img.tolist(), "lidar2cam": plain.lidar2cam.tolist()})
    )
    for given in (other, other / "000008.json"):
        found = CameraFinder(given, (100, 50)).find(frame_at(layout), b"", answer())
        assert found is not None and found.size == (100, 50)
        assert np.array_equal(found.cam2img, plain.cam2img)


@pytest.mark.parametrize(
    ("spoil", "missing"),
    [
        (lambda at: (at / "calib" / "000008.txt").unlink(), "--calib"),
        (lambda at: (at / "calib" / "000008.txt").write_text(KITTI.replace("R0_rect", "R")), "R0_rect"),
        (lambda at: (at / "image_2" / "000008.png").unlink(), "--image-size"),
    ],
)
def test_what_is_missing_is_named(layout: Path, spoil: Any, missing: str) -> None:
    spoil(layout)
    with pytest.raises(BadRequest, match=missing):
        CameraFinder().find(frame_at(layout), b"", answer())


def test_a_calibration_of_another_length_is_an_error() -> None:
    with pytest.raises(UndecodableFrame):
        read_calibration(KITTI.replace(" -0.27178", ""))
