"""`serve.visualize.detections` and `mmdet3d-serve draw`: pictures are complete, and odd input crashes nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from serve.visualize.birds_eye import draw_birds_eye_view
from serve.visualize.detections import draw_frame, draw_image, encode_png

ROOT = Path(__file__).resolve().parents[2]
GREEN = (110, 226, 124)  # of label 2, BGR
VIEW = (0.0, -20.0, 30.0, 20.0)  # with 1200 x 900 pixels: 30 pixels per metre


def boxes_3d(*boxes: tuple[float, ...], label: int = 2, score: float = 0.9, **more: Any) -> dict[str, Any]:
    return {
        "bboxes_3d": [list(box) for box in boxes],
        "scores_3d": [score] * len(boxes),
        "labels_3d": [label] * len(boxes),
        "names": ["Car"] * len(boxes),
        "box_type_3d": "LiDAR",
        **more,
    }


def cloud(count: int = 2000, columns: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 30, (count, columns)).astype(np.float32)
    points[:, 1] -= 15
    points[:, 2] = rng.uniform(-2, 2, count)
    return points


def pixel(x_m: float, y_m: float) -> tuple[int, int]:
    """Row, column of a place in `VIEW`."""
    return round(450 - (x_m - 15) * 30), round(600 - y_m * 30)


def has_colour(
    picture: np.ndarray, place: tuple[int, int], colour: tuple[int, int, int], reach: int = 2
) -> bool:
    row, column = place
    near = picture[row - reach : row + reach + 1, column - reach : column + reach + 1].reshape(-1, 3)
    return bool((np.abs(near.astype(int) - colour).max(1) < 25).any())


def test_birds_eye_view_draws_forward_up_and_left_left() -> None:
    picture = draw_birds_eye_view(np.zeros((0, 4)), boxes_3d((20, 8, -1, 4, 2, 1.5, 0)), extent_m=VIEW)
    assert (picture.shape, picture.dtype) == ((900, 1200, 3), np.uint8)
    for x, y in ((22, 8), (18, 8), (20, 9), (20, 7)):  # front, rear, left, right
        assert has_colour(picture, pixel(x, y), GREEN)
    assert not has_colour(picture, pixel(20, 10.5), GREEN)
    assert not has_colour(picture, pixel(20, -8), GREEN)


@pytest.mark.parametrize("yaw", [0.0, math.pi / 2, math.pi, -math.pi / 2, 0.7])
def test_heading_line_leaves_the_box_at_its_front(yaw: float) -> None:
    picture = draw_birds_eye_view(np.zeros((0, 4)), boxes_3d((15, 0, -1, 4, 2, 1.5, yaw)), extent_m=VIEW)
    beyond = 2 + 3 / 30
    ahead = pixel(15 + beyond * math.cos(yaw), beyond * math.sin(yaw))
    behind = pixel(15 - beyond * 1.05 * math.cos(yaw), -beyond * 1.05 * math.sin(yaw))
    assert has_colour(picture, ahead, GREEN, 1)
    assert not has_colour(picture, behind, GREEN, 0)


def test_higher_points_are_brighter() -> None:
    points = np.array([[10, 5, -2, 0], [10, -5, 2, 0]] * 50, np.float32)
    picture = draw_birds_eye_view(points, boxes_3d(), extent_m=VIEW).astype(int)
    low, high = (
        picture[r - 1 : r + 2, c - 1 : c + 2].max((0, 1)).sum() for r, c in (pixel(10, 5), pixel(10, -5))
    )
    assert 200 < low < high


def test_default_extent_shows_all_boxes() -> None:
    far = boxes_3d((150, 60, 0, 4, 2, 2, 0), (-80, -90, 0, 4, 2, 2, 0))
    picture = draw_birds_eye_view(cloud(), far)
    bright = np.argwhere(np.abs(picture.astype(int) - GREEN).max(2) < 25)
    assert len(bright) > 20


@pytest.mark.parametrize("size", [(1200, 900), (300, 200), (64, 64)])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_any_number_of_boxes_and_any_size_gives_an_image(count: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(count)
    boxes = rng.uniform(-100, 100, (count, 9))
    boxes[:, 3:6] = np.abs(boxes[:, 3:6]) / 20
    detections = boxes_3d(*boxes.tolist())
    detections["labels_3d"] = list(range(count))
    detections.pop("names")
    assert draw_birds_eye_view(cloud(), detections, size=size).shape == (size[1], size[0], 3)


def test_non_finite_points_and_boxes_are_skipped() -> None:
    points = cloud(100)
    points[::2, 1] = math.nan
    detections = boxes_3d(
        (10, 0, 0, 4, 2, 2, math.nan), (10, math.inf, 0, 4, 2, 2, 0), (1e9, 0, 0, 1e9, 2, 2, 0)
    )
    assert draw_birds_eye_view(points, detections, extent_m=VIEW).shape == (900, 1200, 3)


def test_low_scores_are_not_drawn() -> None:
    detections = boxes_3d((20, 8, -1, 4, 2, 1.5, 0), score=0.2)
    drawn, left_out = (
        draw_birds_eye_view(cloud(), detections, extent_m=VIEW, score_thr=thr) for thr in (0.2, 0.21)
    )
    assert has_colour(drawn, pixel(22, 8), GREEN)
    assert not has_colour(left_out, pixel(22, 8), GREEN)


def test_depth_boxes_are_drawn_with_forward_up() -> None:
    """x right 8, y forward 20, long side forward: the same picture as LiDAR x 20, y -8."""
    depth = boxes_3d((8, 20, 1, 4, 2, 1.5, math.pi / 2), box_type_3d="Depth")
    lidar = boxes_3d((20, -8, 1, 4, 2, 1.5, 0))
    nothing = np.zeros((0, 6))
    same = (
        draw_birds_eye_view(nothing, depth, extent_m=VIEW),
        draw_birds_eye_view(nothing, lidar, extent_m=VIEW),
    )
    assert (same[0] == same[1]).mean() > 0.999


@pytest.mark.parametrize(
    ("points", "detections", "sentence"),
    [
        (np.zeros((5, 2)), boxes_3d(), r"\(N, >=3\)"),
        (np.zeros((5, 4)), {"bboxes": []}, "bboxes_3d"),
        (np.zeros((5, 4)), boxes_3d(box_type_3d="Camera"), "Camera cannot be drawn"),
        (np.zeros((5, 4)), boxes_3d((1, 2, 3)), "length"),
        (np.zeros((5, 4)), boxes_3d((1,) * 7, labels_3d=[]), "length"),
    ],
)
def test_undrawable_input_raises_value_error(
    points: np.ndarray, detections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        draw_birds_eye_view(points, detections)


def boxes_2d(width: int, height: int, **more: Any) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[40:60, 30:70] = 1
    encoded = coco.encode(np.asfortranarray(mask))
    rle = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    return {
        "bboxes": [[20, 30, 80, 70]],
        "scores": [0.9],
        "labels": [2],
        "names": ["car"],
        "masks": [rle],
        **more,
    }


@pytest.mark.parametrize("grey", [False, True])
def test_draw_image_changes_only_boxes_and_masks(grey: bool) -> None:
    image = np.full((100, 200) if grey else (100, 200, 3), 100, np.uint8)
    before = image.copy()
    picture = draw_image(image, boxes_2d(200, 100))
    assert (image == before).all()
    assert picture.shape == (100, 200, 3)
    assert has_colour(picture, (70, 50), GREEN, 1)
    inside = picture[50, 50].astype(int)
    assert inside[1] > 130 and inside[1] < GREEN[1]
    assert (picture[90, 150] == 100).all()


def test_masks_of_another_size_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\["):
        draw_image(np.zeros((50, 50, 3), np.uint8), boxes_2d(200, 100))
    with pytest.raises(ValueError, match="RLE"):
        draw_image(np.zeros((50, 50, 3), np.uint8), boxes_2d(200, 100, masks=[{"size": [50, 50]}]))


def test_masks_follow_their_boxes_above_the_threshold() -> None:
    both = boxes_2d(200, 100)
    empty = coco.encode(np.asfortranarray(np.zeros((100, 200), np.uint8)))
    for key, first in (("bboxes", [0, 0, 9, 9]), ("scores", 0.1), ("labels", 0), ("names", "x")):
        both[key] = [first, *both[key]]
    both["masks"] = [{"size": list(empty["size"]), "counts": empty["counts"].decode()}, *both["masks"]]
    image = np.full((100, 200, 3), 100, np.uint8)
    assert (draw_image(image, both, score_thr=0.5) == draw_image(image, boxes_2d(200, 100))).all()


def test_the_same_input_gives_the_same_png() -> None:
    pictures = [
        encode_png(draw_birds_eye_view(cloud(), boxes_3d((20, 8, -1, 4, 2, 1.5, 0)))) for _ in range(2)
    ]
    assert pictures[0] == pictures[1]
    assert cv2.imdecode(np.frombuffer(pictures[0], np.uint8), cv2.IMREAD_COLOR).shape == (900, 1200, 3)


def test_empty_point_cloud_file_is_drawn() -> None:
    assert draw_frame(b"", boxes_3d()).shape == (900, 1200, 3)


def draw_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve", "draw", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_draw_command_draws_a_point_cloud_and_an_image(tmp_path: Path) -> None:
    frame, answer, out = tmp_path / "frame.bin", tmp_path / "answer.json", tmp_path / "out.png"
    cloud().tofile(frame)
    answer.write_text(json.dumps(boxes_3d((20, 8, -1, 4, 2, 1.5, 0))))
    done = draw_tool(str(frame), str(answer), "-o", str(out), "--width", "600", "--height", "450")
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(out))
    assert cv2.imread(str(out)).shape == (450, 600, 3)
    frame = tmp_path / "frame.png"
    cv2.imwrite(str(frame), np.full((100, 200, 3), 90, np.uint8))
    answer.write_text(json.dumps(boxes_2d(200, 100)))
    assert draw_tool(str(frame), str(answer), "-o", str(out)).returncode == 0
    assert cv2.imread(str(out)).shape == (100, 200, 3)


@pytest.mark.parametrize(
    ("frame", "answer"),
    [
        (b"\x00" * 15, json.dumps(boxes_3d())),
        (b"\x00" * 16, "no json"),
        (b"\x00" * 16, "[]"),
        (b"\x00" * 16, '{"bboxes_3d": [[1]]}'),
        (b"\x00" * 16, '{"error": {"code": "x"}}'),
        (None, json.dumps(boxes_3d())),
    ],
)
def test_draw_command_returns_2_with_one_error_line(tmp_path: Path, frame: bytes | None, answer: str) -> None:
    if frame is not None:
        (tmp_path / "frame.bin").write_bytes(frame)
    (tmp_path / "answer.json").write_text(answer)
    done = draw_tool(
        str(tmp_path / "frame.bin"), str(tmp_path / "answer.json"), "-o", str(tmp_path / "out.png")
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
