"""Networks that upstream cannot build or run, patched in the network or in its config."""

from __future__ import annotations

import torch
from mmengine.config import Config
from torch import nn

from serve import ops
from serve.runtime import patches
from serve.runtime.model import build_network
from serve.runtime.predictions import postprocess

ops.install()

SSD = {
    "default_scope": "mmdet",
    "model": {
        "type": "SingleStageDetector",
        "backbone": {"type": "ResNet", "depth": 18, "norm_cfg": {"type": "MMSyncBN", "requires_grad": True}},
        "bbox_head": {
            "type": "SSDHead",
            "num_classes": 2,
            "in_channels": (64, 128, 256, 512),
            "anchor_generator": {
                "type": "SSDAnchorGenerator",
                "scale_major": False,
                "input_size": 128,
                "min_sizes": [8, 16, 32, 64],
                "max_sizes": [16, 32, 64, 128],
                "strides": [4, 8, 16, 32],
                "ratios": [[2], [2], [2], [2]],
            },
            "bbox_coder": {
                "type": "DeltaXYWHBBoxCoder",
                "target_means": [0.0] * 4,
                "target_stds": [0.1, 0.1, 0.2, 0.2],
            },
        },
        "test_cfg": {
            "nms_pre": 100,
            "nms": {"type": "nms", "iou_threshold": 0.45},
            "min_bbox_size": 0,
            "score_thr": 0.02,
            "max_per_img": 20,
        },
    },
}


def test_mm_sync_bn_is_built_without_a_process_group():
    network = build_network(SSD, ("a", "b"))
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 20
    assert not any("Sync" in type(norm).__name__ for norm in norms)


def test_network_config_still_names_mm_sync_bn():
    network = build_network(SSD, ("a", "b"))
    assert network.cfg.model.backbone.norm_cfg.type == "MMSyncBN"
    assert SSD["model"]["backbone"]["norm_cfg"]["type"] == "MMSyncBN"


def test_ssd_head_predicts_without_a_loss():
    network = build_network(SSD, ("a", "b"))
    features = network.extract_feat(torch.rand(1, 3, 128, 128))
    metas = [{"img_shape": (128, 128), "scale_factor": (1.0, 1.0)}]
    with torch.no_grad():
        (found,) = network.bbox_head.predict_by_feat(*network.bbox_head(features), batch_img_metas=metas)
    assert len(found.scores) > 0
    assert not patches.add_missing_loss(network), "it was patched before"


def test_roi_align_runs_without_torchvision():
    from mmcv.ops import RoIAlign

    regions = torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]])
    maps = torch.rand(1, 2, 8, 8)
    wanted = RoIAlign((2, 2), 1.0, 0)(maps, regions)
    network = nn.Sequential(RoIAlign((2, 2), 1.0, 0, use_torchvision=True))
    assert patches.disable_torchvision_align(network)
    assert torch.equal(network[0](maps, regions), wanted)
    assert not patches.disable_torchvision_align(network), "it was patched before"


def test_float_labels_of_upstream_become_integers():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    found = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, 4.0, 4.0]]), scores=torch.tensor([0.5]), labels=torch.zeros(1)
    )
    answer = postprocess(
        DetDataSample(pred_instances=found), ("person",), None, {"name": "m", "version": "1"}
    )
    assert answer["labels"].tolist() == [0] and answer["labels"].dtype.kind == "i"
    assert answer["names"] == ["person"]


def test_teacher_of_a_training_wrapper_is_built():
    """mmdet's own `init_detector` fails for such a config: it has no backbone, and its class no ``train_cfg``."""
    detector = {**SSD["model"], "train_cfg": None}
    wrapper = {
        "default_scope": "mmdet",
        "model": {
            "type": "SemiBaseDetector",
            "detector": detector,
            "semi_train_cfg": {"freeze_teacher": True},
            "semi_test_cfg": {"predict_on": "teacher"},
        },
    }
    network = build_network(wrapper, ("a", "b"))
    assert type(network).__name__ == "SemiBaseDetector"
    assert not any(parameter.requires_grad for parameter in network.teacher.parameters())


def test_config_without_mm_sync_bn_is_unchanged():
    config = Config({"model": {"neck": [{"norm_cfg": {"type": "GN"}}, 3]}})
    assert patches.use_torch_sync_bn(config).model.neck[0].norm_cfg.type == "GN"
