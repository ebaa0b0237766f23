"""Data sets with predictions that are neither right nor wrong throughout: ground truth, moved, dropped and mixed up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.protocol.frames import encode_json
from serve.runtime.predictions import postprocess
from serve.synthetic.coco import SHAPES, draw_picture, write_coco
from serve.synthetic.kitti import write_kitti
from serve.synthetic.scenes import CLASSES, generate_scene, held_out_seed

FRAMES = 6
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


def kitti(folder: Path) -> Predictions:
    """Write scenes; predicted 3D boxes of the validation clouds."""
    write_kitti(folder, train=1, val=FRAMES)
    rng = np.random.default_rng(6)
    scenes = [generate_scene(held_out_seed(index)) for index in range(FRAMES)]
    samples = {scene.to_bytes(): _boxes(scene, rng) for scene in scenes}
    return Predictions(samples, _answers(samples, CLASSES, "LiDAR"))


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
