"""What people bring in their first week, as they bring it: archived by the command, with the right value.

Each file stands for public bug reports of the field; the sources are written here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from serve import archive, ops
from serve.cli import archive as archive_command
from serve.cli.entry import run
from serve.compare.detections import compare_answers
from serve.compare.tolerances import tolerances_for
from serve.convert.config import resolve_config
from serve.convert.golden import golden_image
from serve.convert.random_weights import write_random_checkpoint
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.settings import Limits
from serve.verify.reference_loading import load_reference
from serve.verify.report import comparison_table
from tests.convert.test_config import LAZY, PLAIN

ops.install()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BASE = (
    PLAIN
    + """
model['bbox_head']['norm_cfg'] = dict(type='GN', num_groups=2)
model['test_cfg'] = dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50)
"""
)
LAZY_BASE = (
    LAZY.replace("num_outs=5)", "num_outs=5, start_level=1, add_extra_convs='on_output')")
    .replace("nms_pre=10, score_thr=0.1", "nms_pre=100, score_thr=0.05")
    .replace("max_per_img=10", "max_per_img=50")
)
OLD = """
model = dict(type='FCOS', backbone=dict(type='ResNet', depth=18),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5, start_level=1,
        add_extra_convs='on_output'),
    bbox_head=dict(type='FCOSHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
        norm_cfg=dict(type='GN', num_groups=2)),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner')),
    test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(64, 64), flip=False, transforms=[
        dict(type='Resize', keep_ratio=False), dict(type='RandomFlip'),
        dict(type='Normalize', mean=[0.], std=[1.], to_rgb=False), dict(type='Pad', size_divisor=32),
        dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]
data = dict(test=dict(type='CocoDataset', classes=('cat', 'dog'), pipeline=pipeline))
"""
WITHOUT_CLASSES = (
    "metainfo = dict(_delete_=True)\ntest_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True{})))"
)
COCO = tuple(f"name {k}" for k in range(80))


class Case:
    """A folder with a config, its bases and weights, and what the command made of it."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def archive(self, config: str, *options: str, weights: Path | None = None) -> int:
        """Run ``mmdet3d-serve archive`` on a config that may inherit from ``plain.py``."""
        self.write("plain.py", BASE)
        arguments = [str(self.write("config.py", config)), "--checkpoint", str(weights or self.weights)]
        store = ["--model-name", "case", "--output-folder", str(self.folder / "store")]
        return run(archive_command.main, [*arguments, *store, *options])

    def opened(self) -> archive.Archive:
        target = self.folder / "opened"
        return archive.extract(self.folder / "store" / "case.mar", target)

    def save(self, change: Callable[[dict[str, Any]], dict[str, Any]], name: str = "own.pth") -> Path:
        torch.save(change(torch.load(self.weights, weights_only=False)), self.folder / name)
        return self.folder / name


def answer(opened: archive.Archive, path: Path, **settings: Any) -> dict[str, Any]:
    detector = load_detector(opened, torch.device("cpu"), **settings)
    frame = detector.decode(path.read_bytes(), FrameOptions(), Limits())
    (outcome,) = detector.run([frame])
    assert isinstance(outcome, dict), outcome
    return outcome


def assert_equal_to_upstream(case: Case, picture: Path, weights: Path | None = None, **settings: Any) -> None:
    reference = load_reference(case.folder / "config.py", weights or case.weights, "cpu", **settings)
    found = compare_answers(
        reference.detect(picture), answer(case.opened(), picture), tolerances_for(torch.device("cpu"))
    )
    assert found.expected_count > 0 and found.ok, comparison_table(found)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "plain.py").write_text(BASE)
    write_random_checkpoint(resolve_config(folder / "plain.py").config, ("cat", "dog"), folder / "plain.pth")
    return folder / "plain.pth"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    cv2.imwrite(str(path), golden_image(128, 128, seed=3))
    return path


