"""Configs as people bring them: lazy, on bases by package, joined data sets, test-time augmentation, missing bases."""

from __future__ import annotations

import gc
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


@pytest.mark.parametrize("kind", ["DetTTAModel", "mmdet.DetTTAModel", "mmdet.models.DetTTAModel"])
def test_a_model_wrapped_for_test_time_augmentation_is_unwrapped_and_noted(tmp_path, kind):
    wrapped = f"{PLAIN}model = dict(type='{kind}', module=model, tta_cfg=dict(max_per_img=10))\n"
    resolved = resolve_config(write(tmp_path, wrapped))
    assert resolved.config["model"] == resolve_config(write(tmp_path, PLAIN, "plain.py")).config["model"]
    assert any("DetTTAModel" in note for note in resolved.notes)


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


@pytest.mark.parametrize("name", ["mmfoo::a/b.py", "mm.det::a/b.py", "::a/b.py"])
def test_a_base_of_an_unknown_package_is_refused_by_its_name(tmp_path, name):
    write(tmp_path, f"_base_ = ['{name}']\n" + PLAIN, "between.py")
    with pytest.raises(ArchiveError, match=f"between.py has the base {name}, but"):
        resolve_config(write(tmp_path, "_base_ = 'between.py'\n"))


@pytest.mark.parametrize(
    "files",
    [
        {"config.py": "_base_ = 'config.py'\n"},
        {
            "config.py": "_base_ = ['base.py', 'other.py']\n",
            "base.py": PLAIN,
            "other.py": "_base_ = './config.py'\n",
        },
        {"config.py": "_base_ = 'a.py'\n", "a.py": "_base_ = 'b.py'\n", "b.py": "_base_ = ['a.py']\n"},
        {
            "config.py": "from mmengine.config import read_base\nwith read_base():\n    from .config import *\n"
        },
        {"config.json": '{"_base_": "config.json"}'},
        {"config.yaml": "_base_: [./base.yml]\n", "base.yml": "_base_: config.yaml\n"},
    ],
)
def test_a_config_that_is_its_own_base_is_refused_in_one_sentence(tmp_path, files):
    folder = tmp_path / "below"
    folder.mkdir()
    first, *_ = [write(folder, text, name) for name, text in files.items()]
    with pytest.raises(ArchiveError, match=r"is its own base") as caught:
        resolve_config(first)
    assert "\n" not in str(caught.value)


# mmengine leaves its copies of the files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_config_that_computes_itself_as_its_base_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ArchiveError, match="is its own base"):
        resolve_config(write(tmp_path / "below", "_base_ = '../below/' + 'config.py'\n"))
    gc.collect()


def test_two_configs_may_share_a_base(tmp_path):
    write(tmp_path, PLAIN, "shared.py")
    write(tmp_path, "_base_ = 'shared.py'\n", "one.py")
    write(tmp_path, "_base_ = ['one.py']\nother = {{_base_.default_scope}}\n", "two.py")
    write(tmp_path, "_base_ = ['./two.py']\n", "config.py")
    assert resolve_config(tmp_path / "config.py").config["model"]["type"] == "FCOS"


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


@pytest.mark.parametrize(
    "lines",
    ["import os", "import os.path as osp", "from pathlib import Path", "from functools import partial"],
)
def test_a_config_on_a_base_may_import_the_standard_library(tmp_path, lines):
    write(tmp_path, PLAIN, "base.py")
    path = write(tmp_path, f"{lines}\n_base_ = 'base.py'\n")
    assert resolve_config(path).config["model"]["type"] == "FCOS"


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_config_dumped_as_data_is_found_and_read(tmp_path, suffix):
    from mmengine.config import Config

    from serve import zoo

    dumped = tmp_path / f"config.{suffix}"
    Config.fromfile(str(write(tmp_path, PLAIN))).dump(str(dumped))
    assert resolve_config(zoo.resolve(dumped).config_path).config["model"]["type"] == "FCOS"


def test_a_dumped_lazy_config_is_the_same_as_its_source(tmp_path):
    from mmengine.config import Config

    path = write(tmp_path, LAZY)
    Config.fromfile(str(path)).dump(str(tmp_path / "dumped.py"))
    assert resolve_config(tmp_path / "dumped.py").config["model"] == resolve_config(path).config["model"]


