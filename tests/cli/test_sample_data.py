"""`mmdet3d-serve sample-data`: a whole data set or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve.cli import sample_data
from serve.cli.main import main


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("kitti", "second_sample.py"),
        ("nuscenes", "nuscenes_sample.py"),
        ("lyft", "lyft_sample.py"),
        ("coco", "fcos_sample.py"),
        ("voc", "voc_sample.py"),
        ("cityscapes", "cityscapes_sample.py"),
    ],
)
def test_a_data_set_is_written_with_a_config_that_names_it(kind, config, tmp_path, capsys):
    folder = tmp_path / "data" / kind
    assert main(["sample-data", kind, str(folder), "--train", "2", "--val", "1"]) == 0
    assert f"config    {folder / config}" in capsys.readouterr().out
    assert list(folder.parent.iterdir()) == [folder]
    from mmengine.config import Config

    loader = Config.fromfile(str(folder / config)).test_dataloader.dataset
    assert Path(loader.data_root) == folder
    assert Path(loader.data_root, loader.ann_file).is_file()


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["sample-data", "coco", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, **_):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(sample_data.KINDS, "coco", replace(sample_data.KINDS["coco"], write=interrupted))
    assert main(["sample-data", "coco", str(tmp_path / "data" / "coco")]) == 130
    assert list((tmp_path / "data").iterdir()) == []
