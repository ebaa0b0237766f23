"""KITTI's metric without numba.cuda: the same figures as upstream's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from serve.ops.cpu.jit import keep_machine_code
from serve.ops.cpu.jit_cache import folder
from serve.upstream import patches
from serve.upstream.rotated_iou import rotate_iou_gpu_eval

ROOT = Path(__file__).parents[2]


def figures(*arguments: str, **variables: str) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.upstream.kitti_figures", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_figures_equal_those_of_upstreams_cuda_kernel():
    ours = figures()
    theirs = figures("--upstream", NUMBA_ENABLE_CUDASIM="1")
    assert len(theirs) == 126
    assert all(value > 0 for value in theirs.values())
    assert ours == theirs


def test_machine_code_of_the_metric_is_kept_for_other_processes():
    patches.apply()
    from mmdet3d.evaluation.functional.kitti_utils import eval as metric

    boxes = np.array([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    metric.image_box_overlap(boxes, boxes)
    anew = numba.jit(nopython=True)(metric.image_box_overlap.py_func)  # as another process makes it
    keep_machine_code(anew, "kitti_metric")
    assert anew(boxes, boxes)[0].tolist() == [1.0, 1 / 7]
    assert sum(anew.stats.cache_hits.values()) == 1
    kept = {one.stats.cache_path for one in vars(metric).values() if hasattr(one, "enable_caching")}
    assert [Path(place).is_relative_to(str(folder("kitti_metric"))) for place in kept] == [True]


BOXES = np.array([[0.0, 0.0, 4.0, 2.0, 0.0], [1.0, 1.0, 4.0, 2.0, np.pi / 4], [50.0, 0.0, 1.0, 1.0, 0.3]])


def test_a_clockwise_angle_turns_towards_negative_y():
    # A long box along the diagonal from (0, 0) to (+, -) covers the point (3, -3), not (3, 3).
    long_box = np.array([[0.0, 0.0, 12.0, 1.0, np.pi / 4]])
    points = np.array([[3.0, -3.0, 0.1, 0.1, 0.0], [3.0, 3.0, 0.1, 0.1, 0.0]])
    covered = rotate_iou_gpu_eval(points, long_box, criterion=1)
    assert covered[:, 0].round(4).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [(-1, 2 / (8 + 4 - 2)), (0, 2 / 4), (1, 2 / 8), (2, 2.0)],
    ids=["iou", "over_query", "over_box", "area"],
)
def test_criteria_divide_the_intersection_as_upstream_does(criterion, expected):
    box, query = np.array([[0.0, 0.0, 4.0, 2.0, 0.0]]), np.array([[2.0, 0.0, 2.0, 2.0, 0.0]])
    assert rotate_iou_gpu_eval(box, query, criterion)[0, 0] == pytest.approx(expected, abs=1e-5)


def test_no_boxes_have_no_overlaps():
    assert rotate_iou_gpu_eval(np.zeros((0, 5)), BOXES).shape == (0, 3)
