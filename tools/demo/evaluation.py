"""Measure a detector on held-out synthetic scenes through mmdet3d's own inference.

``init_model`` and ``inference_detector`` do the work, not `serve.runtime`.

Which boxes count: at least `min_points` returns inside and the centre within the detector's range; the
others are ignored, found or not. AP is `tools.demo.average_precision`'s.

"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import CheckpointError, SettingsError
from serve.synthetic.scenes import CLASSES, Scene, generate_scene, held_out_seed
from tools.demo.average_precision import ClassResult, FrameDetections, FrameTruth, evaluate_class
from tools.demo.training import CHECKPOINT, CONFIG

__all__ = ["IOU_THRESHOLDS", "Evaluation", "detect", "evaluate", "load_model", "truth_of"]

IOU_THRESHOLDS = {"Pedestrian": (0.25, 0.5), "Cyclist": (0.25, 0.5), "Car": (0.5, 0.7)}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """AP per class and IoU, and what it was measured on."""

    results: tuple[ClassResult, ...]
    frames: int
    first_seed: int
    min_points: int
    point_cloud_range: tuple[float, ...]
    seconds_per_frame: float

    def table(self) -> str:
        """Format a table: class, IoU, AP and recall in percent, number of ground-truth boxes."""
        low_x, low_y, _, high_x, high_y, _ = self.point_cloud_range
        last_seed = self.first_seed + self.frames - 1
        lines = [
            f"{self.frames} held-out synthetic scenes (seeds {self.first_seed} to {last_seed}); boxes with "
            f"at least {self.min_points} returns, x {low_x:g} to {high_x:g} m, y {low_y:g} to {high_y:g} m",
            f"{'class':<12}{'BEV IoU':>8}{'AP (R40) %':>12}{'recall %':>10}{'boxes':>8}",
        ]
        for result in self.results:
            name = CLASSES[result.label]
            lines.append(
                f"{name:<12}{result.iou:>8.2f}{100 * result.ap:>12.1f}{100 * result.recall:>10.1f}"
                f"{result.ground_truths:>8d}"
            )
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format one line of JSON; AP and recall in [0, 1], null without ground truth."""
        ap: dict[str, dict[str, float | None]] = {}
        recall: dict[str, dict[str, float | None]] = {}
        for result in self.results:
            name, key = CLASSES[result.label], f"{result.iou:g}"
            ap.setdefault(name, {})[key] = None if math.isnan(result.ap) else round(result.ap, 4)
            recall.setdefault(name, {})[key] = None if math.isnan(result.recall) else round(result.recall, 4)
        return json.dumps(
            {
                "ap_bev_r40": ap,
                "recall": recall,
                "ground_truths": {CLASSES[r.label]: r.ground_truths for r in self.results},
                "frames": self.frames,
                "first_seed": self.first_seed,
                "min_points": self.min_points,
                "point_cloud_range": list(self.point_cloud_range),
                "seconds_per_frame": round(self.seconds_per_frame, 3),
            }
        )


def load_model(config: Path = CONFIG, checkpoint: Path = CHECKPOINT, device: str = "cpu") -> Any:
    """mmdet3d's ``init_model`` on a configuration and a checkpoint; only plain weights are loaded.

    Raises:
        CheckpointError: the checkpoint is missing.
    """
    if not checkpoint.is_file():
        raise CheckpointError(
            f"there is no checkpoint {checkpoint}; write one with `python -m tools.demo train`"
        )
    import serve.ops

    serve.ops.install()
    # mmengine prints where it loads from; standard output belongs to the caller's results.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # deprecations inside OpenMMLab, and its advice against CPUs
        from mmdet3d.apis import init_model

        return init_model(str(config), str(checkpoint), device=device)


def detect(model: Any, scene: Scene) -> FrameDetections:
    """mmdet3d's ``inference_detector`` on one scene."""
    from mmdet3d.apis import inference_detector

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, _ = inference_detector(model, scene.points)
    found = result.pred_instances_3d
    return FrameDetections(
        found.bboxes_3d.tensor.cpu().numpy().astype(np.float64),
        found.scores_3d.cpu().numpy().astype(np.float64),
        found.labels_3d.cpu().numpy().astype(np.int64),
    )


def truth_of(scene: Scene, limits: tuple[float, ...], min_points: int) -> FrameTruth:
    """Select a scene's boxes; ignored with fewer returns or centred outside of ``limits`` (x0, y0, z0, x1, y1, z1)."""
    x, y = scene.boxes[:, 0], scene.boxes[:, 1]
    outside = (x < limits[0]) | (x > limits[3]) | (y < limits[1]) | (y > limits[4])
    return FrameTruth(
        scene.boxes.astype(np.float64), scene.labels, outside | (scene.points_in_box < min_points)
    )


def evaluate(
    config: Path = CONFIG,
    checkpoint: Path = CHECKPOINT,
    *,
    frames: int = 200,
    first: int = 0,
    min_points: int = 5,
    device: str = "cpu",
    progress: bool = False,
) -> Evaluation:
    """AP per class of a 3-class LiDAR detector over held-out scenes ``first`` to ``first + frames - 1``.

    ``min_points`` is in returns per box, ``progress`` draws a bar on stderr.

    Raises:
        SettingsError: ``frames`` is below 1, or ``first`` or ``min_points`` is negative.
        CheckpointError: the checkpoint is missing.
    """
    if frames < 1 or first < 0 or min_points < 0:
        raise SettingsError("frames must be at least 1, first and min_points must not be negative")
    from tqdm import tqdm

    model = load_model(config, checkpoint, device)
    limits = tuple(float(v) for v in model.cfg.point_cloud_range)
    detections, truths, spent = [], [], 0.0
    for index in tqdm(range(first, first + frames), unit="frame", desc="evaluating", disable=not progress):
        scene = generate_scene(held_out_seed(index))
        started = time.perf_counter()
        detections.append(detect(model, scene))
        spent += time.perf_counter() - started
        truths.append(truth_of(scene, limits, min_points))
    results = tuple(
        evaluate_class(detections, truths, label, iou)
        for label, name in enumerate(CLASSES)
        for iou in IOU_THRESHOLDS[name]
    )
    return Evaluation(results, frames, held_out_seed(first), min_points, limits, spent / frames)
