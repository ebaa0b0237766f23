"""Small models of every modality: zoo configs with their backbones and pictures made little, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import archive, ops, zoo
from serve.convert import Conversion, configured_classes, convert, resolve_config
from serve.convert.random_weights import write_random_checkpoint

ops.install()


@dataclass(frozen=True)
class Small:
    """One model, converted and opened."""

    config: Path
    checkpoint: Path
    mar: Path
    opened: archive.Archive

    def files(self) -> Any:
        """The golden frame as the native side takes it: a path, or paths by part."""
        entries = self.opened.metadata.golden_frame
        if isinstance(entries, str):
            return self.opened.root / entries
        return {name: self.opened.root / entry for name, entry in entries.items()}


def _resnet18(backbone: Any) -> None:
    backbone.update(type="mmdet.ResNet", depth=18, style="pytorch", frozen_stages=-1, init_cfg=None)
    for key in ("dcn", "stage_with_dcn"):
        backbone.pop(key, None)
    backbone["norm_cfg"] = {"type": "BN", "requires_grad": False}


def _few_proposals(config: Any) -> None:
    """Of a second stage: its layers for a thousand regions take most of the time of such small pictures."""
    limits = config.model.test_cfg
    if "rpn" in limits:
        limits.rpn.update(nms_pre=200, max_per_img=200)
        limits.rcnn["max_per_img"] = min(50, limits.rcnn.max_per_img)


def mono3d(config: Any) -> None:
    _resnet18(config.model.backbone)
    config.model.neck["in_channels"] = [64, 128, 256, 512]
    _pipeline(config)[1]["scale_factor"] = 0.3


def fusion(config: Any) -> None:
    _resnet18(config.model.img_backbone)
    config.model.img_neck["in_channels"] = [64, 128, 256, 512]
    bounds, size, shape = [0, -12.8, -3, 25.6, 12.8, 1], [0.2, 0.2, 0.1], [41, 128, 128]
    config.model.data_preprocessor.voxel_layer.update(point_cloud_range=bounds, voxel_size=size)
    config.model.pts_voxel_encoder.update(point_cloud_range=bounds, voxel_size=size)
    config.model.pts_middle_encoder["sparse_shape"] = shape
    config.model.pts_backbone["layer_nums"] = [1, 1]
    for step in _pipeline(config):
        if "img_scale" in step:
            step["img_scale"] = (320, 240)
            step["transforms"][-1]["point_cloud_range"] = bounds


def multiview(config: Any) -> None:
    _resnet18(config.model.backbone)
    config.model.neck["in_channels"] = [64, 128, 256, 512]
    config.model["voxel_size"] = (5.0, 5.0, 0.5)
    _pipeline(config)[1]["transforms"][0]["scale"] = (160, 128)


def segments(config: Any) -> None:
    config.model.test_cfg.update(num_points=1024, batch_size=2)


def panoptic(config: Any) -> None:
    _resnet18(config.model.backbone)
    config.model.neck["in_channels"] = [64, 128, 256, 512]
    _pipeline(config)[1]["scale"] = (192, 144)
    _few_proposals(config)


MODELS = {
    "mono3d": ("fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d", mono3d),
    "fusion": ("mvxnet", fusion),
    "multiview": ("multiview-fcos3d_r101-dcn_8xb2_waymoD5-3d-3class", multiview),
    "depth": ("votenet-sunrgbd", lambda config: None),
    "segments": ("pointnet2_ssg_2xb16-cosine-200e_scannet-seg-xyz-only", segments),
    "panoptic": ("panoptic-fpn_r50_fpn_1x_coco", panoptic),
}


def picture(config: Any) -> None:
    """A detector of images: small pictures; ResNet-18 where there was a deeper ResNet."""
    backbone = config.model.backbone
    if backbone["type"] == "ResNet":
        widths = [64, 128, 256, 512]
        _resnet18(backbone)
        config.model.neck["in_channels"] = [widths[stage] for stage in backbone.get("out_indices", range(4))]
    for step in _pipeline(config):
        for key in ("scale", "size"):
            if key in step:
                step[key] = (192, 160)
    _few_proposals(config)


def transformer(config: Any) -> None:
    picture(config)
    for part in (config.model.encoder, config.model.decoder):
        part["num_layers"] = 2


def near_pillars(config: Any) -> None:
    _bound(config.model, [0, -12.8, -3, 25.6, 12.8, 1], [0.4, 0.4, 4])
    config.model.middle_encoder["output_shape"] = [64, 64]


def near_voxels(config: Any) -> None:
    _bound(config.model, [0, -12.8, -3, 25.6, 12.8, 1], [0.2, 0.2, 0.1])
    config.model.middle_encoder["sparse_shape"] = [41, 128, 128]


def _bound(part: Any, bounds: list[float], voxel_size: list[float]) -> None:
    """Set range, voxels and the anchors' range wherever a part of a model has them."""
    for key, value in part.items():
        if key == "point_cloud_range":
            part[key] = bounds
        elif key == "voxel_size":
            part[key] = voxel_size
        elif key == "ranges":
            part[key] = [[*bounds[:2], z, *bounds[3:5], z] for _, _, z, *_ in value]
        elif isinstance(value, dict):
            _bound(value, bounds, voxel_size)


#: One model of each kind, for what must hold whatever the kind.
KINDS = {
    **MODELS,
    "one-stage": ("retinanet_r18_fpn_1x_coco", picture),
    "two-stage": ("faster-rcnn_r50_fpn_1x_coco", picture),
    "mask": ("mask-rcnn_r50_fpn_1x_coco", picture),
    "transformer": ("detr_r50_8xb2-150e_coco", transformer),
    "rtmdet": ("rtmdet_tiny_8xb32-300e_coco", picture),
    "voxels": ("second_hv_secfpn_8xb6-80e_kitti-3d-3class", near_voxels),
    "pillars": ("pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class", near_pillars),
    "two-stage-3d": ("parta2_hv_secfpn_8xb2-cyclic-80e_kitti-3d-3class", near_voxels),
}


def _pipeline(config: Any) -> Any:
    return config.test_dataloader.dataset.pipeline


def smaller_pictures(name: str, folder: Path) -> Path:
    """Write the zoo's config called `name` with pictures of 320 by 192 pixels, all else unchanged, into `folder`."""
    path = folder / f"{name}.py"
    path.write_text(
        f"_base_ = {str(zoo.resolve(name).config_path)!r}\n"
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(320, 192), keep_ratio=True),\n"
        "    dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs',\n"
        "    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]\n"
        "test_dataloader = dict(dataset=dict(pipeline=pipeline))\n"
    )
    return path


def write(name: str, folder: Path, alter: Callable[[Any], None] = lambda config: None) -> tuple[Path, Path]:
    """Write config and checkpoint of the model called `name` into `folder`, after `alter` changed its config."""
    from mmengine.config import Config

    zoo_name, change = KINDS[name]
    config = Config.fromfile(str(zoo.resolve(zoo_name).config_path), import_custom_modules=False)
    change(config)
    alter(config)
    path, checkpoint = folder / f"{name}.py", folder / f"{name}.pth"
    config.dump(str(path))
    resolved = resolve_config(path).config
    write_random_checkpoint(resolved, tuple(configured_classes(resolved)), checkpoint)
    return path, checkpoint


def make(name: str, folder: Path) -> Small:
    """Convert the model called `name` into `folder`."""
    path, checkpoint = write(name, folder)
    made = convert(Conversion(path, checkpoint, folder, name))
    return Small(path, checkpoint, made.path, archive.extract(made.path, folder / f"{name}-opened"))
