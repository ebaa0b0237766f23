"""Data sets of a few frames, written for the tests: COCO and KITTI."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("square", "disc")
SIDE = 96


def write_coco(folder: Path, images: int = 4, classes=CLASSES, *, masks: bool = True) -> Path:
    """Write `images` pictures with a square and a disc each, and COCO annotations; return the annotation file."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(3)
    content: dict = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    for number in range(images):
        picture = np.full((SIDE, SIDE, 3), 40, np.uint8)
        name = f"{number:03}.jpg"
        content["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for label in range(2):
            x, y = (int(v) for v in rng.integers(2, 20, 2))
            x += 46 * label
            side = int(rng.integers(20, 28))
            colour = [(0, 0, 255), (0, 255, 0)][label]
            if label == 0:
                cv2.rectangle(picture, (x, y), (x + side, y + side), colour, -1)
            else:
                cv2.circle(picture, (x + side // 2, y + side // 2), side // 2, colour, -1)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    **(
                        {"segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]]}
                        if masks
                        else {}
                    ),
                }
            )
        cv2.imwrite(str(folder / "images" / name), picture)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return file


def detector_config(
    folder: Path, data: Path, *, epochs: int = 1, base: str = "faster-rcnn", masks: bool = False
) -> Path:
    """Write the config of a small detector on the data of `write_coco`, on top of the zoo's."""
    model = {
        "faster-rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
        "mask-rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    }
    mask_head = ", mask_head=dict(num_classes=2)" if masks else ""
    text = f"""
_base_ = 'mmdet::{model[base]}.py'
metainfo = dict(classes={CLASSES!r})
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=2){mask_head}))
"""
    if masks:
        text = text.replace(
            "bbox_roi_extractor=dict(out_channels=32),",
            "bbox_roi_extractor=dict(out_channels=32), mask_roi_extractor=dict(out_channels=32),",
        ).replace("mask_head=dict(num_classes=2)", "mask_head=dict(in_channels=32, num_classes=2)")
    text += f"""
data_root = {str(data)!r}
_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({SIDE}, {SIDE}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
_data = dict(
    data_root=data_root, ann_file='annotations.json', data_prefix=dict(img='images/'), metainfo=metainfo,
    pipeline=_pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=_data)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_data)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs})
param_scheduler = []
default_hooks = dict(logger=dict(interval=1))
"""
    path = folder / "tiny.py"
    path.write_text(text)
    return path
