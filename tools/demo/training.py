"""Train the demo SECOND from scratch on synthetic scenes, on a CPU, with mmdet3d's own losses.

Each frame is drawn once, kept in memory and shown every epoch under a fresh flip, turn and scale. The
optimiser is AdamW under a one-cycle cosine schedule (L. N. Smith and N. Topin, *Super-Convergence*, 2017),
as in SECOND's own recipe (betas 0.95 and 0.99, weight decay 0.01, gradients clipped at norm 10).

Does not know: real data, GPUs, resuming. The checkpoint is written in one rename at the very end, so that
an interrupted run leaves what was there before. Runs of equal options on one machine and one torch give
equal losses, as long as no time budget is set: a budget ties the schedule to the clock.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import serve
from serve.errors import SettingsError
from serve.synthetic.scenes import CLASSES, Scene, generate_scene, training_seed

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "PALETTE",
    "TrainingOptions",
    "augment",
    "one_cycle",
    "save_checkpoint",
    "train",
]

CONFIG = Path(serve.__file__).with_name("assets") / "second_demo.py"
CHECKPOINT = CONFIG.with_suffix(".pth")
PALETTE = [[220, 60, 60], [60, 170, 60], [60, 90, 220]]  # RGB, one per class

_SCENES_PER_SEED = 10_000
_FEWEST_POINTS = 5  # boxes with fewer returns are not taught
_WARM_UP = 0.25  # share of the schedule in which the rate rises
_LOG_EVERY = 20  # steps


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What `train` needs to know.

    Args:
        frames: number of different synthetic scenes.
        epochs: how often each is shown.
        seed: first training scene and seed of shuffling, augmentation and weights.
        batch_size: frames per step.
        learning_rate: peak of the one-cycle schedule.
        time_budget_min: minutes after which training ends at the latest, 0 for no limit. The schedule then
            ends in time instead of being cut off.
        threads: CPU threads for torch, 0 to leave torch's choice.
    """

    frames: int = 1500
    epochs: int = 3
    seed: int = 0
    batch_size: int = 2
    learning_rate: float = 2.5e-3
    time_budget_min: float = 0.0
    threads: int = 0

    def __post_init__(self) -> None:
        """Reject options that cannot be trained.

        Raises:
            SettingsError: a count below 1 (threads, budget and seed: below 0), or beyond a seed's scenes,
                or a rate not above 0.
        """
        for name in ("frames", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("seed", "threads", "time_budget_min"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.frames > _SCENES_PER_SEED or self.seed > 99:
            raise SettingsError(
                f"at most {_SCENES_PER_SEED} frames and seeds from 0 to 99: each seed owns its scenes"
            )
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate must be above 0, not {self.learning_rate}")


def one_cycle(progress: float, peak: float) -> float:
    """Learning rate at ``progress`` in [0, 1]: cosines from peak / 10 to peak, then to peak / 1000."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < _WARM_UP:
        low, share = peak / 10, (1 - math.cos(math.pi * progress / _WARM_UP)) / 2
    else:
        low, share = peak / 1000, (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))) / 2
    return low + (peak - low) * share


def augment(
    scene: Scene, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Mirror left-right half of the time, turn by up to 30 degrees, scale by up to 5 %, shuffle the points.

    Returns points (N, 4), boxes (M, 7) and labels (M,) of the objects with enough returns to be taught.
    """
    enough = scene.points_in_box >= _FEWEST_POINTS
    points, boxes, labels = scene.points.copy(), scene.boxes[enough].copy(), scene.labels[enough].copy()
    if rng.random() < 0.5:
        points[:, 1] *= -1
        boxes[:, 1] *= -1
        boxes[:, 6] *= -1
    angle, scale = float(rng.uniform(-math.pi / 6, math.pi / 6)), float(rng.uniform(0.95, 1.05))
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    turn = np.array([[cos, sin], [-sin, cos]], dtype=np.float32)  # for row vectors
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2] = boxes[:, :2] @ turn
    points[:, 2] *= scale
    boxes[:, 2:6] *= scale
    boxes[:, 6] += angle
    boxes[:, 6] = np.arctan2(np.sin(boxes[:, 6]), np.cos(boxes[:, 6]))
    return points[rng.permutation(len(points))], boxes, labels


def _pack(
    scenes: list[Scene], rng: np.random.Generator, limits: tuple[float, float, float, float]
) -> dict[str, Any]:
    """Augmented scenes for ``model.train_step``; box centres within ``limits`` (x0, y0, x1, y1; m)."""
    import torch
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    points, samples = [], []
    for scene in scenes:
        cloud, boxes, labels = augment(scene, rng)
        centre = boxes[:, :2]
        keep = ((centre > limits[:2]) & (centre < limits[2:])).all(axis=1)
        sample = Det3DDataSample()
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(torch.from_numpy(boxes[keep])),
            labels_3d=torch.from_numpy(labels[keep]),
        )
        points.append(torch.from_numpy(cloud))
        samples.append(sample)
    return {"inputs": {"points": points}, "data_samples": samples}


