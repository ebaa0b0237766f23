# PointPillars of mmdet3d 0.x with everything in Ceph.
_base_ = [
    "../_base_/models/hv_pointpillars_secfpn_kitti.py",
    "../_base_/datasets/kitti-3d-3class.py",
    "../_base_/schedules/cyclic_40e.py",
    "../_base_/default_runtime.py",
]
data_root = "data/kitti/"
class_names = ["Pedestrian", "Cyclist", "Car"]
point_cloud_range = [0, -39.68, -3, 69.12, 39.68, 1]
backend_args = dict(
    backend="petrel",
    path_mapping=dict(
        {"./data/kitti/": "s3://lidar/kitti/", "data/kitti/": "s3://lidar/kitti/"},
    ),
)
db_sampler = dict(
    data_root=data_root,
    info_path=data_root + "kitti_dbinfos_train.pkl",
    rate=1.0,
    prepare=dict(filter_by_difficulty=[-1], filter_by_min_points=dict(Car=5)),
    sample_groups=dict(Car=15),
    classes=class_names,
    points_loader=dict(
        type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4, backend_args=backend_args
    ),
    backend_args=backend_args,
)
train_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4, backend_args=backend_args),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True, backend_args=backend_args),
    dict(type="ObjectSample", db_sampler=db_sampler),
    dict(type="ObjectNoise", num_try=100, translation_std=[0.25, 0.25, 0.25], rot_range=[-0.157, 0.157]),
    dict(type="RandomFlip3D", flip_ratio_bev_horizontal=0.5),
    dict(type="GlobalRotScaleTrans", rot_range=[-0.785, 0.785], scale_ratio_range=[0.95, 1.05]),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="PointShuffle"),
    dict(type="DefaultFormatBundle3D", class_names=class_names),
    dict(type="Collect3D", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
]
test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4, backend_args=backend_args),
    dict(
        type="MultiScaleFlipAug3D",
        img_scale=(1333, 800),
        pts_scale_ratio=1,
        flip=False,
        transforms=[
            dict(
                type="GlobalRotScaleTrans",
                rot_range=[0, 0],
                scale_ratio_range=[1.0, 1.0],
                translation_std=[0, 0, 0],
            ),
            dict(type="RandomFlip3D"),
            dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
            dict(type="DefaultFormatBundle3D", class_names=class_names, with_label=False),
            dict(type="Collect3D", keys=["points"]),
        ],
    ),
]
data = dict(
    train=dict(
        type="RepeatDataset",
        times=2,
        dataset=dict(pipeline=train_pipeline, classes=class_names, backend_args=backend_args),
    ),
    val=dict(pipeline=test_pipeline, classes=class_names, backend_args=backend_args),
    test=dict(pipeline=test_pipeline, classes=class_names, backend_args=backend_args),
)
load_from = "s3://lidar/checkpoints/hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class.pth"
resume_from = None
workflow = [("train", 1)]
checkpoint_config = dict(interval=1, max_keep_ckpts=2, out_dir="s3://lidar/runs")
evaluation = dict(interval=1, save_best="bbox", out_dir="s3://lidar/runs")
log_config = dict(
    interval=50, hooks=[dict(type="TextLoggerHook", out_dir="s3://lidar/runs", keep_local=False)]
)
