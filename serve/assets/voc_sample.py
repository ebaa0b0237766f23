"""Training and test of the small FCOS on the pictures in Pascal VOC's layout that this file lies beside.

Written by ``mmdet3d-serve sample-data voc``.
"""

_base_ = ["fcos_sample.py"]

data_root = "{{ fileDirname }}/"
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="VOCDataset",
        metainfo=_base_.metainfo,  # type: ignore[attr-defined]
        data_root=data_root,
        ann_file="VOC2007/ImageSets/Main/train.txt",
        data_prefix=dict(sub_data_root="VOC2007/"),
        pipeline=_base_.train_pipeline,  # type: ignore[attr-defined]
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="VOCDataset",
        metainfo=_base_.metainfo,  # type: ignore[attr-defined]
        data_root=data_root,
        ann_file="VOC2007/ImageSets/Main/test.txt",
        data_prefix=dict(sub_data_root="VOC2007/"),
        test_mode=True,
        pipeline=_base_.test_pipeline,  # type: ignore[attr-defined]
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="VOCMetric", metric="mAP", eval_mode="11points")
test_evaluator = val_evaluator
