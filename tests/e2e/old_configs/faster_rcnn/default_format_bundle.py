# Faster R-CNN of mmdet 2.x tested on two images at once, with the packing of several images.
_base_ = ["../_base_/models/faster_rcnn_r50_fpn.py", "../_base_/datasets/coco_detection.py"]
pipelines = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(640, 400),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[0, 0, 0], std=[1, 1, 1]),
            dict(type="Pad", size_divisor=32),
            dict(type="DefaultFormatBundle"),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(test=dict(samples_per_gpu=2, pipeline=pipelines))
evaluation = dict(interval=12)
