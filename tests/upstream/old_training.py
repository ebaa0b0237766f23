"""Configs of mmdet 2.x and mmdet3d 0.x with all that training reads, for data of a few frames."""

from __future__ import annotations

from tools.seed_rows.work_folder import _OLD

OLD_2D = (
    _OLD.replace(
        "    test_cfg=dict(\n        rpn",
        """    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True,
                ignore_iof_thr=-1),
            sampler=dict(type='RandomSampler', num=64, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1, pos_weight=-1, debug=False),
        rpn_proposal=dict(nms_pre=500, max_per_img=200, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False,
                ignore_iof_thr=-1),
            sampler=dict(type='RandomSampler', num=64, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
            pos_weight=-1, debug=False)),
    test_cfg=dict(
        rpn""",
    ).replace(
        "data = dict(\n    samples_per_gpu=2, workers_per_gpu=0,\n",
        """train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=[(192, 128), (192, 144)], multiscale_mode='range', keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.5), dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels'])]
data = dict(
    samples_per_gpu=2, workers_per_gpu=0,
    train=dict(
        type='RepeatDataset', times=2, dataset=dict(
            type='CocoDataset', ann_file='coco/annotations/instances_train2017.json', img_prefix='coco/train2017/',
            classes=('circle', 'square', 'triangle'), pipeline=train_pipeline)),
    val=dict(
        type='CocoDataset', ann_file='coco/annotations/instances_val2017.json', img_prefix='coco/val2017/',
        classes=('circle', 'square', 'triangle'), pipeline=test_pipeline),
""",
    )
    + """
evaluation = dict(interval=1, metric='bbox', save_best='bbox_mAP')
optimizer = dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=0.0001)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='step', warmup='linear', warmup_iters=3, warmup_ratio=0.1, step=[1])
runner = dict(type='EpochBasedRunner', max_epochs=1)
checkpoint_config = dict(interval=1, max_keep_ckpts=2)
log_config = dict(interval=1, hooks=[dict(type='TextLoggerHook')])
custom_hooks = [dict(type='NumClassCheckHook')]
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
"""
)

OLD_3D = """
point_cloud_range = [0, -39.68, -3, 69.12, 39.68, 1]
class_names = ['Pedestrian', 'Cyclist', 'Car']
voxel_size = [0.32, 0.32, 4]
_assign = dict(
    type='MaxIoUAssigner', iou_calculator=dict(type='BboxOverlapsNearest3D'), pos_iou_thr=0.5, neg_iou_thr=0.35,
    min_pos_iou=0.35, ignore_iof_thr=-1)
model = dict(
    type='VoxelNet',
    voxel_layer=dict(
        max_num_points=32, point_cloud_range=point_cloud_range, voxel_size=voxel_size, max_voxels=(16000, 40000)),
    voxel_encoder=dict(
        type='PillarFeatureNet', in_channels=4, feat_channels=[16], with_distance=False, voxel_size=voxel_size,
        point_cloud_range=point_cloud_range),
    middle_encoder=dict(type='PointPillarsScatter', in_channels=16, output_shape=[248, 216]),
    backbone=dict(type='SECOND', in_channels=16, layer_nums=[1, 1], layer_strides=[2, 2], out_channels=[16, 32]),
    neck=dict(type='SECONDFPN', in_channels=[16, 32], upsample_strides=[1, 2], out_channels=[16, 16]),
    bbox_head=dict(
        type='Anchor3DHead', num_classes=3, in_channels=32, feat_channels=32, use_direction_classifier=True,
        assign_per_class=True,
        anchor_generator=dict(
            type='AlignedAnchor3DRangeGenerator',
            ranges=[[0, -39.68, -0.6, 69.12, 39.68, -0.6], [0, -39.68, -0.6, 69.12, 39.68, -0.6],
                    [0, -39.68, -1.78, 69.12, 39.68, -1.78]],
            sizes=[[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]], rotations=[0, 1.57], reshape_out=False),
        diff_rad_by_sin=True, bbox_coder=dict(type='DeltaXYZWLHRBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=2.0),
        loss_dir=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.2)),
    train_cfg=dict(assigner=[_assign, _assign, _assign], allowed_border=0, pos_weight=-1, debug=False),
    test_cfg=dict(
        use_rotate_nms=True, nms_across_levels=False, nms_thr=0.01, score_thr=0.1, min_bbox_size=0, nms_pre=100,
        max_num=50))
train_pipeline = [
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=4, use_dim=4),
    dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True),
    dict(type='RandomFlip3D', flip_ratio_bev_horizontal=0.5),
    dict(type='GlobalRotScaleTrans', rot_range=[-0.78539816, 0.78539816], scale_ratio_range=[0.95, 1.05]),
    dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='PointShuffle'),
    dict(type='DefaultFormatBundle3D', class_names=class_names),
    dict(type='Collect3D', keys=['points', 'gt_bboxes_3d', 'gt_labels_3d'])]
test_pipeline = [
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=4, use_dim=4),
    dict(
        type='MultiScaleFlipAug3D', img_scale=(1333, 800), pts_scale_ratio=1, flip=False,
        transforms=[
            dict(
                type='GlobalRotScaleTrans', rot_range=[0, 0], scale_ratio_range=[1., 1.], translation_std=[0, 0, 0]),
            dict(type='RandomFlip3D'),
            dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
            dict(type='DefaultFormatBundle3D', class_names=class_names, with_label=False),
            dict(type='Collect3D', keys=['points'])])]
data = dict(
    samples_per_gpu=2, workers_per_gpu=0,
    train=dict(
        type='RepeatDataset', times=2, dataset=dict(
            type='KittiDataset', data_root='kitti/', ann_file='kitti/kitti_infos_train.pkl', split='training',
            pts_prefix='velodyne_reduced', pipeline=train_pipeline, classes=class_names, test_mode=False,
            modality=dict(use_lidar=True, use_camera=False), box_type_3d='LiDAR')),
    val=dict(
        type='KittiDataset', data_root='kitti/', ann_file='kitti/kitti_infos_val.pkl', split='training',
        pts_prefix='velodyne_reduced', pipeline=test_pipeline, classes=class_names, test_mode=True,
        modality=dict(use_lidar=True, use_camera=False), box_type_3d='LiDAR'),
    test=dict(
        type='KittiDataset', data_root='kitti/', ann_file='kitti/kitti_infos_val.pkl', split='training',
        pts_prefix='velodyne_reduced', pipeline=test_pipeline, classes=class_names, test_mode=True,
        modality=dict(use_lidar=True, use_camera=False), box_type_3d='LiDAR'))
lr = 0.001
optimizer = dict(type='AdamW', lr=lr, betas=(0.95, 0.99), weight_decay=0.01)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='cyclic', target_ratio=(10, 1e-4), cyclic_times=1, step_ratio_up=0.4)
momentum_config = dict(policy='cyclic', target_ratio=(0.85 / 0.95, 1), cyclic_times=1, step_ratio_up=0.4)
runner = dict(type='EpochBasedRunner', max_epochs=2)
evaluation = dict(interval=2, pipeline=test_pipeline)
checkpoint_config = dict(interval=2)
log_config = dict(interval=1, hooks=[dict(type='TextLoggerHook')])
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
"""
