"""Training and test of the demonstration SECOND on the drives in Lyft's layout that this file lies beside.

Written by ``mmdet3d-serve sample-data lyft``. The training goes on from the demonstration's weights.
"""

_base_ = ["second_demo.py"]

data_root = "{{ fileDirname }}/"
class_names = ["pedestrian", "bicycle", "car"]
metainfo = dict(classes=class_names, version="v1.01-train")
point_cloud_range = [0, -32, -3, 51.2, 32, 1]
data_prefix = dict(pts="v1.01-train/lidar", img="", sweeps="v1.01-train/lidar")
max_epochs = 2
load_from = data_root + "second_demo.pth"

_load = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=4),
]
train_pipeline = [
    *_load,
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(
        type="GlobalRotScaleTrans",
        rot_range=[-0.39, 0.39],
        scale_ratio_range=[0.95, 1.05],
        translation_std=[0, 0, 0],
    ),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectNameFilter", classes=class_names),
    dict(type="PointShuffle"),
    dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
]
test_pipeline = [
    *_load,
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="Pack3DDetInputs", keys=["points"]),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="LyftDataset",
        data_root=data_root,
        ann_file="lyft_infos_train.pkl",
        data_prefix=data_prefix,
        pipeline=train_pipeline,
        modality=dict(use_lidar=True, use_camera=False),
        metainfo=metainfo,
        box_type_3d="LiDAR",
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="LyftDataset",
        data_root=data_root,
        ann_file="lyft_infos_val.pkl",
        data_prefix=data_prefix,
        pipeline=test_pipeline,
        modality=dict(use_lidar=True, use_camera=False),
        test_mode=True,
        metainfo=metainfo,
        box_type_3d="LiDAR",
    ),
)
test_dataloader = dict(_delete_=True, **val_dataloader)
val_evaluator = dict(
    type="LyftMetric",
    data_root=data_root,
    ann_file="lyft_infos_val.pkl",
    metric="bbox",
)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, betas=(0.95, 0.99), weight_decay=0.01),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10), checkpoint=dict(type="CheckpointHook", interval=max_epochs)
)
randomness = dict(seed=0)
