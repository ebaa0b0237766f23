"""Synthetic scenes as a data set in KITTI's layout, with the annotation files that mmdet3d's ``KittiDataset`` reads.

Layout and units are those of KITTI's object benchmark (A. Geiger et al., CVPR 2012, and its development kit):
``training/velodyne``, ``calib``, ``label_2``, optionally ``image_2``, and ``ImageSets``. Beside them lie what mmdet3d's
``create_data.py kitti`` makes: ``kitti_infos_*.pkl``, version 1.1, and the database of objects for ``ObjectSample``.
Training frames are training scenes, validation frames held-out ones.

Scenes know no degree of occlusion: it is estimated from an object's returns (`_occlusion`).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.synthetic.camera import CENTRE_U, CENTRE_V, FOCAL, HEIGHT, ORIGIN, WIDTH, render_seed
from serve.synthetic.scenes import (
    CLASSES,
    Scene,
    generate_scene,
    held_out_seed,
    points_in_boxes,
    training_seed,
)

__all__ = ["write_kitti"]

Array = NDArray[np.float64]

# Classes of mmdet3d's KittiDataset, by label.
_KITTI_CLASSES = ("Pedestrian", "Cyclist", "Car", "Van", "Truck", "Person_sitting", "Tram", "Misc")
# (4, 4), metres of the left colour camera to pixels × depth. All four cameras of the layout are this one.
_CAM2IMG = np.array([[FOCAL, 0, CENTRE_U, 0], [0, FOCAL, CENTRE_V, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
# LiDAR (x forward, y left, z up) to camera (x right, y down, z forward).
_AXES = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
_LIDAR2CAM = np.eye(4)
_LIDAR2CAM[:3, :3], _LIDAR2CAM[:3, 3] = _AXES, -_AXES @ ORIGIN
_CAMERAS = ("CAM0", "CAM1", "CAM2", "CAM3")
# KITTI's easy, moderate and hard: least height of the image box in pixels, most occlusion, most truncation.
_DIFFICULTIES = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))
# Returns per square degree of the image box of an unoccluded object: a shot every 0.1728 by about 0.42 degrees, and the
# share of the box that a body fills and that pulses return from.
_RETURNS_PER_DEGREE2 = 0.6 / (0.1728 * 0.42)
_VISIBLE, _PARTLY_VISIBLE, _LARGELY_OCCLUDED, _UNKNOWN = 0, 1, 2, 3
_FEWEST_RETURNS = 5


@dataclass(frozen=True, slots=True)
class _Label:
    """One line of ``label_2``, and the row of its box in the scene.

    ``bbox`` is x1, y1, x2, y2 in pixels; ``size`` length, height, width in metres; ``location`` x, y, z of the bottom
    centre in the camera's frame in metres; ``rotation_y`` and ``alpha`` in radians.
    """

    name: str
    truncated: float
    occluded: int
    alpha: float
    bbox: list[float]
    size: list[float]
    location: list[float]
    rotation_y: float
    returns: int
    row: int

    @property
    def difficulty(self) -> int:
        """0 easy, 1 moderate, 2 hard, -1 beyond, as mmdet3d's converter grades it."""
        height = self.bbox[3] - self.bbox[1]
        for grade, (least_height, most_occluded, most_truncated) in enumerate(_DIFFICULTIES):
            if height > least_height and self.occluded <= most_occluded and self.truncated <= most_truncated:
                return grade
        return -1

    def line(self) -> str:
        """Format the line: sizes as height, width, length."""
        length, height, width = self.size
        numbers = [*self.bbox, height, width, length, *self.location, self.rotation_y]
        return (
            f"{self.name} {self.truncated:.2f} {self.occluded} {self.alpha:.4f} "
            + " ".join(f"{number:.4f}" for number in numbers)
            + "\n"
        )


