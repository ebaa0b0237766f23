"""The training of configs of mmdet 2.x and mmdet3d 0.x: what each field becomes, and what has no form of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.errors import ArchiveError
from serve.upstream.config_argument import config_file
from serve.upstream.legacy_schedule import modern_schedule
from serve.upstream.legacy_training import modern_pipeline, modern_train_dataloader
from tests.upstream.old_training import OLD_2D, OLD_3D

PLAIN: dict[str, Any] = {
    "optimizer": {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0001},
    "lr_config": {
        "policy": "step",
        "warmup": "linear",
        "warmup_iters": 500,
        "warmup_ratio": 0.001,
        "step": [8, 11],
    },
    "runner": {"type": "EpochBasedRunner", "max_epochs": 12},
}


def schedule(**changes: Any) -> dict[str, Any]:
    return modern_schedule({**PLAIN, **changes}, prefix="coco").members


def test_the_1x_schedule_is_that_of_todays_base():
    from mmengine.config import Config

    from serve import zoo

    base = Config.fromfile(str(zoo.resolve("faster-rcnn_r50_fpn_1x_coco").config_path))
    made = schedule()
    assert made["param_scheduler"] == [dict(each) for each in base.param_scheduler]
    assert made["optim_wrapper"] == base.optim_wrapper.to_dict()
    assert made["train_cfg"] == base.train_cfg.to_dict()


def test_the_cyclic_schedule_is_that_of_todays_base_with_the_momentum_of_the_optimizer():
    from mmengine.config import Config

    from serve import zoo

    folder = zoo.resolve("second_hv_secfpn_8xb6-80e_kitti-3d-3class").config_path.parents[1]
    base = Config.fromfile(str(folder / "_base_" / "schedules" / "cyclic-40e.py"))
    made = schedule(
        optimizer=base.optim_wrapper.optimizer.to_dict(),
        lr_config={"policy": "cyclic", "target_ratio": (10, 1e-4), "cyclic_times": 1, "step_ratio_up": 0.4},
        momentum_config={
            "policy": "cyclic",
            "target_ratio": (0.85 / 0.95, 1),
            "cyclic_times": 1,
            "step_ratio_up": 0.4,
        },
        runner={"type": "EpochBasedRunner", "max_epochs": 40},
    )
    *rates, down, up = made["param_scheduler"]
    assert rates == [each.to_dict() for each in base.param_scheduler[:2]]
    # mmcv 1.x multiplied the momentum of the optimizer.
    assert (down["eta_min"], up["eta_min"]) == pytest.approx((0.85, 0.95))
    assert (down["type"], down["end"], up["end"]) == ("CosineAnnealingMomentum", 16, 40)


@pytest.mark.parametrize(
    ("policy", "types"),
    [
        ({"policy": "fixed"}, []),
        ({"policy": "step", "step": 7}, ["StepLR"]),
        ({"policy": "poly", "power": 0.9, "min_lr": 1e-4}, ["PolyLR"]),
        ({"policy": "exp", "gamma": 0.9}, ["ExponentialLR"]),
        ({"policy": "CosineAnnealing", "min_lr_ratio": 0.01}, ["CosineAnnealingLR"]),
        (
            {
                "policy": "YOLOX",
                "warmup": "exp",
                "warmup_iters": 1,
                "num_last_epochs": 2,
                "min_lr_ratio": 0.05,
            },
            ["mmdet.QuadraticWarmupLR", "CosineAnnealingLR", "ConstantLR"],
        ),
    ],
)
def test_policies_become_schedulers_that_mmengine_builds(policy, types):
    import mmdet.engine  # noqa: F401
    import torch
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    made = schedule(lr_config=policy)["param_scheduler"]
    assert [each["type"] for each in made] == types
    optimizer = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02))
    for each in made:
        convert = each.pop("convert_to_iter_based", False)
        kind = PARAM_SCHEDULERS.get(each.pop("type"))
        assert (
            kind.build_iter_from_epoch(**{"optimizer": optimizer, "epoch_length": 3, **each})
            if convert
            else kind(optimizer, **each)
        )


def test_half_precision_clipping_and_accumulation_are_of_the_wrapper():
    made = schedule(
        fp16={"loss_scale": 512.0},
        optimizer_config={"grad_clip": {"max_norm": 35, "norm_type": 2}, "type": "GradientCumulativeOptimizerHook",
                          "cumulative_iters": 4},
    )["optim_wrapper"]  # fmt: skip
    assert (made["type"], made["loss_scale"]) == ("AmpOptimWrapper", 512.0)
    assert made["clip_grad"] == {"max_norm": 35, "norm_type": 2}
    assert made["accumulative_counts"] == 4


def test_checkpoints_logs_and_the_best_figure_keep_their_places():
    made = schedule(
        checkpoint_config={"interval": 2, "max_keep_ckpts": 3, "out_dir": "s3://bucket/run"},
        log_config={"interval": 7, "hooks": [{"type": "TextLoggerHook"}, {"type": "TensorboardLoggerHook"}]},
        evaluation={"interval": 3, "metric": "bbox", "save_best": "bbox_mAP"},
        workflow=[("train", 1), ("val", 1)],
        resume_from="work_dirs/epoch_1.pth",
    )
    hooks = made["default_hooks"]
    assert (
        hooks["checkpoint"] | {"interval": 2, "max_keep_ckpts": 3, "out_dir": "s3://bucket/run"}
        == hooks["checkpoint"]
    )
    assert hooks["checkpoint"]["save_best"] == "coco/bbox_mAP"
    assert hooks["logger"]["interval"] == 7
    assert {"type": "TensorboardVisBackend"} in made["vis_backends"]
    assert made["train_cfg"]["val_interval"] == 3
    assert (made["resume"], made["load_from"]) == (True, "work_dirs/epoch_1.pth")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_config": {"policy": "OneCycle"}}, "lr_config.policy"),
        (
            {"lr_config": {"policy": "step", "step": [1], "warmup": "exp", "warmup_iters": 5}},
            "lr_config.warmup",
        ),
        ({"runner": {"type": "MyRunner", "max_epochs": 1}}, "runner.type"),
        ({"runner": {}}, "runner.max_epochs"),
        ({"optimizer": None}, "optimizer"),
        ({"optimizer_config": {"type": "MyHook"}}, "optimizer_config.type"),
        ({"log_config": {"hooks": [{"type": "MyLogger"}]}}, "log_config.hooks"),
        ({"custom_hooks": [{"type": "MyHook"}]}, "MyHook"),
    ],
)
def test_a_field_without_a_form_of_today_is_named(changes, named):
    with pytest.raises(ArchiveError, match=named):
        schedule(**changes)


def test_the_training_pipeline_of_2x_becomes_todays():
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {
            "type": "Resize",
            "img_scale": [(1333, 640), (1333, 800)],
            "multiscale_mode": "value",
            "keep_ratio": True,
        },
        {"type": "RandomFlip", "flip_ratio": 0.5},
        {"type": "Normalize", "mean": [0, 0, 0], "std": [1, 1, 1], "to_rgb": True},
        {"type": "Pad", "size_divisor": 32},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels"]},
    ]
    assert modern_pipeline(steps, "mmdet") == [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "RandomChoiceResize", "scales": [(1333, 640), (1333, 800)], "keep_ratio": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]


def test_wrappers_and_lists_of_annotations_stay_wrappers():
    plain = {
        "type": "CocoDataset",
        "ann_file": ["a.json", "b.json"],
        "img_prefix": "pictures/",
        "pipeline": [],
    }
    full = {"data": {"samples_per_gpu": 4, "train": {"type": "RepeatDataset", "times": 3, "dataset": plain}}}
    made = modern_train_dataloader(full, "mmdet", [])
    assert made["batch_size"] == 4
    repeated = made["dataset"]
    assert (repeated["type"], repeated["times"], repeated["dataset"]["type"]) == (
        "RepeatDataset",
        3,
        "ConcatDataset",
    )
    first, second = repeated["dataset"]["datasets"]
    assert (first["ann_file"], second["ann_file"]) == ("a.json", "b.json")
    assert first["data_prefix"] == {"img": "pictures/"}
    assert first["filter_cfg"]["filter_empty_gt"] is True


@pytest.mark.slow
@pytest.mark.parametrize(("text", "scope"), [(OLD_2D, "mmdet"), (OLD_3D, "mmdet3d")])
def test_a_whole_config_is_converted_field_by_field(text, scope, tmp_path, capsys):
    from mmengine.config import Config

    path = Path(tmp_path, "old.py")
    path.write_text(text)
    with config_file(str(path), training=True) as file:
        today = Config.fromfile(file)
    assert today.default_scope == scope
    assert today.model.train_cfg is not None
    assert not {"data", "optimizer", "lr_config", "runner", "evaluation"} & set(today)
    notes = capsys.readouterr().err
    for former in ("'optimizer'", "'lr_config'", "'runner'", "'data.train'"):
        assert f"note: {former} is now: " in notes


def test_the_port_of_slurms_processes_is_kept():
    made = schedule(dist_params={"backend": "gloo", "port": 29501})
    assert made["env_cfg"]["dist_cfg"] == {"backend": "gloo", "port": 29501}
    assert schedule()["env_cfg"]["dist_cfg"] == {"backend": "nccl"}
