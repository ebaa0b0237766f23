"""Synthetic scenes: the same from the same seed, and true to their own ground truth."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.synthetic import scenes
from serve.synthetic.layout import CLASSES
from serve.synthetic.raycast import MAX_RANGE, in_camera
from serve.synthetic.scenes import Scene, generate_scene, held_out_seed, points_in_boxes, training_seed
from serve.synthetic.shapes import (
    Material,
    box,
    car,
    cyclist,
    disc_outline,
    frustum,
    pedestrian,
    place,
    prism,
)

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2, 7, held_out_seed(0), held_out_seed(1), scenes.SAMPLE_SEED)


@pytest.fixture(scope="module", params=SEEDS)
def scene(request: pytest.FixtureRequest) -> Scene:
    return generate_scene(request.param)


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, other, again = generate_scene(5), generate_scene(6), generate_scene(5)
    assert first.to_bytes() == again.to_bytes()
    assert np.array_equal(first.boxes, again.boxes) and np.array_equal(first.labels, again.labels)
    assert first.to_bytes() != other.to_bytes()


def test_a_scene_does_not_depend_on_numpys_global_random_state() -> None:
    np.random.seed(1)
    first = generate_scene(5).to_bytes()
    np.random.seed(2)
    assert generate_scene(5).to_bytes() == first


def test_generating_scenes_does_not_import_torch() -> None:
    code = "import sys; from serve.synthetic import scenes; scenes.sample_frame(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_points_are_what_a_forward_lidar_returns(scene: Scene) -> None:
    points = scene.points
    assert points.dtype == np.float32 and points.shape[1] == 4
    assert np.isfinite(points).all()
    assert 13_000 <= len(points) <= 20_000
    distance = np.linalg.norm(points[:, :3], axis=1)
    assert distance.min() > 1.0 and distance.max() < MAX_RANGE + 0.2
    assert (points[:, 0] > 0).all() and (np.abs(points[:, 1]) < points[:, 0]).all()
    assert points[:, 2].min() > -5.0
    assert points[:, 3].min() >= 0.0 and points[:, 3].max() <= 1.0
    assert in_camera(points.astype(np.float64) + np.array([1e-4, 0, 0, 0])).mean() > 0.999


def test_scenes_are_as_dense_as_kittis_reduced_clouds_on_average() -> None:
    counts = [len(generate_scene(seed).points) for seed in range(100, 112)]
    assert 15_000 <= np.mean(counts) <= 20_000


def test_boxes_hold_the_points_of_their_own_object(scene: Scene) -> None:
    """All but range noise (2 cm, against walls of boxes 3 cm off) lies inside."""
    total = inside = 0
    for row in range(len(scene.boxes)):
        mine = scene.points[scene.source == row]
        held = int(points_in_boxes(mine, scene.boxes[row : row + 1]).sum())
        total, inside = total + len(mine), inside + held
    assert total > 300
    assert inside / total > 0.95


def test_boxes_are_not_much_larger_than_what_is_in_them() -> None:
    """A box of every class is filled in height up to a fifth by the solids it was drawn around."""
    rng = np.random.default_rng(0)
    for build, size in ((car, (4.0, 1.7, 1.5)), (cyclist, (1.8, 0.6, 1.7)), (pedestrian, (0.8, 0.6, 1.75))):
        corners = [
            solid.vertices
            if hasattr(solid, "vertices")
            else np.stack([solid.centre - solid.radii, solid.centre + solid.radii])
            for solid in build(*size, rng)
        ]
        extent = np.ptp(np.concatenate(corners), axis=0)
        assert (extent <= np.array(size) + 0.05).all()
        assert (extent >= 0.7 * np.array(size)).all()


def test_points_inside_boxes_are_counted_right(scene: Scene) -> None:
    """Against a second way: the planes of the box's faces, from its corners."""
    for row, box_ in enumerate(scene.boxes.astype(np.float64)):
        axis_x = np.array([math.cos(box_[6]), math.sin(box_[6]), 0.0])
        axis_y = np.array([-math.sin(box_[6]), math.cos(box_[6]), 0.0])
        middle = box_[:3] + np.array([0.0, 0.0, box_[5] / 2])
        offset = scene.points[:, :3].astype(np.float64) - middle
        count = 0
        keep = np.ones(len(offset), dtype=bool)
        for axis, size in ((axis_x, box_[3]), (axis_y, box_[4]), (np.array([0.0, 0.0, 1.0]), box_[5])):
            keep &= np.abs(offset @ axis) <= size / 2
        count = int(keep.sum())
        assert abs(count - int(scene.points_in_box[row])) <= 1  # a point on the border may round either way
        assert scene.points_in_box[row] >= 1


def test_ground_is_outside_boxes(scene: Scene) -> None:
    """Ground returns reach into boxes by no more than its unevenness, at their very bottom."""
    ground = scene.points[scene.source == -1]
    assert len(ground) > 1000
    raised = scene.boxes.copy()
    raised[:, 2] += 0.25
    raised[:, 5] -= 0.25
    assert points_in_boxes(ground, raised).sum() == 0


def test_boxes_do_not_overlap(scene: Scene) -> None:
    inside = points_in_boxes(scene.points, scene.boxes)
    assert (inside.sum(axis=1) <= 1).all()


