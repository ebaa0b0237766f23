"""Upstream's own calls: those that build a model, those that run one, and the files they insist on.

What stops upstream from building or running a model at all is got out of the way first (`serve.runtime.patches`),
so that there is something to compare with. mmdet3d's calls for cameras read calibrations from annotation files
that list images by name; here such a file is written around one frame and thrown away. Knows nothing about
servers or answers.
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
    "detect_with_calibration",
    "patch",
    "segment_points",
]

# The camera that mmdet3d's loader for one image takes without asking how many there are.
CAMERA = "CAM2"


def build(config: Any, checkpoint: Path, device: str) -> Any:
    """`mmdet3d.apis.init_model` or `mmdet.apis.init_detector`, whichever `config` (mmengine's) is written for."""
    if config.get("default_scope") == "mmdet3d":
        from mmdet3d.apis import init_model

        return init_model(config, str(checkpoint), device=device)
    from mmdet.apis import init_detector

    from serve.runtime import patches

    dataset = config.get("test_dataloader", {}).get("dataset", {})
    if "pipeline" in dataset:  # panoptic truth wants a package to be loaded, and there is no truth here
        dataset.pipeline = [step for step in dataset.pipeline if step["type"] != "LoadPanopticAnnotations"]
    patches.use_torch_sync_bn(config.model)
    # Without options to merge, mmdet looks for a backbone, which a teacher's and student's wrapper has not;
    # without a palette, it builds the data set to ask for its colours, which may want a package.
    options: dict[str, Any] | None = None if "backbone" in config.model else {}
    return init_detector(config, str(checkpoint), palette="random", device=device, cfg_options=options)


def patch(module: Any) -> tuple[str, ...]:
    """Mend what upstream cannot run, and nothing else; sentences on what was done."""
    from serve.runtime import patches

    notes = []
    if patches.add_missing_loss(module):
        notes.append("mmdet asks SSD's head for a loss that it does not have; it was given none")
    if importlib.util.find_spec("torchvision") is None and patches.disable_torchvision_align(module):
        notes.append("torchvision is not installed; mmcv's own kernel aligns the regions of interest")
    return tuple(notes)


def detect_in_points(module: Any, path: Path) -> Any:
    """`mmdet3d.apis.inference_detector` on a ``.bin``; the data sample."""
    from mmdet3d.apis import inference_detector

    return inference_detector(module, str(path))[0]


def segment_points(module: Any, path: Path) -> Any:
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


def detect_with_calibration(module: Any, files: Mapping[str, Path], parts: Sequence[str]) -> Any:
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
