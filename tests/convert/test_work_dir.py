"""The config and checkpoint that a training left are found, and what is ambiguous or missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.convert.work_dir import is_work_dir, trained_checkpoint, trained_config
from serve.errors import CheckpointError, ModelLookupError


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "which", "found"),
    [
        (["epoch_2.pth", "epoch_10.pth"], None, "epoch_10.pth"),  # by number, not by letters
        (["iter_90.pth", "iter_200.pth"], "last", "iter_200.pth"),
        (["epoch_3.pth", "best_coco_bbox_mAP_epoch_2.pth"], None, "best_coco_bbox_mAP_epoch_2.pth"),
        (["epoch_3.pth", "best_coco_bbox_mAP_epoch_2.pth"], "last", "epoch_3.pth"),
        (["epoch_3.pth", "best_coco_bbox_mAP_epoch_2.pth"], "best", "best_coco_bbox_mAP_epoch_2.pth"),
    ],
)
def test_the_best_or_else_the_last_checkpoint_is_taken(names, which, found, tmp_path):
    path, _ = trained_checkpoint(files(tmp_path, *names), which)
    assert path == tmp_path / found


def test_the_pointer_to_the_last_checkpoint_counts_wherever_the_folder_was_trained(tmp_path):
    files(tmp_path, "epoch_1.pth", "epoch_9.pth")  # the ninth is of an earlier training
    (tmp_path / "last_checkpoint").write_text("/home/other/machine/epoch_1.pth")
    assert trained_checkpoint(tmp_path)[0].name == "epoch_1.pth"
    (tmp_path / "epoch_1.pth").unlink()
    assert trained_checkpoint(tmp_path)[0].name == "epoch_9.pth"


def test_the_config_is_the_one_that_the_training_wrote(tmp_path):
    assert trained_config(files(tmp_path, "mine.py", "epoch_1.pth")) == tmp_path / "mine.py"
    assert is_work_dir(tmp_path)


@pytest.mark.parametrize(
    ("names", "which", "named"),
    [
        ([], None, "no checkpoint"),
        (["epoch_1.pth"], "best", "save_best"),
        (["best_coco_bbox_mAP_epoch_2.pth", "best_coco_segm_mAP_epoch_1.pth"], None, "best_coco_segm_mAP"),
    ],
)
def test_no_checkpoint_or_several_best_ones_are_an_error(names, which, named, tmp_path):
    with pytest.raises(CheckpointError, match=named):
        trained_checkpoint(files(tmp_path, *names), which)


@pytest.mark.parametrize("names", [[], ["one.py", "other.py"]])
def test_no_config_or_several_are_an_error(names, tmp_path):
    with pytest.raises(ModelLookupError):
        trained_config(files(tmp_path, *names))


def test_a_folder_of_the_name_of_a_model_is_no_training(tmp_path):
    (tmp_path / "second" / "images").mkdir(parents=True)
    assert not is_work_dir(tmp_path / "second")
    assert not is_work_dir(tmp_path / "nowhere")
