"""Upstream's own inference calls, one per kind of model, and the files they insist on.

mmdet3d's calls for cameras read calibrations from annotation files that list images by name; here such a
file is written around one frame and thrown away. Knows nothing about our runtime, servers or answers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["detect_in_cloud", "detect_in_image", "segment", "with_calibration"]

# The camera that mmdet3d's loader for one image takes without asking how many there are.
CAMERA = "CAM2"


def detect_in_cloud(module: Any, path: Path) -> Any:
    """`mmdet3d.apis.inference_detector` on a ``.bin``; the data sample."""
    from mmdet3d.apis import inference_detector

    return inference_detector(module, str(path))[0]


def segment(module: Any, path: Path) -> Any:
    """`mmdet3d.apis.inference_segmentor` on a ``.bin``; the data sample."""
    from mmdet3d.apis import inference_segmentor

    return inference_segmentor(module, str(path))[0]


def detect_in_image(module: Any, path: Path) -> Any:
    """`mmdet.apis.inference_detector` on an image file; the data sample.

    mmdet3d has no call for its models that stay in the image (the first stage of ImVoteNet), and mmdet's does not
    find the image in mmdet3d's inputs: there the pipeline and ``test_step`` are called as those calls would.
    """
    from mmdet.apis import inference_detector

    if module.cfg.get("default_scope") != "mmdet3d":
        return inference_detector(module, str(path))
    import torch
    from mmengine.dataset import Compose, pseudo_collate

    prepared = Compose(module.cfg.test_dataloader.dataset.pipeline)({"img_path": str(path), "img_id": 0})
    with torch.no_grad():
        return module.test_step(pseudo_collate([prepared]))[0]


def with_calibration(module: Any, files: Mapping[str, Path], parts: Sequence[str]) -> Any:
    """The call for one camera, several cameras, or a cloud with a camera; the data sample.

    `inference_mono_3d_detector` where the pipeline has the loader for one camera, else
    `inference_multi_modality_detector`, whose cloud nobody reads where the model takes none.
    """
    from mmdet3d.apis import inference_mono_3d_detector, inference_multi_modality_detector

    calibration = json.loads(files["calibration"].read_text())
    cameras = {name.partition(".")[2]: name for name in parts if name.startswith("image.")}
    cloud = str(files.get("points", "no-cloud.bin"))
    first = str(module.cfg.test_dataloader.dataset.pipeline[0].type)
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
        if first.endswith("LoadImageFromFileMono3D"):
            return inference_mono_3d_detector(module, image, str(annotations), CAMERA)
        return inference_multi_modality_detector(module, cloud, image, str(annotations), CAMERA)[0]