def test_a_lazy_config_inherits_from_another(tmp_path):
    write(tmp_path, LAZY, "lazy_base.py")
    child = (
        "from mmengine.config import read_base\nwith read_base():\n    from .lazy_base import *\n"
        "from torch.nn import LeakyReLU\nmodel['neck']['act_cfg'] = dict(type=LeakyReLU)\n"
    )
    config = resolve_config(write(tmp_path, child)).config
    assert config["model"]["neck"]["act_cfg"] == {"type": "torch.nn.LeakyReLU"}
    build(config)


OWN_VALUES = """
from mmdet.models import ResNet
from mmdet.registry import MODELS

DEPTH = 18

def halve(x):
    return x * 0.5

@MODELS.register_module(force=True)
class ResNetWithValues(ResNet):
    def __init__(self, layer=None, before=None, **settings):
        super().__init__(**settings)
        self.layer, self.before = layer(), before
"""


@pytest.mark.parametrize("style", ["lazy", "text"])
def test_classes_functions_and_constants_as_values_reach_the_constructor(tmp_path, monkeypatch, style):
    from torch import nn

    name = f"own_values_{style}"
    write(tmp_path, OWN_VALUES, f"{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    values = f"from {name} import DEPTH, ResNetWithValues, halve\nfrom torch import nn\n"
    backbone = "type=ResNetWithValues, depth=DEPTH, layer=nn.GELU, before=halve"
    if style == "lazy":
        text = values + LAZY.replace("type=ResNet, depth=18", backbone)
    else:
        write(tmp_path, PLAIN, "base.py")
        text = f"_base_ = 'base.py'\n{values}model = dict(backbone=dict({backbone}), bbox_head=dict(norm_cfg=None))\n"
    network = build(resolve_config(write(tmp_path, text)).config)
    assert isinstance(network.backbone.layer, nn.GELU) and network.backbone.before(3) == 1.5
    assert network.backbone.depth == 18


@pytest.mark.parametrize(
    "value",
    ["lambda x: x", "functools.partial(int, base=2)", "Options()", "open", "torch.nn.functional.relu"],
)
def test_a_value_that_is_no_data_is_refused_by_its_place(tmp_path, value):
    write(tmp_path, PLAIN, "base.py")
    text = (
        "_base_ = 'base.py'\nimport functools\nimport torch\nfrom dataclasses import dataclass\n"
        f"@dataclass\nclass Options:\n    x: int = 1\nmodel = dict(backbone=dict(deep_stem={value}))\n"
    )
    with pytest.raises(ArchiveError, match=r"backbone\.deep_stem|functional\.relu|io\.open"):
        build(resolve_config(write(tmp_path, text)).config)


def test_objects_that_only_training_and_loading_need_are_left_out(tmp_path):
    write(tmp_path, PLAIN, "base.py")
    text = (
        "_base_ = 'base.py'\nfrom pathlib import Path\nfrom functools import partial\n"
        "test_dataloader = dict(collate_fn=partial(dict), dataset=dict(data_root=Path('/data'), token=b'x'))\n"
    )
    dataset = resolve_config(write(tmp_path, text)).config["test_dataloader"]["dataset"]
    assert dataset["data_root"] == "/data" and "token" not in dataset


def test_steps_of_a_wrapper_follow_those_of_the_data_set(tmp_path):
    text = (
        f"{PLAIN}\none = dict(test_dataloader['dataset'], pipeline=test_pipeline[:1])\n"
        "test_dataloader = dict(dataset=dict(type='MultiImageMixDataset', dataset=one, pipeline=test_pipeline[1:]))\n"
    )
    resolved = resolve_config(write(tmp_path, text))
    kinds = [step["type"] for step in resolved.config["test_dataloader"]["dataset"]["pipeline"]]
    assert kinds == ["LoadImageFromFile", "Resize", "PackDetInputs"]
    assert any("MultiImageMixDataset" in note for note in resolved.notes)


def test_a_wrapper_that_mixes_images_is_refused_by_its_step(tmp_path):
    text = (
        f"{PLAIN}\none = test_dataloader['dataset']\n"
        "mixed = dict(type='MultiImageMixDataset', dataset=one, pipeline=[dict(type='Mosaic')])\n"
        "test_dataloader = dict(dataset=mixed)\n"
    )
    with pytest.raises(ArchiveError, match="Mosaic"):
        resolve_config(write(tmp_path, text))


def test_a_call_of_an_import_in_a_lazy_config_is_refused_by_its_line(tmp_path):
    text = "import numpy\n" + PLAIN + "other = dict(a=1,\n    mean=numpy.zeros(3).tolist())\n"
    with pytest.raises(ArchiveError, match=r"line 1\d calls what the config imports"):
        resolve_config(write(tmp_path, text))
    assert resolve_config(write(tmp_path, "_base_ = []\n" + text)).config["model"]["type"] == "FCOS"


def test_a_step_that_mixes_images_is_refused_in_a_plain_pipeline_too(tmp_path):
    text = PLAIN.replace("dict(type='Resize'", "dict(type='Mosaic'), dict(type='Resize'")
    with pytest.raises(ArchiveError, match="Mosaic, which mixes several images"):
        resolve_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("step", "named"),
    [
        ("dict(type='RandomCrop', crop_size=(8, 8))", "RandomCrop"),
        ("dict(type='mmdet.PhotoMetricDistortion')", "PhotoMetricDistortion"),
        ("dict(type='RandomFlip', prob=0.5)", "RandomFlip"),
        ("dict(type='RandomFlip', prob=[0.2, 0.3], direction=['horizontal', 'vertical'])", "RandomFlip"),
        ("dict(type='RandomFlip')", ""),
        ("dict(type='RandomFlip', prob=0.0)", ""),
        ("dict(type='RandomCenterCropPad', test_mode=True, test_pad_mode=['logical_or', 31])", ""),
    ],
)
def test_a_step_that_alters_frames_at_random_is_noted(tmp_path, step, named):
    text = PLAIN.replace("dict(type='Resize'", f"{step}, dict(type='Resize'")
    notes = [note for note in resolve_config(write(tmp_path, text)).notes if "at random" in note]
    assert bool(notes) == bool(named) and all(named in note for note in notes)


