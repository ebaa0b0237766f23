"""Figures of upstream's metrics by class and name, from what each metric returns.

Figures are points (percent) of average precision. Upstream rounds COCO's and VOC's to 0.1 points, KITTI's to 0.0001 and
nuScenes' per class to 0.01; a figure that has nothing to find is None. Errors of nuScenes' boxes are in hundredths of
their unit, so that 1 is as small a difference as a point is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Figure", "figures_of"]

_KITTI_KEY = re.compile(
    r"(?P<view>pred_instances(?:_3d)?)/KITTI/(?P<label>.+)_(?P<kind>(?:3D|BEV|2D|AOS)_AP\d+_\w+)$"
)
# Errors of matched boxes: upstream's names per class and of the mean over classes → name with its unit.
_NUSCENES_ERRORS = {
    "trans_err": "translation error cm",
    "scale_err": "scale error points",
    "orient_err": "orientation error 0.01 rad",
    "vel_err": "velocity error cm/s",
    "attr_err": "attribute error points",
    "mATE": "translation error cm",
    "mASE": "scale error points",
    "mAOE": "orientation error 0.01 rad",
    "mAVE": "velocity error cm/s",
    "mAAE": "attribute error points",
}


class Figure(NamedTuple):
    """One figure of a metric: ``label`` is its class (None over all), ``kind`` its name, ``points`` 0 to 100."""

    label: str | None
    kind: str
    points: float | None


def figures_of(kind: str, metric: Any, found: Mapping[str, Any], results: Sequence[Any]) -> list[Figure]:
    """Convert what a metric returned, in its order.

    Args:
        kind: type of the metric.
        metric: upstream's object.
        found: what its ``evaluate`` returned, with its prefix.
        results: what it had collected.
    """
    match kind:
        case "CocoMetric":
            figures = _coco(metric, found)
        case "VOCMetric":
            figures = _voc(metric, found, results)
        case "CityScapesMetric":
            figures = _cityscapes(metric, found)
        case "NuScenesMetric":
            figures = _nuscenes(metric, found)
        case "LyftMetric":
            figures = _lyft(found)
        case _:
            figures = _kitti(metric, found)
    return [
        figure if figure.points is None or not math.isnan(figure.points) else figure._replace(points=None)
        for figure in figures
    ]


def _coco(metric: Any, found: Mapping[str, float]) -> list[Figure]:
    figures = []
    for key, value in found.items():
        kind = str(metric.prefix).rpartition("/")[2]
        name = key.removeprefix(f"{metric.prefix}/")
        label = name.removesuffix("_precision") if name.endswith("_precision") else None
        # COCO's -1 stands for nothing to find.
        points = None if value < 0 or math.isnan(value) else 100 * float(value)
        figures.append(Figure(label, f"{kind} mAP" if label else name.replace("_", " "), points))
    return figures


def _voc(metric: Any, found: Mapping[str, float], results: Sequence[Any]) -> list[Figure]:
    """Figures of VOCMetric, and those per class, which it prints only, by the function that it calls."""
    from mmdet.evaluation.functional import eval_map

    figures = [
        Figure(None, key.removeprefix(f"{metric.prefix}/"), 100 * float(value))
        for key, value in found.items()
    ]
    if metric.metric != "mAP":
        return figures
    truths, predictions = zip(*results, strict=True)
    meta = metric.dataset_meta
    names = "voc" if meta.get("dataset_type") in ("VOC2007", "VOC2012") else meta["classes"]
    for threshold in metric.iou_thrs:
        _, per_class = eval_map(
            list(predictions),
            list(truths),
            scale_ranges=metric.scale_ranges,
            iou_thr=threshold,
            dataset=names,
            logger="silent",
            eval_mode=metric.eval_mode,
            use_legacy_coordinate=True,
        )
        for name, result in zip(meta["classes"], per_class, strict=True):
            points = 100 * float(result["ap"]) if result["num_gts"] else None
            figures.append(Figure(str(name), f"AP{int(threshold * 100):02d}", points))
    return figures


def _kitti(metric: Any, found: Mapping[str, float]) -> list[Figure]:
    figures = []
    for key, value in found.items():
        parsed = _KITTI_KEY.search(key)
        if parsed is None:
            figures.append(Figure(None, key.removeprefix(f"{metric.prefix}/"), float(value)))
            continue
        label = None if parsed["label"] == "Overall" else parsed["label"]
        image = "image " if parsed["view"] == "pred_instances" else ""
        figures.append(Figure(label, image + parsed["kind"].replace("_", " "), float(value)))
    return figures


def _cityscapes(metric: Any, found: Mapping[str, Any]) -> list[Figure]:
    """Figures of CityScapesMetric, and those per class, which it drops (`serve.evaluate.metrics` keeps them)."""
    figures = [
        Figure(None, f"mask {key.removeprefix(f'{metric.prefix}/')}", 100 * float(value))
        for key, value in found.items()
    ]
    known = metric.dataset_meta["classes"]
    for name, values in getattr(metric, "of_classes", {}).items():
        if name in known:
            figures.append(Figure(name, "mask mAP", 100 * float(values["ap"])))
            figures.append(Figure(name, "mask AP@50", 100 * float(values["ap50%"])))
    return figures


def _nuscenes(metric: Any, found: Mapping[str, Any]) -> list[Figure]:
    figures = []
    classes = sorted(metric.dataset_meta["classes"], key=len, reverse=True)
    for key, value in found.items():
        name = key.rpartition("/")[2]
        label = next((each for each in classes if name.startswith(f"{each}_")), None)
        kind = name.removeprefix(f"{label}_") if label else name
        if kind.startswith("AP_dist_"):
            kind = f"AP {kind.removeprefix('AP_dist_')} m"
        figures.append(Figure(label, _NUSCENES_ERRORS.get(kind, kind), 100 * float(value)))
    return figures


def _lyft(found: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for key, value in found.items():
        label, is_class, _ = key.rpartition("/")[2].rpartition("_AP")
        figures.append(Figure(label if is_class else None, "mAP", 100 * float(value)))
    return figures
