"""Small models of every modality: zoo configs with their backbones and pictures made little, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import archive, ops, zoo
from serve.convert import Conversion, configured_classes, convert, resolve_config
from tools.zoo.random_weights import write_random_checkpoint

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


MODELS = {
    "mono3d": ("fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d", mono3d),
    "fusion": ("mvxnet", fusion),
    "multiview": ("multiview-fcos3d_r101-dcn_8xb2_waymoD5-3d-3class", multiview),
    "depth": ("votenet-sunrgbd", lambda config: None),
    "segments": ("pointnet2_ssg_2xb16-cosine-200e_scannet-seg-xyz-only", segments),
    "panoptic": ("panoptic-fpn_r50_fpn_1x_coco", panoptic),
}


def _pipeline(config: Any) -> Any:
    return config.test_dataloader.dataset.pipeline


def make(name: str, folder: Path) -> Small:
    """Convert the model called `name` into `folder`."""
    from mmengine.config import Config

    zoo_name, change = MODELS[name]
    config = Config.fromfile(str(zoo.resolve(zoo_name).config_path), import_custom_modules=False)
    change(config)
    path, checkpoint = folder / f"{name}.py", folder / f"{name}.pth"
    config.dump(str(path))
    resolved = resolve_config(path).config
    write_random_checkpoint(resolved, tuple(configured_classes(resolved)), checkpoint)
    made = convert(Conversion(path, checkpoint, folder, name))
    return Small(path, checkpoint, made.path, archive.extract(made.path, folder / f"{name}-opened"))
