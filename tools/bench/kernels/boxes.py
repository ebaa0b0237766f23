"""Arguments for each kernel for boxes and polygons, at inference sizes or small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.bench.kernels.inputs import Inputs

__all__ = ["CASES"]


def _iou(x: Inputs, n: int, m: int, *arguments: Any) -> list[Any]:
    return [x.boxes(n, 800), x.boxes(m, 800), x.zeros(n, m), *arguments]


def bbox_overlaps(x: Inputs) -> list[Any]:
    return _iou(x, x.size(5, 1000), x.size(4, 1000), 0, False, 0)


def nms(x: Inputs) -> list[Any]:
    n = x.size(12, 2000)
    return [x.boxes(n, 800), x.scores(n), 0.5, 0]


def softnms(x: Inputs) -> list[Any]:
    n = x.size(12, 1000)
    return [x.boxes(n, 800), x.scores(n), torch.zeros(n, 5), 0.5, 0.5, 1e-3, 2, 0]


def nms_match(x: Inputs) -> list[Any]:
    n = x.size(12, 1000)
    return [torch.cat((x.boxes(n, 800), x.scores(n)[:, None]), dim=1), 0.5]


def nms_rotated(x: Inputs) -> list[Any]:
    n = x.size(12, 2000)
    dets = torch.cat((x.rotated(n, 800), x.whole(3, n, 1).float()), dim=1)
    scores = x.scores(n)
    order = scores.argsort(descending=True, stable=True)
    return [dets, scores, order, dets[order], dets[:, 5].clone(), 0.1, True]


def nms_quadri(x: Inputs) -> list[Any]:
    n = x.size(12, 1000)
    dets = torch.cat((x.polygons(n, 4, 800), x.whole(3, n, 1).float()), dim=1)
    scores = x.scores(n)
    order = scores.argsort(descending=True, stable=True)
    return [dets, scores, order, dets[order], 0.1, True]


def box_iou_rotated(x: Inputs) -> list[Any]:
    n, m = x.size(5, 1000), x.size(4, 100)
    return [x.rotated(n, 800), x.rotated(m, 800), x.zeros(n * m), 0, False]


def box_iou_quadri(x: Inputs) -> list[Any]:
    n, m = x.size(5, 1000), x.size(4, 100)
    return [x.polygons(n, 4, 800), x.polygons(m, 4, 800), x.zeros(n * m), 0, False]


def iou3d_boxes_overlap_bev_forward(x: Inputs) -> list[Any]:
    n, m = x.size(5, 500), x.size(4, 100)
    return [x.boxes3d(n), x.boxes3d(m), x.zeros(n, m)]


def iou3d_nms3d_forward(x: Inputs) -> list[Any]:
    n = x.size(12, 1000)
    return [x.boxes3d(n), x.zeros(n, dtype=torch.int64), x.zeros(1, dtype=torch.int64), 0.01]


def diff_iou_rotated_sort_vertices_forward(x: Inputs) -> list[Any]:
    b, n = x.size(1, 2), x.size(3, 128)
    mask = x.uniform(b, n, 24) < 0.25
    return [x.normal(b, n, 24, 2), mask, mask.sum(dim=2, dtype=torch.int32)]


def convex_iou(x: Inputs) -> list[Any]:
    n, k = x.size(4, 1000), x.size(3, 20)
    return [x.polygons(n, 9, 800), x.polygons(k, 4, 800), x.zeros(n, k)]


def convex_giou(x: Inputs) -> list[Any]:
    n = x.size(4, 1000)
    return [x.polygons(n, 9, 800), x.polygons(n, 4, 800), x.zeros(n, 19)]


def min_area_polygons(x: Inputs) -> list[Any]:
    n = x.size(4, 1000)
    return [x.polygons(n, 9, 800), x.zeros(n, 8)]


def points_in_polygons_forward(x: Inputs) -> list[Any]:
    n, m = x.size(6, 5000), x.size(3, 50)
    return [x.uniform(n, 2, high=800), x.polygons(m, 4, 800), x.zeros(n, m)]


def points_in_boxes_part_forward(x: Inputs) -> list[Any]:
    n, m = x.size(3, 50), x.size(20, 20000)
    return [x.boxes3d(n)[None], x.cloud(m)[None], x.zeros(1, m, dtype=torch.int32)]


def points_in_boxes_all_forward(x: Inputs) -> list[Any]:
    n, m = x.size(3, 50), x.size(20, 20000)
    return [x.boxes3d(n)[None], x.cloud(m)[None], x.zeros(1, m, n, dtype=torch.int32)]


def points_in_boxes_cpu_forward(x: Inputs) -> list[Any]:
    n, m = x.size(3, 50), x.size(20, 20000)
    return [x.boxes3d(n), x.cloud(m), x.zeros(n, m, dtype=torch.int32)]


iou3d_nms3d_normal_forward = iou3d_nms3d_forward

CASES: dict[str, Callable[[Inputs], list[Any]]] = {
    name: build
    for name, build in globals().items()
    if callable(build) and not name.startswith("_") and getattr(build, "__module__", "") == __name__
}