def write_kitti(
    folder: Path,
    *,
    train: int,
    val: int,
    first: int = 0,
    images: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, int]:
    """Write a data set into an empty folder; the same files for the same arguments.

    Args:
        folder: root of the data set; made.
        train: number of training frames, from training scene `first` on.
        val: number of validation frames, from held-out scene `first` on.
        first: first scene of either kind.
        images: render the camera's image of every frame, which takes seconds each.
        progress: wraps the frame numbers, such as `tqdm.tqdm`.

    Returns:
        Number of labelled objects per class.
    """
    training = folder / "training"
    parts = ["velodyne", "calib", "label_2", *(["image_2"] if images else [])]
    for part in (*(training / name for name in parts), folder / "ImageSets", folder / "kitti_gt_database"):
        part.mkdir(parents=True)
    # The clouds have only what the camera sees, like those that mmdet3d reduces.
    (training / "velodyne_reduced").symlink_to("velodyne", target_is_directory=True)
    infos: list[dict[str, Any]] = []
    database: dict[str, list[dict[str, Any]]] = {name: [] for name in CLASSES}
    counts = dict.fromkeys(CLASSES, 0)
    for index in progress(range(train + val)):
        seed = training_seed(first + index) if index < train else held_out_seed(first + index - train)
        scene = generate_scene(seed)
        labels = [label for row in range(len(scene.boxes)) if (label := _label(scene, row)) is not None]
        name = f"{index:06d}"
        (training / "velodyne" / f"{name}.bin").write_bytes(scene.to_bytes())
        (training / "calib" / f"{name}.txt").write_text(_calibration(), encoding="ascii")
        (training / "label_2" / f"{name}.txt").write_text("".join(label.line() for label in labels))
        if images:
            cv2.imwrite(str(training / "image_2" / f"{name}.png"), render_seed(seed))
        infos.append(_info(index, labels))
        for label in labels:
            counts[label.name] += 1
        if index < train:
            _add_objects(database, folder, index, scene, labels)
    for split, members in {"train": infos[:train], "val": infos[train:], "trainval": infos}.items():
        lines = "".join(f"{info['sample_idx']:06d}\n" for info in members)
        (folder / "ImageSets" / f"{split}.txt").write_text(lines)
        _dump({"metainfo": _metainfo(), "data_list": members}, folder / f"kitti_infos_{split}.pkl")
    (folder / "ImageSets" / "test.txt").write_text("")
    _dump(database, folder / "kitti_dbinfos_train.pkl")
    return counts


def _label(scene: Scene, row: int) -> _Label | None:
    """Describe a box in KITTI's terms; None if the image does not show it."""
    box = scene.boxes[row].astype(np.float64)
    corners = _to_camera(_corners(box))
    depth = np.maximum(corners[:, 2], 0.1)
    u = FOCAL * corners[:, 0] / depth + CENTRE_U
    v = FOCAL * corners[:, 1] / depth + CENTRE_V
    full = np.array([u.min(), v.min(), u.max(), v.max()])
    seen = np.clip(full, 0, [WIDTH - 1, HEIGHT - 1] * 2)
    area, whole = (float(np.prod(b[2:] - b[:2])) for b in (seen, full))
    if area <= 0:
        return None
    location = _to_camera(box[None, :3])[0]
    rotation = _wrap(-box[6] - math.pi / 2)
    returns = int(scene.points_in_box[row])
    return _Label(
        name=CLASSES[int(scene.labels[row])],
        truncated=round(1 - area / whole, 2),
        occluded=_occlusion(returns, area),
        alpha=round(_wrap(rotation - math.atan2(location[0], location[2])), 4),
        bbox=[round(float(number), 4) for number in seen],
        size=[round(float(number), 4) for number in (box[3], box[5], box[4])],
        location=[round(float(number), 4) for number in location],
        rotation_y=round(rotation, 4),
        returns=returns,
        row=row,
    )


def _occlusion(returns: int, area: float) -> int:
    """Grade occlusion as KITTI does, 0 to 3, from the returns per square degree of the image box (area in px²)."""
    if returns < _FEWEST_RETURNS:
        return _UNKNOWN
    expected = _RETURNS_PER_DEGREE2 * area * math.degrees(1 / FOCAL) ** 2
    share = returns / max(expected, 1.0)
    return _VISIBLE if share > 0.5 else _PARTLY_VISIBLE if share > 0.2 else _LARGELY_OCCLUDED


def _corners(box: Array) -> Array:
    """Corners (8, 3) of a box (x, y, z of the bottom centre, dx, dy, dz, yaw) in the LiDAR's frame, metres."""
    x, y, z = (grid.ravel() for grid in np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [0.0, 1.0]))
    along, across = x * box[3], y * box[4]
    cos, sin = math.cos(box[6]), math.sin(box[6])
    return np.column_stack(
        [box[0] + cos * along - sin * across, box[1] + sin * along + cos * across, box[2] + z * box[5]]
    )


