"""Data sets with predictions that are neither right nor wrong throughout: ground truth, moved, dropped and mixed up."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.protocol.json_bodies import encode_json
from serve.runtime.predictions import postprocess
from serve.synthetic.coco import SHAPES, draw_picture, write_coco
from serve.synthetic.kitti import write_kitti
from serve.synthetic.nuscenes import write_drives
from serve.synthetic.releases import NUSCENES, Release
from serve.synthetic.scenes import CLASSES, generate_scene, held_out_seed

FRAMES = 6
# Of the sample configs in nuScenes' and Lyft's layout.
DRIVE_CLASSES = ("pedestrian", "bicycle", "car")
MODEL = {"name": "made", "version": "1.0"}


@dataclass(frozen=True)
class Predictions:
    """Data samples of upstream's by the bytes of their frame, and the same as answers of a server."""

    samples: dict[bytes, Any]
    answers: dict[bytes, Any]


def coco(folder: Path) -> Predictions:
    """Write pictures of shapes; predicted boxes and masks of the validation pictures."""
    write_coco(folder, train=1, val=FRAMES)
    rng = np.random.default_rng(5)
    samples = {
        path.read_bytes(): _shapes(draw_picture(1_000_000 + index), rng)
        for index, path in enumerate(sorted((folder / "val2017").iterdir()))
    }
    return Predictions(samples, _answers(samples, SHAPES, None))


def pictures(folder: Path, write: Callable[..., Any], found: str, classes: tuple[str, ...]) -> Predictions:
    """Write pictures of shapes in another layout; predicted boxes and masks of the validation pictures.

    Args:
        folder: root of the data set.
        write: writes it.
        found: pattern of the validation pictures' paths, in whose order they are drawn.
        classes: names of circle, square and triangle there.
    """
    write(folder, train=1, val=FRAMES)
    rng = np.random.default_rng(5)
    paths = sorted(folder.glob(found))[-FRAMES:]
    samples = {
        path.read_bytes(): _shapes(draw_picture(1_000_000 + index), rng) for index, path in enumerate(paths)
    }
    return Predictions(samples, _answers(samples, classes, None))


def kitti(folder: Path) -> Predictions:
    """Write scenes; predicted 3D boxes of the validation clouds."""
    write_kitti(folder, train=1, val=FRAMES)
    rng = np.random.default_rng(6)
    scenes = [generate_scene(held_out_seed(index)) for index in range(FRAMES)]
    samples = {scene.to_bytes(): _boxes(scene, rng) for scene in scenes}
    return Predictions(samples, _answers(samples, CLASSES, "LiDAR"))


def drives(folder: Path, release: Release) -> Predictions:
    """Write drives in nuScenes' or Lyft's layout; predicted 3D boxes, with velocities, of the validation clouds."""
    write_drives(folder, release, train=1, val=FRAMES)
    rng = np.random.default_rng(7)
    with (folder / f"{release.name}_infos_val.pkl").open("rb") as stream:
        entries = pickle.load(stream)["data_list"]
    clouds = folder / release.files / release.lidar
    samples = {
        (clouds / entry["lidar_points"]["lidar_path"]).read_bytes(): _moving(entry, release, rng)
        for entry in entries
    }
    return Predictions(samples, _answers(samples, DRIVE_CLASSES, "LiDAR"))


def _answers(samples: dict[bytes, Any], classes: tuple[str, ...], box_type: str | None) -> dict[bytes, Any]:
    return {
        frame: json.loads(encode_json(postprocess(sample, classes, box_type, MODEL)))
        for frame, sample in samples.items()
    }


def _shapes(picture: Any, rng: np.random.Generator) -> Any:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    boxes, masks = [], []
    for mask in picture.masks:
        moved = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
        rows, columns = np.flatnonzero(moved.any(axis=1)), np.flatnonzero(moved.any(axis=0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        masks.append(moved)
    labels = np.array(picture.labels)
    wrong = rng.random(len(labels)) < 0.2
    labels[wrong] = rng.integers(0, len(SHAPES), wrong.sum())
    sample = DetDataSample()
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(np.array(boxes), dtype=torch.float32) + torch.rand(len(boxes), 4),
        scores=torch.tensor(rng.random(len(boxes)), dtype=torch.float32),
        labels=torch.tensor(labels),
        masks=torch.tensor(np.array(masks)),
    )
    return sample


def _moving(entry: dict[str, Any], release: Release, rng: np.random.Generator) -> Any:
    """Boxes of an entry of the annotation file, moved and mixed up."""
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    found = [one for one in entry["instances"] if one["num_lidar_pts"] and rng.random() < 0.85]
    boxes = np.array([one["bbox_3d"] for one in found])
    boxes[:, 2] -= boxes[:, 5] / 2  # the bottom
    boxes += rng.normal(0, 0.08, boxes.shape)
    if release is NUSCENES:
        boxes = np.hstack([boxes, [one["velocity"] for one in found] + rng.normal(0, 0.2, (len(found), 2))])
    labels = [DRIVE_CLASSES.index(release.classes[one["bbox_label_3d"]]) for one in found]
    wrong = rng.random(len(labels)) < 0.1
    labels = np.where(wrong, (np.array(labels) + 1) % len(DRIVE_CLASSES), labels)
    sample = Det3DDataSample()
    sample.pred_instances_3d = InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32), box_dim=boxes.shape[1]),
        scores_3d=torch.tensor(rng.random(len(boxes)), dtype=torch.float32),
        labels_3d=torch.tensor(labels),
    )
    return sample


def _boxes(scene: Any, rng: np.random.Generator) -> Any:
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    kept = rng.random(len(scene.boxes)) < 0.8
    boxes = scene.boxes[kept] + rng.normal(0, 0.03, (int(kept.sum()), 7))
    labels = scene.labels[kept].copy()
    wrong = rng.random(len(labels)) < 0.1
    labels[wrong] = (labels[wrong] + 1) % len(CLASSES)
    sample = Det3DDataSample()
    sample.pred_instances_3d = InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32)),
        scores_3d=torch.tensor(rng.random(len(boxes)), dtype=torch.float32),
        labels_3d=torch.tensor(labels),
    )
    return sample