@pytest.fixture
def case(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A case whose folder ``code`` is on this process's module search path; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    before = set(sys.modules)
    yield Case(tmp_path, weights)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_base_of_an_installed_package_is_archived(case):
    config = "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n"
    resolved = resolve_config(case.write("rtmdet.py", config)).config
    write_random_checkpoint(resolved, COCO, case.folder / "rtmdet.pth")
    assert case.archive(config, weights=case.folder / "rtmdet.pth") == 0
    assert case.opened().metadata.classes == COCO


def test_with_all_defaults_rtmdet_is_equal_to_upstream(case, picture):
    config = (
        "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n"
        "model = dict(bbox_head=dict(num_classes=2))\nmetainfo = dict(classes=('cat', 'dog'))\n"
        "test_pipeline = [dict(type='LoadImageFromFile', backend_args=None),\n"
        "    dict(type='Resize', scale=(128, 128), keep_ratio=True),\n"
        "    dict(type='Pad', size=(128, 128), pad_val=dict(img=(114, 114, 114))),\n"
        "    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]\n"
        "test_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=test_pipeline))\n"
    )
    checkpoint = case.folder / "rtmdet.pth"
    write_random_checkpoint(resolve_config(case.write("r.py", config)).config, ("cat", "dog"), checkpoint)
    assert case.archive(config, weights=checkpoint) == 0
    assert case.opened().metadata.inference.fold_batch_norm  # the default, and the reason for differences
    assert_equal_to_upstream(case, picture, checkpoint)


@pytest.mark.parametrize("dumped", [False, True], ids=["source", "dumped"])
def test_a_lazy_config_is_equal_to_upstream(case, picture, dumped):
    from mmengine.config import Config

    config = LAZY_BASE
    if dumped:
        Config.fromfile(str(case.write("lazy.py", LAZY_BASE))).dump(str(case.folder / "dumped.py"))
        config = (case.folder / "dumped.py").read_text()
    assert case.archive(config) == 0
    assert_equal_to_upstream(case, picture)


OWN_NET = """
import json
from pathlib import Path
from mmdet.models import ResNet
from . import numbers

AT_IMPORT = json.loads(Path(__file__).with_name('settings.json').read_text())

class OwnResNet(ResNet):
    def __init__(self, change=None, **settings):
        super().__init__(**settings)
        self.change = change

    def forward(self, x):
        table = (Path(__file__).parent / 'tables' / 'scale.txt').read_text()
        return super().forward(self.change(x) * AT_IMPORT['scale'] * float(table) * numbers.ONE)

def halve(x):
    return x * 0.5
"""


def write_own_package(case: Case, name: str, *, registered: bool) -> None:
    source = OWN_NET
    if registered:
        head, _, tail = source.partition("class OwnResNet")
        source = f"{head}from mmdet.registry import MODELS\n\n@MODELS.register_module()\nclass OwnResNet{tail}".replace(
            "OwnResNet", f"OwnResNet_{name}"
        ).replace("self.change(x)", "x")
    for place, text in {
        "__init__.py": "from .nets import *\n",
        "nets/__init__.py": source,
        "nets/numbers.py": "ONE = 2.0\n",
        "nets/settings.json": '{"scale": 0.5}',
        "nets/tables/scale.txt": "1.0",
    }.items():
        case.write(f"code/{name}/{place}", text)


def test_a_lazy_config_with_own_classes_and_functions_packs_them_and_is_equal_to_upstream(
    case, picture, monkeypatch
):
    write_own_package(case, "own_lazy", registered=False)
    config = LAZY_BASE.replace(
        "default_scope", "from own_lazy.nets import OwnResNet, halve\ndefault_scope", 1
    )
    config = config.replace("type=ResNet,", "type=OwnResNet, change=halve,")
    assert case.archive(config) == 0
    opened = case.opened()
    assert opened.code is not None and (opened.code / "own_lazy/nets/tables/scale.txt").is_file()
    reference = load_reference(case.folder / "config.py", case.weights, "cpu")
    served = answer(opened, picture, trust_code=True)
    assert compare_answers(reference.detect(picture), served, tolerances_for(torch.device("cpu"))).ok
    assert case.archive(BASE, "--force") == 0
    other = archive.extract(case.folder / "store" / "case.mar", case.folder / "other")
    assert not np.array_equal(answer(other, picture)["scores"], served["scores"])  # halve matters


def test_a_custom_module_with_relative_imports_and_data_files_is_proved_without_its_folder(case, capsys):
    write_own_package(case, "own_text", registered=True)
    config = (
        "_base_ = 'plain.py'\ncustom_imports = dict(imports=['own_text'], allow_failed_imports=False)\n"
        "model = dict(backbone=dict(type='OwnResNet_own_text'))\n"
    )
    assert case.archive(config) == 0
    printed = capsys.readouterr().out
    assert "proved" in printed and "MMDET3D_SERVE_TRUST_ARCHIVE_CODE=1" in printed
    assert {"code/own_text/nets/settings.json", "code/own_text/nets/tables/scale.txt"} <= set(
        case.opened().metadata.files
    )


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (", CLASSES=('cat', 'dog')", ()),
        (", classes='{{ fileDirname }}/names.txt'", ()),
        (", classes={0: 'cat', 1: 'dog'}", ()),
        ("", ("--classes", "cat,dog")),
        ("", ("--classes", "names.txt")),
    ],
    ids=["capitals", "file", "dictionary", "option", "option-file"],
)
def test_class_names_are_upstreams_when_the_checkpoint_has_none(case, monkeypatch, classes, options):
    case.write("names.txt", "cat\ndog\n")
    monkeypatch.chdir(case.folder)
    bare = case.save(lambda checkpoint: checkpoint["state_dict"])
    config = f"_base_ = 'plain.py'\n{WITHOUT_CLASSES.format(classes)}\n"
    assert case.archive(config, *options, weights=bare) == 0
    assert case.opened().metadata.classes == ("cat", "dog")


