"""Options of several evaluators, and the kind of drawing that mmdet3d wants to be told."""

from __future__ import annotations

import pytest

from serve.upstream.parsed_arguments import spread_over_evaluators, task_of

CITYSCAPES = [{"type": "CocoMetric", "metric": "bbox"}, {"type": "CityScapesMetric", "seg_prefix": "s"}]


@pytest.mark.slow
def test_options_go_to_the_evaluators_that_take_them():
    import mmdet.evaluation  # noqa: F401

    options = {
        "test_evaluator.format_only": True,
        "test_evaluator.outfile_prefix": "./out",
        "test_evaluator.classwise": True,
        "model.type": "A",
    }
    assert spread_over_evaluators(options, CITYSCAPES) == {
        "test_evaluator.0.format_only": True,
        "test_evaluator.1.format_only": True,
        "test_evaluator.0.outfile_prefix": "./out",
        "test_evaluator.1.outfile_prefix": "./out",
        "test_evaluator.0.classwise": True,
        "model.type": "A",
    }


def test_a_single_evaluator_gets_its_options_as_they_are():
    options = {"test_evaluator.classwise": True}
    assert spread_over_evaluators(options, CITYSCAPES[0]) == options


@pytest.mark.parametrize(
    ("dataset", "task"),
    [
        ({"type": "KittiDataset", "modality": {"use_lidar": True, "use_camera": False}}, "lidar_det"),
        ({"type": "KittiDataset", "modality": {"use_lidar": True, "use_camera": True}}, "multi-modality_det"),
        ({"type": "NuScenesDataset", "modality": {"use_camera": True}, "pipeline": []}, "multi-view_det"),
        (
            {
                "type": "NuScenesDataset",
                "modality": {"use_camera": True},
                "pipeline": [{"type": "LoadImageFromFileMono3D"}],
            },
            "mono_det",
        ),
        ({"type": "SemanticKittiDataset"}, "lidar_seg"),
        ({"type": "ScanNetSegDataset"}, "lidar_seg"),
        ({"type": "RepeatDataset", "dataset": {"type": "KittiDataset"}}, "lidar_det"),
    ],
)
def test_the_kind_of_drawing_follows_from_the_data_set(dataset, task):
    assert task_of({"test_dataloader": {"dataset": dataset}}) == task