def test_no_3d_model_of_the_zoo_is_noted_as_random(tmp_path):
    from serve import zoo

    for name in ("second", "centerpoint", "votenet", "mvxnet"):
        assert not [n for n in resolve_config(zoo.resolve(name).config_path).notes if "at random" in n]


def test_a_byte_order_mark_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ArchiveError, match="byte order mark"):
        resolve_config(write(tmp_path, "\ufeff" + PLAIN))


def test_a_config_without_scope_is_of_the_package_of_its_model(tmp_path):
    from mmengine.config import Config

    from serve import zoo

    config = Config.fromfile(zoo.resolve("second").config_path)
    config.pop("default_scope")
    config.dump(str(tmp_path / "config.py"))
    assert resolve_config(tmp_path / "config.py").package == "mmdet3d"
    assert (
        resolve_config(write(tmp_path, PLAIN.replace("default_scope = 'mmdet'", ""), "b.py")).package
        == "mmdet"
    )


DATASET = "test_dataloader['dataset']"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a = 1",
        "model = None",
        "model = [1]",
        "model = dict(\n",
        "raise RuntimeError('of mine')",
        "import sys; sys.exit(3)",
        "import no_such_module_of_mine",
        "_base_ = 'config.py'",
        "_base_ = 3",
        "_base_ = [None]",
        "_base_ = {'a': 1}",
        "caf\xe9 = 1 \0",
        f"{PLAIN}\ntest_dataloader = [1]",
        f"{PLAIN}\ntest_dataloader = dict(dataset='x')",
        f"{PLAIN}\n{DATASET}['pipeline'] = None",
        f"{PLAIN}\n{DATASET}['pipeline'] = 'text'",
        f"{PLAIN}\n{DATASET}['pipeline'] = ['LoadImageFromFile']",
        f"{PLAIN}\n{DATASET}['pipeline'] = [dict(scale=1)]",
        f"{PLAIN}\n{DATASET}['pipeline'] = [dict(type=3)]",
        f"{PLAIN}\ncustom_imports = 'json'",
        f"{PLAIN}\ncustom_imports = ['json']",
        f"{PLAIN}\ncustom_imports = dict(imports=[3])",
        f"{PLAIN}\ncustom_imports = dict(imports=['.near'])",
        f"{PLAIN}\ncustom_imports = dict(imports=['no_such_module_of_mine'])",
        f"{PLAIN}\ndefault_scope = 'mmseg'",
        "model = dict(type='FCOS')\ndata = dict(test=3)",
        "model = dict(type='FCOS')\ndata = dict(test=[])",
        "model = dict(type='FCOS')\ndata = dict(test=dict(pipeline=[3]))",
        "model = dict(type='FCOS')\ndata = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', transforms=3)]))",
        "model = dict(type='FCOS', voxel_layer=3)",
    ],
)
def test_a_config_that_cannot_be_used_is_an_archive_error_about_it(tmp_path, text):
    with pytest.raises(ArchiveError):
        resolve_config(write(tmp_path, text))