def save_checkpoint(model: Any, path: Path, training: dict[str, Any]) -> None:
    """Write weights (float32) and plain metadata in OpenMMLab's layout, by one rename.

    The file loads with ``torch.load(weights_only=True)`` and names the classes for ``init_model``.
    """
    import torch

    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    meta = {"dataset_meta": {"classes": list(CLASSES), "palette": PALETTE}, "training": training}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save({"state_dict": state, "meta": meta}, stream)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def train(
    options: TrainingOptions, out: Path = CHECKPOINT, report: Callable[[str], None] | None = None
) -> Path:
    """Train and write the checkpoint; a progress bar with loss and remaining time goes to stderr.

    Args:
        options: see `TrainingOptions`.
        out: where the checkpoint goes; its folder is made.
        report: called with a line of text every few hundred steps (losses), besides the bar.

    Returns:
        ``out``.
    """
    import serve.ops

    serve.ops.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmdet3d.models  # noqa: F401  (fills the registry)
        import torch
        from mmdet3d.registry import MODELS
        from mmengine.config import Config
        from mmengine.logging import MMLogger
        from mmengine.optim import OptimWrapper
        from mmengine.registry import init_default_scope
    from tqdm import tqdm

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.Generator(np.random.PCG64(options.seed))
    config = Config.fromfile(str(CONFIG))
    init_default_scope("mmdet3d")
    # mmengine prints every tensor that it initialises at level INFO.
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.95, 0.99), weight_decay=0.01
    )
    wrapper = OptimWrapper(optimizer, clip_grad={"max_norm": 10.0, "norm_type": 2})
    low_x, low_y, _, high_x, high_y, _ = (float(v) for v in config.point_cloud_range)
    cache: dict[int, Scene] = {}
    per_epoch = math.ceil(options.frames / options.batch_size)
    total, budget = per_epoch * options.epochs, options.time_budget_min * 60.0
    started, step = time.monotonic(), 0
    averages: dict[str, float] = {}
    with tqdm(total=total, unit="step", smoothing=0.05, mininterval=1.0, desc="training") as bar:
        for _ in range(options.epochs):
            order = rng.permutation(options.frames)
            for first in range(0, options.frames, options.batch_size):
                progress = step / total
                if budget:
                    progress = max(progress, (time.monotonic() - started) / budget)
                    if progress >= 1.0:
                        break
                for group in optimizer.param_groups:
                    group["lr"] = one_cycle(progress, options.learning_rate)
                chosen = [int(i) for i in order[first : first + options.batch_size]]
                for i in chosen:
                    if i not in cache:
                        cache[i] = generate_scene(training_seed(options.seed * _SCENES_PER_SEED + i))
                batch = _pack([cache[i] for i in chosen], rng, (low_x, low_y, high_x, high_y))
                losses = model.train_step(batch, wrapper)
                step += 1
                for key, value in losses.items():
                    averages[key] = averages.get(key, float(value)) * 0.97 + 0.03 * float(value)
                bar.update()
                if step % _LOG_EVERY == 0:
                    bar.set_postfix({key: f"{value:.3f}" for key, value in averages.items()})
                if report is not None and step % (10 * _LOG_EVERY) == 0:
                    text = ", ".join(f"{key} {value:.4f}" for key, value in averages.items())
                    report(f"step {step} of {total}: {text}")
    model.eval()
    save_checkpoint(
        model,
        out,
        {
            "frames": options.frames,
            "epochs": options.epochs,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "steps": step,
        },
    )
    return out