def _to_camera(points: Array) -> Array:
    return np.asarray(points @ _LIDAR2CAM[:3, :3].T + _LIDAR2CAM[:3, 3])


def _wrap(angle: float) -> float:
    return math.atan2(math.sin(angle), math.cos(angle))


def _calibration() -> str:
    rows = {f"P{k}": _CAM2IMG[:3] for k in range(4)}
    rows |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": _LIDAR2CAM[:3], "Tr_imu_to_velo": np.eye(4)[:3]}
    lines = [f"{name}: " + " ".join(f"{number:.12e}" for number in rows[name].ravel()) for name in rows]
    return "\n".join(lines) + "\n\n"


def _info(index: int, labels: list[_Label]) -> dict[str, Any]:
    """Entry of a frame in mmdet3d's annotation file."""
    images: dict[str, Any] = {
        camera: {"cam2img": _CAM2IMG.tolist(), "lidar2img": (_CAM2IMG @ _LIDAR2CAM).tolist()}
        for camera in _CAMERAS
    }
    images["CAM2"] |= {
        "img_path": f"{index:06d}.png",
        "height": HEIGHT,
        "width": WIDTH,
        "lidar2cam": _LIDAR2CAM.tolist(),
    }
    images["R0_rect"] = np.eye(4).tolist()
    return {
        "sample_idx": index,
        "images": images,
        "lidar_points": {
            "num_pts_feats": 4,
            "lidar_path": f"{index:06d}.bin",
            "Tr_velo_to_cam": _LIDAR2CAM.tolist(),
            "Tr_imu_to_velo": np.eye(4).tolist(),
        },
        "instances": [_instance(number, label) for number, label in enumerate(labels)],
        "cam_instances": {"CAM2": [_in_camera(label) for label in labels]},
    }


def _instance(number: int, label: _Label) -> dict[str, Any]:
    kind = _KITTI_CLASSES.index(label.name)
    x, y, z = label.location
    y -= label.size[1] / 2
    return {
        "bbox": label.bbox,
        "bbox_label": kind,
        "bbox_3d": [*label.location, *label.size, label.rotation_y],
        "bbox_label_3d": kind,
        "depth": z,
        "center_2d": [FOCAL * x / z + CENTRE_U, FOCAL * y / z + CENTRE_V],
        "num_lidar_pts": label.returns,
        "difficulty": label.difficulty,
        "truncated": label.truncated,
        "occluded": label.occluded,
        "alpha": label.alpha,
        "score": 0.0,
        "index": number,
        "group_id": number,
    }


def _in_camera(label: _Label) -> dict[str, Any]:
    """Instance for detectors of one image: the middle of its box, not the bottom, also in pixels."""
    kind = _KITTI_CLASSES.index(label.name)
    x, y, z = label.location
    y -= label.size[1] / 2
    return {
        "bbox": label.bbox,
        "bbox_label": kind,
        "bbox_3d": [x, y, z, *label.size, label.rotation_y],
        "bbox_label_3d": kind,
        "depth": z,
        "center_2d": [FOCAL * x / z + CENTRE_U, FOCAL * y / z + CENTRE_V],
        "velocity": -1,
    }


def _metainfo() -> dict[str, Any]:
    return {
        "categories": {name: label for label, name in enumerate(_KITTI_CLASSES)},
        "dataset": "kitti",
        "info_version": "1.1",
    }


def _add_objects(
    database: dict[str, list[dict[str, Any]]], folder: Path, index: int, scene: Scene, labels: list[_Label]
) -> None:
    """Write the points of each object, relative to its box, and list them for mmdet3d's ``ObjectSample``."""
    inside = points_in_boxes(scene.points, scene.boxes)
    for number, label in enumerate(labels):
        points = scene.points[inside[:, label.row]]
        points[:, :3] -= scene.boxes[label.row, :3]
        path = f"kitti_gt_database/{index}_{label.name}_{number}.bin"
        points.astype("<f4").tofile(folder / path)
        database[label.name].append(
            {
                "name": label.name,
                "path": path,
                "image_idx": index,
                "gt_idx": number,
                "box3d_lidar": scene.boxes[label.row].copy(),
                "num_points_in_gt": len(points),
                "difficulty": label.difficulty,
                "group_id": sum(map(len, database.values())),
                "score": 0.0,
            }
        )


def _dump(content: Any, path: Path) -> None:
    with path.open("wb") as stream:
        pickle.dump(content, stream, protocol=4)
