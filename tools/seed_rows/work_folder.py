"""Folder in which the rows are run: data sets, configs, checkpoints and their logs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["SLURM", "environment", "prepare"]

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("circle", "square", "triangle")
SIZE = (192, 144)

_HEAD = """
_base_ = 'mmdet::{base}.py'
metainfo = dict(classes={classes!r})
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32), {mask_extractor}
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes={count}){mask_head}))
_pipeline = [
    dict(type='LoadImageFromFile', backend_args={backend}),
    dict(type='Resize', scale={size}, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_cfg = dict(max_epochs=1)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1))
"""
_COCO = """
def _split(name):
    return dict(
        data_root='coco', ann_file=f'annotations/instances_{name}2017.json',
        data_prefix=dict(img=f'{name}2017/'), metainfo=metainfo, pipeline=_pipeline)


train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=_split('train'))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_split('val'))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator
del _split
"""
_VOC = """
_data = dict(
    _delete_=True, type='VOCDataset', data_root='VOCdevkit/', ann_file='VOC2007/ImageSets/Main/test.txt',
    data_prefix=dict(sub_data_root='VOC2007/'), metainfo=metainfo, test_mode=True, pipeline=_pipeline)
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_data)
val_dataloader = test_dataloader
"""
# Slurm's programs, as far as one machine can stand in for a cluster: srun starts its tasks here.
SLURM = {
    "srun": """#!/bin/bash
while [[ $1 == -* ]]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; -p) shift ;; esac
    shift
done
echo "srun: $tasks tasks"
export SLURM_NTASKS=$tasks SLURM_NODELIST=node[1-1]
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
code=0
for pid in $(jobs -p); do wait "$pid" || code=$?; done
exit $code
""",
    "scontrol": "#!/bin/sh\necho 127.0.0.1\n",
}
_OLD = """
# In the form of mmdet 2.x.
_base_ = []
model = dict(
    type='FasterRCNN',
    backbone=dict(
        type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True, style='pytorch'),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, num_outs=5),
    rpn_head=dict(
        type='RPNHead', in_channels=32, feat_channels=32,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=32, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=64, roi_feat_size=7, num_classes=3,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(192, 144), flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=32), dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img'])])]
data = dict(
    samples_per_gpu=2, workers_per_gpu=0,
    test=dict(
        type='CocoDataset', ann_file='coco/annotations/instances_val2017.json', img_prefix='coco/val2017/',
        classes=('circle', 'square', 'triangle'), pipeline=test_pipeline))
evaluation = dict(interval=1, metric='bbox')
"""


def environment(folder: Path) -> dict[str, str]:
    """Environment of the rows' commands: this checkout's command and Python first on the path."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "ASSETS": str(ROOT / "serve" / "assets"),
    }


def prepare(folder: Path) -> None:
    """Write data sets and configs into an empty folder, and train the detectors that the rows test."""
    (folder / "bin").mkdir(parents=True)
    for name, module in (("mmdet3d-serve", ["-m", "serve"]), ("python", [])):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *module])} "$@"\n')
        script.chmod(0o755)
    for name, text in SLURM.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    _write_configs(folder)
    (folder / "classes.txt").write_text("\n".join(SHAPES) + "\n")
    commands = [
        "mmdet3d-serve sample-data coco coco --train 6 --val 4",
        "mmdet3d-serve sample-data kitti kitti --train 3 --val 2",
        "mmdet3d-serve sample-data voc VOCdevkit --train 2 --val 4",
        "python -m tools.seed_rows.checks video",
    ]
    for name in ("frcnn", "mask"):
        commands += [
            f"mmdet3d-serve train {name}.py --work-dir w/{name}",
            f"mv w/{name}/epoch_1.pth w/{name}.pth; mv w/{name}/2*/vis_data/2*.json w/{name}.json",
        ]
    commands.append("cp w/frcnn.pth w/voc.pth")
    commands.append("mmdet3d-serve pack coco packed.ffr && mv packed.ffr coco/coco.ffr")
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=folder, env=environment(folder), check=True)


def _write_configs(folder: Path) -> None:
    faster, mask = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco"
    plain = {"classes": SHAPES, "count": len(SHAPES), "size": SIZE, "backend": None, "masks": False}
    plain |= {"mask_extractor": "", "mask_head": ""}
    masked = plain | {
        "masks": True,
        "mask_extractor": "mask_roi_extractor=dict(out_channels=32),",
        "mask_head": f", mask_head=dict(in_channels=32, num_classes={len(SHAPES)})",
    }
    packed = plain | {"backend": {"backend": "ffrecord", "fname": "coco/coco.ffr"}}
    imports = "custom_imports = dict(imports=['serve.storage.backends'])\n"
    configs = {
        "frcnn": _HEAD.format(base=faster, **plain) + _COCO,
        "mask": _HEAD.format(base=mask, **masked) + _COCO,
        "frcnn_packed": _HEAD.format(base=faster, **packed) + _COCO + imports,
        "voc": _HEAD.format(base="pascal_voc/faster-rcnn_r50_fpn_1x_voc0712", **plain) + _VOC,
        "old_frcnn": _OLD,
    }
    for name, text in configs.items():
        (folder / f"{name}.py").write_text(text)
