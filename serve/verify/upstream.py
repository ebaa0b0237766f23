"""Calls of mmdet's and mmdet3d's own functions to build and run a model.

Defects that keep upstream from building or running a model at all are patched first (`serve.runtime.patches`).
mmdet3d's functions for cameras read calibrations from annotation files that list images by name; a temporary one is
written for each frame.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "build",
    "detect_in_image",
    "detect_in_points",
    "detect_in_sweeps",
    "detect_with_calibration",
    "patch",
    "segment_points",
]

# The camera that mmdet3d's single-image loader uses without checking how many there are.
CAMERA = "CAM2"


def build(config: Any, checkpoint: Path, device: str) -> Any:
    """Build a model by `mmdet3d.apis.init_model` or `mmdet.apis.init_detector`, by the config's scope."""
    if config.get("default_scope") == "mmdet3d":
        from mmdet3d.apis import init_model

        return init_model(config, str(checkpoint), device=device)
    from mmdet.apis import init_detector

    from serve.runtime import patches

    dataset = config.get("test_dataloader", {}).get("dataset", {})
    if (
        "pipeline" in dataset
    ):  # loading panoptic ground truth needs a further package, and none is loaded here
        dataset.pipeline = [step for step in dataset.pipeline if step["type"] != "LoadPanopticAnnotations"]
    patches.use_torch_sync_bn(config.model)
    # Without options to merge, mmdet reads the backbone, which a teacher-student wrapper lacks; without a palette, it
    # builds the data set for its colours, which may need a further package.
    options: dict[str, Any] | None = None if "backbone" in config.model else {}
    return init_detector(config, str(checkpoint), palette="random", device=device, cfg_options=options)


def patch(module: Any) -> tuple[str, ...]:
    """Patch defects that keep upstream from running the model; returns remarks on the changes."""
    from serve.runtime import patches

    notes = []
    if patches.add_missing_loss(module):
        notes.append("mmdet reads a loss that SSD's head lacks; set it to None")
    if importlib.util.find_spec("torchvision") is None and patches.disable_torchvision_align(module):
        notes.append("torchvision is not installed; RoIAlign uses mmcv's kernel")
    return tuple(notes)


def detect_in_points(module: Any, path: Path) -> Any:
    """Run `mmdet3d.apis.inference_detector` on a ``.bin``; returns the data sample."""
    from mmdet3d.apis import inference_detector

    return inference_detector(module, str(path))[0]


def detect_in_sweeps(module: Any, key: Path, sweeps: Sequence[tuple[Path, float, Any]], box_type: str) -> Any:
    """Run the configured pipeline and ``test_step`` on a key frame and its sweeps; returns the data sample.

    mmdet3d's own functions for inference take a single cloud; its data sets give the pipeline these entries.

    Args:
        module: the model.
        key: ``.bin`` of the key frame.
        sweeps: of each sweep its ``.bin``, its seconds before the key frame, and ``lidar2sensor`` (4, 4).
        box_type: ``LiDAR``, ``Camera`` or ``Depth``.
    """
    import torch
    from mmdet3d.structures import get_box_type
    from mmengine.dataset import Compose, pseudo_collate

    box_type_3d, box_mode_3d = get_box_type(box_type)
    infos = {
        "lidar_points": {"lidar_path": str(key)},
        "timestamp": 0.0,
        "lidar_sweeps": [
            {
                "timestamp": -lag_s,
                "lidar_points": {"lidar_path": str(cloud), "lidar2sensor": lidar2sensor},
            }
            for cloud, lag_s, lidar2sensor in sweeps
        ],
        "box_type_3d": box_type_3d,
        "box_mode_3d": box_mode_3d,
    }
    with torch.no_grad():
        prepared = Compose(module.cfg.test_dataloader.dataset.pipeline)(infos)
        return module.test_step(pseudo_collate([prepared]))[0]


def segment_points(module: Any, path: Path) -> Any:
    """Run `mmdet3d.apis.inference_segmentor` on a ``.bin``; returns the data sample."""
    from mmdet3d.apis import inference_segmentor

    return inference_segmentor(module, str(path))[0]


def detect_in_image(module: Any, path: Path) -> Any:
    """Run `mmdet.apis.inference_detector` on an image file; returns the data sample.

    mmdet3d has no function for its image-only models (the first stage of ImVoteNet), and mmdet's does not find the
    image in mmdet3d's inputs: for these, pipeline and ``test_step`` are called the way those functions do.
    """
    from mmdet.apis import inference_detector

    if module.cfg.get("default_scope") != "mmdet3d":
        return inference_detector(module, str(path))
    import torch
    from mmengine.dataset import Compose, pseudo_collate

    prepared = Compose(module.cfg.test_dataloader.dataset.pipeline)({"img_path": str(path), "img_id": 0})
    with torch.no_grad():
        return module.test_step(pseudo_collate([prepared]))[0]


def detect_with_calibration(module: Any, files: Mapping[str, Path], parts: Sequence[str]) -> Any:
    """Run mmdet3d on one camera, several cameras, or a point cloud with a camera; returns the data sample.

    Calls `inference_mono_3d_detector` if the pipeline has the single-camera loader, else
    `inference_multi_modality_detector`, whose point cloud is not read if the model takes none.
    """
    from mmdet3d.apis import inference_mono_3d_detector, inference_multi_modality_detector

    calibration = json.loads(files["calibration"].read_text())
    cameras = {name.partition(".")[2]: name for name in parts if name.startswith("image.")}
    cloud = str(files.get("points", "no-cloud.bin"))
    from mmdet3d.datasets.transforms import LoadImageFromFileMono3D
    from mmdet3d.registry import TRANSFORMS

    first = TRANSFORMS.get(module.cfg.test_dataloader.dataset.pipeline[0].type)
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as folder:
        annotations = Path(folder, "frame.json")
        if cameras:
            images = {
                camera: {"img_path": str(files[part].resolve()), **calibration[camera]}
                for camera, part in cameras.items()
            }
            annotations.write_text(json.dumps({"data_list": [{"images": images}]}))
            return inference_multi_modality_detector(module, cloud, folder, str(annotations), "all")[0]
        image = str(files["image"])
        images = {CAMERA: {"img_path": image, **calibration}}
        annotations.write_text(json.dumps({"data_list": [{"images": images}]}))
        if isinstance(first, type) and issubclass(first, LoadImageFromFileMono3D):
            return inference_mono_3d_detector(module, image, str(annotations), CAMERA)
        return inference_multi_modality_detector(module, cloud, image, str(annotations), CAMERA)[0]
