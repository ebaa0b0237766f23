"""The data set in KITTI's layout: what mmdet3d reads is what the scenes hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from serve.synthetic.camera import HEIGHT, WIDTH
from serve.synthetic.kitti import write_kitti
from serve.synthetic.scenes import CLASSES, generate_scene, held_out_seed, training_seed

TRAIN, VAL = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kitti") / "data"
    write_kitti(path, train=TRAIN, val=VAL)
    return path


def infos(folder: Path, split: str) -> list:
    return pickle.loads((folder / f"kitti_infos_{split}.pkl").read_bytes())["data_list"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_write_the_same_files(folder, tmp_path):
    write_kitti(tmp_path / "again", train=TRAIN, val=VAL)
    assert files(tmp_path / "again") == files(folder)


def test_frames_are_training_scenes_then_held_out_scenes(folder):
    scenes = [*map(training_seed, range(TRAIN)), *map(held_out_seed, range(VAL))]
    for index, seed in enumerate(scenes):
        cloud = (folder / "training" / "velodyne_reduced" / f"{index:06d}.bin").read_bytes()
        assert cloud == generate_scene(seed).to_bytes()
    assert (folder / "ImageSets" / "val.txt").read_text().split() == ["000003", "000004"]


def test_mmdet3d_reads_the_boxes_of_the_scenes(folder):
    from mmdet3d.datasets import KittiDataset

    dataset = KittiDataset(
        data_root=str(folder),
        ann_file="kitti_infos_val.pkl",
        data_prefix={"pts": "training/velodyne_reduced"},
        metainfo={"classes": list(CLASSES)},
        modality={"use_lidar": True, "use_camera": False},
        test_mode=True,
    )
    for index in range(VAL):
        scene = generate_scene(held_out_seed(index))
        found = dataset.get_ann_info(index)
        rows = [  # every box of the file is one of the scene, in order
            int(np.abs(scene.boxes[:, :3] - box[:3]).sum(axis=1).argmin())
            for box in found["gt_bboxes_3d"].tensor.numpy()
        ]
        assert rows == sorted(set(rows)) and len(rows) >= len(scene.boxes) - 2
        np.testing.assert_allclose(found["gt_bboxes_3d"].tensor[:, :6], scene.boxes[rows, :6], atol=2e-4)
        turned = found["gt_bboxes_3d"].tensor[:, 6].numpy() - scene.boxes[rows, 6]
        np.testing.assert_allclose(np.sin(turned), 0, atol=2e-4)
        np.testing.assert_allclose(np.cos(turned), 1, atol=2e-4)
        assert found["gt_labels_3d"].tolist() == scene.labels[rows].tolist()


def test_image_boxes_lie_in_the_image_and_hold_the_projected_points(folder):
    for info in infos(folder, "trainval"):
        points = np.fromfile(
            folder / "training" / "velodyne" / info["lidar_points"]["lidar_path"], "<f4"
        ).reshape(-1, 4)
        projected = (
            np.c_[points[:, :3], np.ones(len(points))] @ np.array(info["images"]["CAM2"]["lidar2img"]).T
        )
        pixels = projected[:, :2] / projected[:, 2:3]
        for each in info["instances"]:
            x1, y1, x2, y2 = each["bbox"]
            assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT
            inside = ((pixels >= [x1, y1]) & (pixels <= [x2, y2])).all(axis=1).sum()
            assert inside >= each["num_lidar_pts"]


def test_all_grades_of_difficulty_occur(folder):
    grades = [each["difficulty"] for info in infos(folder, "trainval") for each in info["instances"]]
    assert set(grades) == {-1, 0, 1, 2}


def test_label_files_say_what_the_annotation_file_says(folder):
    for info in infos(folder, "trainval"):
        lines = (folder / "training" / "label_2" / f"{info['sample_idx']:06d}.txt").read_text().splitlines()
        assert len(lines) == len(info["instances"])
        for line, each in zip(lines, info["instances"], strict=True):
            fields = line.split()
            x, y, z, length, height, width, yaw = each["bbox_3d"]
            assert CLASSES[each["bbox_label"]] == fields[0]
            assert [float(text) for text in fields[4:]] == [
                *each["bbox"],
                height,
                width,
                length,
                x,
                y,
                z,
                yaw,
            ]


def test_objects_of_the_database_have_the_points_of_their_box(folder):
    database = pickle.loads((folder / "kitti_dbinfos_train.pkl").read_bytes())
    for name in CLASSES:
        for entry in database[name]:
            points = np.fromfile(folder / entry["path"], "<f4").reshape(-1, 4)
            assert len(points) == entry["num_points_in_gt"] > 0
            reach = np.hypot(*entry["box3d_lidar"][3:5]) / 2 + 1e-3
            assert (np.hypot(points[:, 0], points[:, 1]) <= reach).all()
            assert (points[:, 2] >= -1e-3).all() and (points[:, 2] <= entry["box3d_lidar"][5] + 1e-3).all()
