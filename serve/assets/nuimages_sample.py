"""Training and test of the small FCOS on the pictures in nuImages' layout that this file lies beside.

Written by ``mmdet3d-serve sample-data nuimages``. The annotations are made from the tables first::

    mmdet3d-serve tools nuimage_converter --data-root FOLDER --version v1.0-train v1.0-val --out-dir FOLDER/annotations/
"""

_base_ = ["fcos_sample.py"]

data_root = "{{ fileDirname }}/"
metainfo = dict(classes=("car", "pedestrian", "traffic_cone"))
train_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/nuimages_v1.0-train.json",
        data_prefix=dict(img=""),
    )
)
val_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/nuimages_v1.0-val.json",
        data_prefix=dict(img=""),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/nuimages_v1.0-val.json")
test_evaluator = val_evaluator
