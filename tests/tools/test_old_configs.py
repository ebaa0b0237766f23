"""The command that tries an old release says of every config whether it builds, and why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.zoo.old_configs_command import choose_configs, main

OLD = """
model = dict(type='FCOS', backbone=dict(type='ResNet', depth=18), neck=dict(type='FPN', in_channels=[64, 128, 256, 512],
    out_channels=8, num_outs=5), bbox_head=dict(type='FCOSHead', num_classes=2, in_channels=8, feat_channels=8,
    stacked_convs=1, norm_cfg=None))
data = dict(test=dict(type='CocoDataset', classes=('cat', 'dog'), pipeline=[dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(64, 64), flip=False, transforms=[dict(type='Resize', keep_ratio=True),
    dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1]), dict(type='Collect', keys=['img'])])]))
"""
DETR = OLD.replace("'FCOS'", "'DETR'").replace("stacked_convs=1", "transformer=dict(type='Transformer')")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for name, text in {
        "_base_/runtime.py": "a = 1",
        "detr/detr.py": DETR,
        "fcos/fcos_a.py": OLD,
        "fcos/fcos_b.py": OLD,
        "fcos/fcos_c.py": "raise RuntimeError",
    }.items():
        path = tmp_path / "release" / "package" / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "release"


def test_the_first_configs_of_every_family_are_chosen(release):
    assert [path.stem for path in choose_configs(release, 2)] == ["detr", "fcos_a", "fcos_b"]
    assert [path.stem for path in choose_configs(release / "package" / "configs", 1)] == ["detr", "fcos_a"]


def test_what_is_rejected_is_printed_with_its_reason_and_the_rest_is_counted(release, capsys):
    assert main([str(release), "--each", "3"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 configs built, of 1 of 2 families; 2 rejected, 0 failed" in printed
    rejected = [line for line in printed.splitlines() if line.startswith("rejected")]
    assert len(rejected) == 2 and "mmdet 3 lacks" in rejected[0] and "RuntimeError" in rejected[1]


def test_a_folder_without_configs_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
