"""Flags of mmdet 2.x and mmdet3d 0.x in today's form."""

from __future__ import annotations

import pytest

from serve.errors import SettingsError
from serve.upstream.former_flags import translate


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--eval", "bbox", "segm"], ["test_evaluator.metric=[bbox,segm]"]),
        (["--eval", "mAP"], ["test_evaluator.metric=mAP"]),
        (
            ["--eval", "bbox", "--options", "classwise=True"],
            ["test_evaluator.metric=bbox", "test_evaluator.classwise=True"],
        ),
        (["--eval-options", "classwise=True"], ["test_evaluator.classwise=True"]),
        (
            ["--format-only", "--options", "jsonfile_prefix=./a"],
            ["test_evaluator.format_only=True", "test_evaluator.outfile_prefix=./a"],
        ),
        (
            ["--format-only", "--options", "./a"],
            ["test_evaluator.format_only=True", "test_evaluator.outfile_prefix=./a"],
        ),
        (["--samples-per-gpu", "2"], ["test_dataloader.batch_size=2"]),
        (["--cfg-options", "data.test.samples_per_gpu=2"], ["test_dataloader.batch_size=2"]),
        (["--show-score-thr", "0.5"], ["default_hooks.visualization.score_thr=0.5"]),
    ],
)
def test_testing_flags_become_config_options(given, options):
    now = translate("test", "mmdet", ["c.py", "w.pth", *given])
    assert now.arguments == ["c.py", "w.pth", "--cfg-options", *options]
    assert now.notes


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (["--resume-from", "w.pth"], ["--resume", "w.pth"]),
        (["--no-validate"], ["--cfg-options", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]),
        (["--options", "optimizer.lr=0.1"], ["--cfg-options", "optim_wrapper.optimizer.lr=0.1"]),
        (
            ["--seed", "3", "--deterministic"],
            ["--cfg-options", "randomness.seed=3", "randomness.deterministic=True"],
        ),
        (["--options", "resume_from=a.pth"], ["--cfg-options", "load_from=a.pth", "resume=True"]),
        (["--cfg-options", "resume_from=None"], ["--cfg-options", "load_from=None", "resume=False"]),
        (
            [
                "--options",
                "optimizer.paramwise_cfg.norm_decay_mult=0",
                "optimizer_config.grad_clip.max_norm=35",
            ],
            [
                "--cfg-options",
                "optim_wrapper.paramwise_cfg.norm_decay_mult=0",
                "optim_wrapper.clip_grad.max_norm=35",
            ],
        ),
        (
            ["--options", "fp16.loss_scale=512."],
            ["--cfg-options", "optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale=512."],
        ),
        (["--samples-per-gpu=4"], ["--cfg-options", "train_dataloader.batch_size=4"]),
        (["--autoscale-lr"], ["--auto-scale-lr"]),
        (["--work-dir", "w", "--amp"], ["--work-dir", "w", "--amp"]),
    ],
)
def test_training_flags_become_todays(given, arguments):
    assert translate("train", "mmdet", ["c.py", *given]).arguments == ["c.py", *arguments]


def test_cityscapes_is_an_evaluator_of_its_own():
    now = translate("test", "mmdet", ["c.py", "w.pth", "--eval", "bbox", "cityscapes"])
    assert now.arguments[-1] == "test_evaluator.metric=bbox"
    assert translate("test", "mmdet", ["c.py", "w.pth", "--eval", "cityscapes"]).arguments == [
        "c.py",
        "w.pth",
    ]


def test_flags_of_today_are_left_alone_without_a_note():
    given = [
        "c.py",
        "w.pth",
        "--show-dir",
        "d",
        "--out",
        "r.pkl",
        "--cfg-options",
        "test_evaluator.classwise=True",
    ]
    now = translate("test", "mmdet", given)
    assert now.arguments == given
    assert now.notes == []


def test_gpus_and_their_numbers_are_taken_out():
    now = translate("train", "mmdet3d", ["c.py", "--gpus", "2", "--gpu-ids", "1", "3"])
    assert (now.arguments, now.processes, now.gpu_ids) == (["c.py"], 2, "1,3")


def test_the_port_of_old_options_becomes_the_port_of_the_process_group():
    now = translate("train", "mmdet", ["c.py", "--options", "dist_params.port=29501"])
    assert (now.arguments, now.port) == (["c.py"], "29501")


def test_a_results_file_of_mmdet3d_is_kept_for_the_runner():
    assert translate("test", "mmdet3d", ["c.py", "w.pth", "--out", "r.pkl"]).out == "r.pkl"


@pytest.mark.parametrize("flag", ["--options", "--cfg-options"])
@pytest.mark.parametrize(
    ("option", "today"),
    [
        ("workflow=[('train',1),('val',1)]", "val_evaluator"),
        ("lr_config.step=[8,11]", "param_scheduler"),
        ("momentum_config.policy=cyclic", "param_scheduler"),
        ("runner.type=IterBasedRunner", "train_cfg"),
        ("data.train.times=2", "train_dataloader"),
    ],
)
def test_a_member_that_is_read_no_more_is_an_error_with_the_place_of_today(flag, option, today):
    with pytest.raises(SettingsError, match=today):
        translate("train", "mmdet", ["c.py", flag, option])


@pytest.mark.parametrize("package", ["mmdet", "mmdet3d"])
def test_a_results_file_of_another_format_is_an_error_before_anything_is_made(package):
    with pytest.raises(SettingsError, match="takes a"):
        translate("test", package, ["c.py", "w.pth", "--out", "r.json"])


@pytest.mark.parametrize("flag", ["--gpus", "--resume-from"])
def test_a_flag_without_its_value_is_an_error(flag):
    with pytest.raises(SettingsError):
        translate("train", "mmdet", ["c.py", flag])
