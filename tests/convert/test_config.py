"""Configs as people bring them: lazy, on bases by package, joined data sets, test-time augmentation, missing bases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve import ops
from serve.convert.config import resolve_config
from serve.errors import ArchiveError

ops.install()

PLAIN = """
default_scope = 'mmdet'
model = dict(type='FCOS', data_preprocessor=dict(type='DetDataPreprocessor', mean=[0.], std=[1.]),
    backbone=dict(type='ResNet', depth=18), neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8,
    num_outs=5, start_level=1, add_extra_convs='on_output'),
    bbox_head=dict(type='FCOSHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]
test_dataloader = dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=('cat', 'dog')), pipeline=test_pipeline))
"""
LAZY = """
from mmcv.transforms import LoadImageFromFile
from mmcv.ops import nms
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import PackDetInputs, Resize
from mmdet.models import FCOS, FPN, DetDataPreprocessor, FCOSHead, ResNet
from torch.nn import BatchNorm2d, GroupNorm

default_scope = 'mmdet'
model = dict(type=FCOS, data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=ResNet, depth=18, norm_cfg=dict(type=BatchNorm2d)),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5),
    bbox_head=dict(type=FCOSHead, num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
                   norm_cfg=dict(type=GroupNorm, num_groups=2)),
    test_cfg=dict(nms_pre=10, score_thr=0.1, nms=dict(type=nms, iou_threshold=0.5), max_per_img=10))
test_pipeline = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(64, 64)), dict(type=PackDetInputs)]
test_dataloader = dict(dataset=dict(type=CocoDataset, metainfo=dict(classes=('cat', 'dog')), pipeline=test_pipeline))
"""


def write(folder: Path, text: str, name: str = "config.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def build(config: dict):
    from serve.runtime.model import build_network
    from serve.runtime.registry_guard import restrict_registry

    restrict_registry()
    return build_network(config, ("cat", "dog"))


def test_a_base_in_an_installed_package_is_read(tmp_path):
    path = write(tmp_path, "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n")
    assert resolve_config(path).config["model"]["type"] == "RTMDet"


def test_mmengine_finds_installed_packages_without_pkg_resources():
    code = (
        "import serve.ops; serve.ops.install()\n"
        "from mmengine.utils import get_installed_path, is_installed\n"
        "import sys; assert is_installed('mmdet') and not is_installed('no-such-package')\n"
        "assert get_installed_path('mmcv-lite').endswith('mmcv') and 'pkg_resources' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_lazy_config_builds_the_layers_and_functions_that_it_names(tmp_path):
    from torch import nn

    network = build(resolve_config(write(tmp_path, LAZY)).config)
    kinds = {type(module) for module in network.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d in kinds


def test_a_lazy_config_names_no_other_object_of_torch(tmp_path):
    config = resolve_config(write(tmp_path, LAZY)).config
    for path in (
        "torch.nn.functional.relu",
        "torch.load",
        "torch.hub.load",
        "torch.nn.utils.rnn.PackedSequence",
    ):
        config["model"]["backbone"]["norm_cfg"]["type"] = path
        with pytest.raises(ArchiveError):
            build(config)


@pytest.mark.parametrize(
    "wrapped",
    [
        "dict(type='ConcatDataset', datasets=[one, one])",
        "dict(type='RepeatDataset', times=2, dataset=one)",
        "dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[one]))",
        "dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=one)",
    ],
)
def test_joined_and_wrapped_data_sets_give_their_first_pipeline(tmp_path, wrapped):
    text = f"{PLAIN}\none = test_dataloader['dataset']\ntest_dataloader = dict(dataset={wrapped})\n"
    from serve.convert.classes import configured_classes
    from serve.runtime.pipeline import pipeline_of

    config = resolve_config(write(tmp_path, text)).config
    assert pipeline_of(config)[0]["type"] == "LoadImageFromFile"
    assert configured_classes(config) == ("cat", "dog")


def test_test_time_augmentation_in_the_pipeline_is_left_out_and_noted(tmp_path):
    augmented = (
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=["
        "[dict(type='Resize', scale=(64, 64)), dict(type='Resize', scale=(96, 96))],"
        "[dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)], [dict(type='PackDetInputs')]])]\n"
        "test_dataloader['dataset']['pipeline'] = test_pipeline\n"
    )
    resolved = resolve_config(write(tmp_path, PLAIN + augmented))
    kinds = [step["type"] for step in resolved.config["test_dataloader"]["dataset"]["pipeline"]]
    assert kinds == ["LoadImageFromFile", "Resize", "PackDetInputs"]
    assert any("TestTimeAug" in note for note in resolved.notes)


def test_a_base_of_the_old_layout_is_taken_from_the_zoo(tmp_path):
    text = (
        "_base_ = ['../_base_/models/faster_rcnn_r50_fpn.py', '../_base_/datasets/coco_detection.py']\n"
        "data = dict(test=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug',"
        "img_scale=(64, 64), flip=False, transforms=[dict(type='Resize', keep_ratio=True), dict(type='Normalize',"
        "mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True), dict(type='Collect', keys=['img'])])]))\n"
    )
    resolved = resolve_config(write(tmp_path, text, "configs/faster_rcnn/mine.py"))
    assert resolved.config["model"]["type"] == "FasterRCNN"
    assert resolved.config["model"]["data_preprocessor"]["mean"] == [1, 2, 3]
    assert resolved.config["test_dataloader"]["dataset"]["type"] == "CocoDataset"


def test_a_base_that_is_nowhere_is_refused_by_its_name(tmp_path):
    with pytest.raises(ArchiveError, match=r"no_such_base\.py"):
        resolve_config(write(tmp_path, "_base_ = '../no_such_base.py'\n" + PLAIN))


def test_a_dictionary_replaces_none_in_a_base(tmp_path):
    write(tmp_path, PLAIN.replace("dict(type='LoadImageFromFile')", "dict(type='LoadImageFromFile', backend_args=None)")
          + "backend_args = None\n", "base.py")  # fmt: skip
    path = write(tmp_path, "_base_ = 'base.py'\nbackend_args = dict(backend='local')\n")
    assert resolve_config(path).config["model"]["type"] == "FCOS"


def test_a_network_that_cannot_be_built_is_an_error_of_the_config(tmp_path):
    config = resolve_config(write(tmp_path, PLAIN)).config
    del config["model"]["backbone"]
    with pytest.raises(ArchiveError, match="FCOS"):
        build(config)