def test_class_names_are_upstreams_when_the_checkpoint_has_both_spellings(case):
    from mmdet.datasets import CocoDataset

    recorded = CocoDataset._load_metainfo({"CLASSES": ("cat", "dog")})  # as mmengine's Runner does
    checkpoint = case.save(lambda good: {**good, "meta": {"dataset_meta": recorded}})
    assert case.archive("_base_ = 'plain.py'\n", weights=checkpoint) == 0
    assert case.opened().metadata.classes == ("cat", "dog")


def test_a_number_of_names_that_is_not_the_heads_is_refused_before_any_work(case, capsys):
    bare = case.save(lambda checkpoint: checkpoint["state_dict"])
    assert case.archive(f"_base_ = 'plain.py'\n{WITHOUT_CLASSES.format('')}\n", weights=bare) == 2
    printed = capsys.readouterr().err
    assert "2 classes" in printed and "80" in printed and "--classes" in printed
    assert "building the network" not in printed


@pytest.mark.parametrize(
    "dataset",
    [
        "dict(type='ConcatDataset', datasets=[one, one])",
        "dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', ann_file='b.json'), one])",
        "dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[one]))",
        "dict(type='MultiImageMixDataset', dataset=dict(one, pipeline=steps[:1]), pipeline=steps[1:])",
    ],
    ids=["joined", "first-without-pipeline", "nested", "mixing"],
)
def test_a_wrapped_data_set_is_equal_to_upstream(case, picture, dataset):
    config = (
        "_base_ = 'plain.py'\nsteps = {{_base_.test_pipeline}}\n"
        "one = dict(type='CocoDataset', metainfo=dict(classes=('cat', 'dog')), ann_file='a.json', pipeline=steps)\n"
    )
    if "steps[" in dataset:  # a variable of a base is a placeholder while the config runs
        config = config.replace(
            "{{_base_.test_pipeline}}",
            "[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs', "
            "meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]",
        )
    assert case.archive(f"{config}test_dataloader = dict(dataset={dataset[:-1]}, _delete_=True))\n") == 0
    assert case.opened().metadata.classes == ("cat", "dog")
    assert_equal_to_upstream(case, picture)


def test_a_checkpoint_with_other_objects_is_refused_by_their_names_and_taken_when_trusted(
    case, picture, capsys
):
    checkpoint = case.save(
        lambda good: {**good, "meta": {**good["meta"], "hook_msgs": {"rng": np.random.RandomState(0)}}}
    )
    assert case.archive("_base_ = 'plain.py'\n", weights=checkpoint) == 2
    assert "numpy.random" in (printed := capsys.readouterr().err) and "--trust-checkpoint" in printed
    assert case.archive("_base_ = 'plain.py'\n", "--trust-checkpoint", weights=checkpoint) == 0
    assert_equal_to_upstream(case, picture, checkpoint, trust_checkpoint=True)


def test_a_2x_config_is_converted_and_equal_to_todays(case, picture, capsys):
    """mmdet 2.x normalised and padded in the pipeline; the same numbers come from today's data preprocessor."""
    assert case.archive(OLD) == 0
    assert "mmdet 2.x" in capsys.readouterr().out
    converted = answer(case.opened(), picture)
    assert case.archive("_base_ = 'plain.py'\n", "--force") == 0
    today = answer(archive.extract(case.folder / "store" / "case.mar", case.folder / "today"), picture)
    assert converted["names"] and compare_answers(today, converted, tolerances_for(torch.device("cpu"))).ok


@pytest.mark.parametrize(
    "config",
    [
        "model = dict(type='FCOS')\ndata = dict(test=dict(type='CocoDataset', classes=('cat', 'dog'),"
        "pipeline=[dict(type='LoadImageFromFile')]))\n",
        "_base_ = 'plain.py'\nmodel = dict(backbone=dict(type='NoSuchNet'))\n",
        "_base_ = 'plain.py'\nmodel = dict(backbone=dict(depth='deep'))\n",
        "_base_ = 'plain.py'\ntest_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='NoSuchStep'), dict(type='PackDetInputs')]))\n",
        "_base_ = 'plain.py'\ntest_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Resize', size=3), dict(type='PackDetInputs')]))\n",
        "_base_ = 'plain.py'\ntest_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Normalize', mean=3, std='x')]))\n",
    ],
    ids=["2x-without-model", "backbone", "depth", "step", "argument", "fails-on-the-frame"],
)
def test_what_cannot_be_archived_ends_in_one_line_and_no_traceback(case, config, capsys, caplog):
    assert case.archive(config) == 2
    printed = capsys.readouterr()
    assert "error: " in printed.err and "Traceback" not in printed.err + printed.out
    assert not [record for record in caplog.records if record.exc_info]
    assert not list((case.folder / "store").glob("*"))
