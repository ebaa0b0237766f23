"""mmdet3d configuration of the demonstration SECOND: the zoo's building blocks, smaller and coarser.

Self-contained (no ``_base_``): pass it with `second_demo.pth` to mmdet3d's ``init_model``, to the converter
or to ``test_torchserver.py`` like any other configuration. Against
``second_hv_secfpn_8xb6-80e_kitti-3d-3class`` it has voxels of 0.1 x 0.1 x 0.2 m (there 0.05 x 0.05 x 0.1),
three sparse stages instead of four (so the bird's-eye grid has the same 0.4 m cells), a range of 51.2 m and
about a seventh of the weights.

Does not know: real recordings. It was trained on `serve.synthetic.scenes` only; its range is 51.2 m ahead and 32
m to either side.
"""

default_scope = "mmdet3d"

class_names = ["Pedestrian", "Cyclist", "Car"]
metainfo = dict(classes=class_names)
point_cloud_range = [0, -32, -3, 51.2, 32, 1]
voxel_size = [0.1, 0.1, 0.2]

model = dict(
    type="VoxelNet",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        voxel=True,
        voxel_layer=dict(
            max_num_points=5,
            point_cloud_range=point_cloud_range,
            voxel_size=voxel_size,
            max_voxels=(20000, 40000),
        ),
    ),
    voxel_encoder=dict(type="HardSimpleVFE"),
    middle_encoder=dict(
        type="SparseEncoder",
        in_channels=4,
        sparse_shape=[21, 640, 512],
        order=("conv", "norm", "act"),
        base_channels=16,
        output_channels=48,
        encoder_channels=((16,), (32, 32, 32), (48, 48)),
        encoder_paddings=((1,), (1, 1, 1), ((0, 1, 1), 1)),
    ),
    backbone=dict(
        type="SECOND",
        in_channels=96,
        layer_nums=[3, 3],
        layer_strides=[1, 2],
        out_channels=[48, 88],
    ),
    neck=dict(
        type="SECONDFPN",
        in_channels=[48, 88],
        upsample_strides=[1, 2],
        out_channels=[64, 64],
    ),
    bbox_head=dict(
        type="Anchor3DHead",
        num_classes=3,
        in_channels=128,
        feat_channels=128,
        use_direction_classifier=True,
        anchor_generator=dict(
            type="Anchor3DRangeGenerator",
            ranges=[
                [0, -32.0, -1.73, 51.2, 32.0, -1.73],
                [0, -32.0, -1.73, 51.2, 32.0, -1.73],
                [0, -32.0, -1.73, 51.2, 32.0, -1.73],
            ],
            sizes=[[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]],
            rotations=[0, 1.57],
            reshape_out=False,
        ),
        diff_rad_by_sin=True,
        bbox_coder=dict(type="DeltaXYZWLHRBBoxCoder"),
        loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="mmdet.SmoothL1Loss", beta=1.0 / 9.0, loss_weight=2.0),
        loss_dir=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False, loss_weight=0.2),
    ),
    train_cfg=dict(
        assigner=[
            dict(
                type="Max3DIoUAssigner",
                iou_calculator=dict(type="BboxOverlapsNearest3D"),
                pos_iou_thr=0.35,
                neg_iou_thr=0.2,
                min_pos_iou=0.2,
                ignore_iof_thr=-1,
            ),
            dict(
                type="Max3DIoUAssigner",
                iou_calculator=dict(type="BboxOverlapsNearest3D"),
                pos_iou_thr=0.35,
                neg_iou_thr=0.2,
                min_pos_iou=0.2,
                ignore_iof_thr=-1,
            ),
            dict(
                type="Max3DIoUAssigner",
                iou_calculator=dict(type="BboxOverlapsNearest3D"),
                pos_iou_thr=0.6,
                neg_iou_thr=0.45,
                min_pos_iou=0.45,
                ignore_iof_thr=-1,
            ),
        ],
        allowed_border=0,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        use_rotate_nms=True,
        nms_across_levels=False,
        nms_thr=0.01,
        score_thr=0.1,
        min_bbox_size=0,
        nms_pre=300,
        max_num=50,
    ),
)

test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
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
        ],
    ),
    dict(type="Pack3DDetInputs", keys=["points"]),
]

test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="KittiDataset",
        data_root="data/kitti/",
        ann_file="kitti_infos_val.pkl",
        data_prefix=dict(pts="training/velodyne_reduced"),
        pipeline=test_pipeline,
        modality=dict(use_lidar=True, use_camera=False),
        test_mode=True,
        metainfo=metainfo,
        box_type_3d="LiDAR",
    ),
)