def test_boxes_follow_mmdet3ds_convention(scene: Scene) -> None:
    assert scene.boxes.dtype == np.float32 and scene.boxes.shape == (len(scene.labels), 7)
    assert (scene.boxes[:, 3] >= 0.5).all() and (np.abs(scene.boxes[:, 6]) <= np.float32(math.pi)).all()
    cars = scene.boxes[scene.labels == CLASSES.index("Car")]
    assert (cars[:, 3] > cars[:, 4]).all()
    assert (np.abs(scene.boxes[:, 2] + 1.73) < 1.5).all()


def test_a_car_faces_where_its_yaw_points() -> None:
    """The cabin sits behind the middle: the highest solids lie towards the tail."""
    for seed in range(5):
        solids = car(4.0, 1.7, 1.5, np.random.default_rng(seed))
        roof = solids[2]
        assert roof.vertices[:, 0].mean() < 0  # type: ignore[union-attr]
        turned = place(solids, 10.0, 5.0, -1.7, math.pi / 2)[2]
        assert turned.vertices[:, 1].mean() < 5.0  # type: ignore[union-attr]


def test_the_sample_frame_shows_every_class_well() -> None:
    sample = scenes.sample_scene()
    data = scenes.sample_frame()
    assert len(data) == 16 * len(sample.points)
    assert np.array_equal(np.frombuffer(data, dtype="<f4").reshape(-1, 4), sample.points)
    near = (sample.boxes[:, 0] < 48) & (np.abs(sample.boxes[:, 1]) < 30) & (sample.points_in_box >= 60)
    counts = [int((near & (sample.labels == label)).sum()) for label in range(3)]
    assert counts[0] >= 1 and counts[1] >= 1 and counts[2] >= 4
    assert scenes.SAMPLE_SEED not in {held_out_seed(0), training_seed(0)}


def test_training_and_held_out_seeds_never_meet() -> None:
    assert training_seed(999_999) < held_out_seed(0)
    for wrong in (-1, 1_000_000):
        with pytest.raises(ValueError, match="numbered 0 to 999999"):
            training_seed(wrong)
        with pytest.raises(ValueError, match="numbered 0 to 999999"):
            held_out_seed(wrong)


def test_points_on_a_boxs_border_are_inside() -> None:
    cuboid = np.array([[10.0, 0.0, -1.0, 4.0, 2.0, 1.5, 0.0]], dtype=np.float32)
    points = np.array(
        [[12, 0, -1, 0], [12.01, 0, -1, 0], [10, 1, 0.5, 0], [10, 0, 0.6, 0], [10, 0, -1.1, 0]], np.float32
    )
    assert points_in_boxes(points, cuboid)[:, 0].tolist() == [True, False, True, False, False]
    assert points_in_boxes(points, np.zeros((0, 7), np.float32)).shape == (5, 0)


def _inside(solid: object, point: tuple[float, float, float]) -> bool:
    normals: NDArray[np.float64] = solid.normals  # type: ignore[attr-defined]
    return bool((normals @ np.array(point) <= solid.offsets + 1e-9).all())  # type: ignore[attr-defined]


def test_solids_hold_what_they_should() -> None:
    stuff = Material(0.5)
    cube = box((-1, 1), (-2, 2), (0, 3), stuff)
    assert (
        _inside(cube, (0.9, -1.9, 2.9)) and not _inside(cube, (1.1, 0, 1)) and not _inside(cube, (0, 0, -0.1))
    )
    wheel = prism(disc_outline(1.0, 0.3, 0.3), -0.1, 0.1, stuff, axis="y")
    assert (
        _inside(wheel, (1.0, 0.0, 0.3))
        and not _inside(wheel, (1.0, 0.2, 0.3))
        and not _inside(wheel, (1.0, 0, 0.7))
    )
    hat = frustum((-1, 1, -1, 1), (-0.2, 0.2, -0.2, 0.2), (0, 1), stuff)
    assert (
        _inside(hat, (0.9, 0.0, 0.05))
        and not _inside(hat, (0.9, 0.0, 0.5))
        and _inside(hat, (0.0, 0.0, 0.99))
    )
    moved = place([cube], 10.0, 0.0, 0.0, math.pi / 2)[0]
    assert _inside(moved, (11.9, 0.0, 1.0)) and not _inside(moved, (10.0, 1.1, 1.0))
    with pytest.raises(ValueError, match="axis"):
        prism([(0, 0), (1, 0), (0, 1)], 0, 1, stuff, axis="x")


def test_make_scene_writes_cloud_and_ground_truth(tmp_path: Path) -> None:
    out, truth = tmp_path / "frame.bin", tmp_path / "frame.json"
    command = [
        sys.executable,
        "-m",
        "tools.demo",
        "scene",
        str(out),
        "--seed",
        "3",
        "--ground-truth",
        str(truth),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = generate_scene(3)
    assert out.read_bytes() == expected.to_bytes()
    document = json.loads(truth.read_text())
    assert len(document["bboxes_3d"]) == len(expected.boxes) == len(document["names"])
    assert f"{len(expected.points)} points" in done.stdout


def test_scene_command_ends_with_code_2_and_one_error_line(tmp_path: Path) -> None:
    for arguments in (["x.bin", "--seed", "-1"], [str(tmp_path / "no" / "such" / "x.bin")]):
        done = subprocess.run(
            [sys.executable, "-m", "tools.demo", "scene", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "error: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
