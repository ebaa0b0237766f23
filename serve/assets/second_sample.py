"""Training and test of the demonstration SECOND on the data set that this file lies in.

Written by ``mmdet3d-serve sample-data kitti``. The training goes on from the demonstration's weights, so that some
minutes of a CPU are enough; ``--cfg-options load_from=None`` starts from scratch, which takes many more frames.
"""

_base_ = ["second_demo.py"]

data_root = "{{ fileDirname }}/"
class_names = ["Pedestrian", "Cyclist", "Car"]
metainfo = dict(classes=class_names)
point_cloud_range = [0, -32, -3, 51.2, 32, 1]
max_epochs = 2
load_from = data_root + "second_demo.pth"

train_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="RandomFlip3D", flip_ratio_bev_horizontal=0.5),
    dict(
        type="GlobalRotScaleTrans",
        rot_range=[-0.52, 0.52],
        scale_ratio_range=[0.95, 1.05],
        translation_std=[0, 0, 0],
    ),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="PointShuffle"),
    dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="KittiDataset",
        data_root=data_root,
        ann_file="kitti_infos_train.pkl",
        data_prefix=dict(pts="training/velodyne_reduced"),
        pipeline=train_pipeline,
        modality=dict(use_lidar=True, use_camera=False),
        metainfo=metainfo,
        box_type_3d="LiDAR",
    ),
)
test_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="KittiDataset",
        data_root=data_root,
        ann_file="kitti_infos_val.pkl",
        data_prefix=dict(pts="training/velodyne_reduced"),
        pipeline=_base_.test_pipeline,  # type: ignore[attr-defined]
        modality=dict(use_lidar=True, use_camera=False),
        test_mode=True,
        metainfo=metainfo,
        box_type_3d="LiDAR",
    ),
)
val_evaluator = dict(type="KittiMetric", ann_file=data_root + "kitti_infos_val.pkl", metric="bbox")
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
