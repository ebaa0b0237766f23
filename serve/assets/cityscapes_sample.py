"""Training and test of a small CondInst on the pictures in Cityscapes' layout that this file lies beside.

Written by ``mmdet3d-serve sample-data cityscapes``. The network is the small FCOS with masks.
"""

_base_ = ["fcos_sample.py"]

data_root = "{{ fileDirname }}/"
metainfo = dict(classes=("person", "rider", "car"))

model = dict(
    type="CondInst",
    data_preprocessor=dict(pad_mask=True),
    bbox_head=dict(type="CondInstBboxHead", num_params=169),
    mask_head=dict(
        type="CondInstMaskHead",
        num_layers=3,
        feat_channels=8,
        size_of_interest=8,
        mask_out_stride=4,
        max_masks_to_train=100,
        mask_feature_head=dict(
            in_channels=48,
            feat_channels=48,
            start_level=0,
            end_level=2,
            out_channels=8,
            mask_stride=8,
            num_stacked_convs=2,
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
        loss_mask=dict(type="DiceLoss", use_sigmoid=True, activate=True, eps=5e-6, loss_weight=1.0),
    ),
    test_cfg=dict(mask_thr=0.5),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(192, 144), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(192, 144), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
_annotations = "annotations/instancesonly_filtered_gtFine_"
train_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file=_annotations + "train.json",
        data_prefix=dict(img="leftImg8bit/train/"),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file=_annotations + "val.json",
        data_prefix=dict(img="leftImg8bit/val/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type="CocoMetric", ann_file=data_root + _annotations + "val.json", metric=["bbox", "segm"]),
    dict(type="CityScapesMetric", seg_prefix=data_root + "gtFine/val", outfile_prefix=None),
]
test_evaluator = val_evaluator
