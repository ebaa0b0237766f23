"""Configs of mmdet 2.x and mmdet3d 0.x with the data set and metric of their test split."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import ArchiveError
from serve.upstream.config_argument import config_file
from serve.upstream.legacy_data import is_legacy_file, modernize_whole
from tools.seed_rows.checks import _CONFIG_3D
from tools.seed_rows.work_folder import _OLD


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "old.py"
    path.write_text(_OLD)
    return path


@pytest.mark.slow
def test_a_config_of_2x_keeps_its_test_data_and_gets_cocos_metric(old):
    today, notes = modernize_whole(old)
    dataset = today["test_dataloader"]["dataset"]
    assert dataset["ann_file"] == "coco/annotations/instances_val2017.json"
    assert dataset["data_prefix"] == {"img": "coco/val2017/"}
    assert today["test_evaluator"] == {
        "type": "CocoMetric",
        "metric": "bbox",
        "ann_file": "coco/annotations/instances_val2017.json",
    }
    assert today["default_scope"] == "mmdet"
    assert notes[0].startswith("the config is of mmdet 2.x")
    assert not {"data", "evaluation"} & set(today)


@pytest.mark.slow
def test_a_config_of_0x_keeps_its_folders_below_the_root(tmp_path):
    path = tmp_path / "old3d.py"
    path.write_text(_CONFIG_3D)
    today, _ = modernize_whole(path)
    dataset = today["test_dataloader"]["dataset"]
    assert dataset["data_prefix"] == {"pts": "training/velodyne_reduced"}
    assert (dataset["data_root"], dataset["ann_file"]) == ("kitti/", "kitti_infos_val.pkl")
    assert today["test_evaluator"]["type"] == "KittiMetric"
    assert today["test_evaluator"]["ann_file"] == "kitti/kitti_infos_val.pkl"
    assert today["default_scope"] == "mmdet3d"


@pytest.mark.slow
def test_the_converted_file_has_the_name_of_the_config_and_goes_with_the_block(old):
    from mmengine.config import Config

    with config_file(str(old)) as file:
        assert Path(file).name == "old.py"
        assert Config.fromfile(file).test_dataloader.dataset.type == "CocoDataset"
    assert not Path(file).exists()


def test_the_training_of_an_old_config_without_training_data_is_refused(old):
    with pytest.raises(ArchiveError, match=r"data\.train"), config_file(str(old), training=True):
        pass


def test_configs_of_today_are_no_legacy(tmp_path):
    path = tmp_path / "today.py"
    path.write_text("_base_ = []\ndata_root = 'x'\nmodel = dict(type='A')\n")
    assert not is_legacy_file(path)
    (tmp_path / "child.py").write_text("_base_ = 'old.py'\n")
    (tmp_path / "old.py").write_text(_OLD)
    assert is_legacy_file(tmp_path / "child.py")
