"""Training and test of the demonstration SECOND with velocities, on the drives that this file lies beside.

Written by ``mmdet3d-serve sample-data nuscenes``. Two sweeps with their times go with each frame, and boxes have a
velocity, for which nuScenes' metric asks. The training goes on from the demonstration's weights where they fit: the
first convolution and the regression of boxes start anew.
"""

_base_ = ["second_demo.py"]

data_root = "{{ fileDirname }}/"
class_names = ["pedestrian", "bicycle", "car"]
metainfo = dict(classes=class_names, version="v1.0-mini")
point_cloud_range = [0, -32, -3, 51.2, 32, 1]
data_prefix = dict(pts="samples/LIDAR_TOP", img="", sweeps="sweeps/LIDAR_TOP")
max_epochs = 4
load_from = data_root + "second_demo.pth"

model = dict(
    data_preprocessor=dict(voxel_layer=dict(max_num_points=10)),
    voxel_encoder=dict(num_features=5),
    middle_encoder=dict(in_channels=5),
    bbox_head=dict(
        anchor_generator=dict(custom_values=[0, 0]),
        bbox_coder=dict(code_size=9),
    ),
    train_cfg=dict(code_weight=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2]),
)

_load = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(type="LoadPointsFromMultiSweeps", sweeps_num=2, use_dim=[0, 1, 2, 3, 4], test_mode=True),
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
        type="NuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_train.pkl",
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
        type="NuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_val.pkl",
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
    type="NuScenesMetric",
    data_root=data_root,
    ann_file=data_root + "nuscenes_infos_val.pkl",
    metric="bbox",
)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.95, 0.99), weight_decay=0.01),
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
