# PointPillars of nuScenes whose backbone starts from weights in Ceph; mmdet3d 0.x.
_base_ = [
    "../_base_/models/hv_pointpillars_fpn_nus.py",
    "../_base_/datasets/nus-3d.py",
    "../_base_/schedules/schedule_2x.py",
    "../_base_/default_runtime.py",
]
file_client_args = dict(
    backend="petrel",
    path_mapping=dict({"./data/nuscenes/": "s3://lidar/nuscenes/", "data/nuscenes/": "s3://lidar/nuscenes/"}),
)
point_cloud_range = [-50, -50, -5, 50, 50, 3]
class_names = [
    *("car", "truck", "trailer", "bus", "construction_vehicle"),
    *("bicycle", "motorcycle", "pedestrian", "traffic_cone", "barrier"),
]
model = dict(
    type="MVXFasterRCNN",
    pts_backbone=dict(
        _delete_=True,
        type="NoStemRegNet",
        arch="regnetx_1.6gf",
        init_cfg=dict(type="Pretrained", checkpoint="s3://lidar/checkpoints/regnetx_1.6gf"),
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        strides=(1, 2, 2, 2),
        base_channels=64,
        stem_channels=64,
        norm_cfg=dict(type="naiveSyncBN2d", eps=1e-3, momentum=0.01),
        norm_eval=False,
        style="pytorch",
    ),
    pts_neck=dict(in_channels=[168, 408, 912]),
)
test_pipeline = [
    dict(
        type="LoadPointsFromFile",
        coord_type="LIDAR",
        load_dim=5,
        use_dim=5,
        file_client_args=file_client_args,
    ),
    dict(type="LoadPointsFromMultiSweeps", sweeps_num=10, file_client_args=file_client_args),
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
    samples_per_gpu=4,
    val=dict(pipeline=test_pipeline, classes=class_names),
    test=dict(pipeline=test_pipeline, classes=class_names),
)