LAZY_VOTENET = """
from mmdet.models.losses import CrossEntropyLoss, SmoothL1Loss
from mmdet3d.datasets import ScanNetDataset
from mmdet3d.datasets.transforms import LoadPointsFromFile, Pack3DDetInputs, PointSample
from mmdet3d.models.backbones import PointNet2SASSG
from mmdet3d.models.data_preprocessors import Det3DDataPreprocessor
from mmdet3d.models.dense_heads import VoteHead
from mmdet3d.models.detectors import VoteNet
from mmdet3d.models.layers.pointnet_modules import PointSAModule
from mmdet3d.models.losses import ChamferDistance
from mmdet3d.models.task_modules.coders import PartialBinBasedBBoxCoder
from torch.nn import BatchNorm1d, BatchNorm2d, Conv1d

default_scope = None
classes = ('chair', 'table')
vote = dict(type=ChamferDistance, mode='l1', reduction='none', loss_dst_weight=10.0)
named = dict(type=CrossEntropyLoss, reduction='sum')
model = dict(type=VoteNet, data_preprocessor=dict(type=Det3DDataPreprocessor),
    backbone=dict(type=PointNet2SASSG, in_channels=4, num_points=(64, 32, 16, 8), radius=(0.2, 0.4, 0.8, 1.2),
        num_samples=(8, 8, 8, 8), sa_channels=((8, 8, 16), (16, 16, 32), (16, 16, 32), (16, 16, 32)),
        fp_channels=((32, 32), (32, 32)), norm_cfg=dict(type=BatchNorm2d),
        sa_cfg=dict(type=PointSAModule, pool_mod='max', use_xyz=True, normalize_xyz=True)),
    bbox_head=dict(type=VoteHead, num_classes=2,
        bbox_coder=dict(type=PartialBinBasedBBoxCoder, num_sizes=2, num_dir_bins=1, with_rot=False,
            mean_sizes=[[0.7, 0.7, 0.9], [1.2, 0.8, 0.7]]),
        vote_module_cfg=dict(in_channels=32, vote_per_seed=1, gt_per_seed=3, conv_channels=(32, 32),
            conv_cfg=dict(type=Conv1d), norm_cfg=dict(type=BatchNorm1d), norm_feats=True, vote_loss=vote),
        vote_aggregation_cfg=dict(type=PointSAModule, num_point=8, radius=0.3, num_sample=8,
            mlp_channels=[32, 16, 16, 16], use_xyz=True, normalize_xyz=True),
        pred_layer_cfg=dict(in_channels=16, shared_conv_channels=(16, 16), bias=True),
        objectness_loss=named, center_loss=vote, dir_class_loss=named,
        dir_res_loss=dict(type=SmoothL1Loss, reduction='sum'), size_class_loss=named,
        size_res_loss=dict(type=SmoothL1Loss, reduction='sum'), semantic_loss=named),
    test_cfg=dict(sample_mode='seed', nms_thr=0.25, score_thr=0.05, per_class_proposal=True))
test_pipeline = [
    dict(type=LoadPointsFromFile, coord_type='DEPTH', shift_height=True, load_dim=6, use_dim=[0, 1, 2]),
    dict(type=PointSample, num_points=128), dict(type=Pack3DDetInputs, keys=['points'])]
test_dataloader = dict(dataset=dict(type=ScanNetDataset, metainfo=dict(classes=classes), box_type_3d='Depth',
    pipeline=test_pipeline))
"""


def test_a_lazy_votenet_builds_the_set_abstractions_that_it_names(tmp_path):
    resolved = resolve_config(write(tmp_path, LAZY_VOTENET))
    assert resolved.package == "mmdet3d"
    network = build(resolved.config)
    kinds = {type(module).__name__ for module in network.modules()}
    assert {"PointSAModule", "VoteModule", "BatchNorm1d", "Conv1d"} <= kinds
