"""Upstream's metrics, prepared for a comparison: per class, of a part of the data set, without files of their own.

Figures are points (percent) of average precision. Upstream rounds COCO's and VOC's to 0.1 points and KITTI's to 0.0001;
a figure that has nothing to find is None.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve.convert.blame import blaming
from serve.errors import DataSetError
from serve.evaluate.data_set import DataSet

__all__ = ["Figure", "Metrics", "open_metrics"]

SUPPORTED = ("CocoMetric", "VOCMetric", "KittiMetric")
_REASONS = {
    "NuScenesMetric": "it reads the tables of a whole nuScenes release, and attributes that answers lack",
    "WaymoMetric": "it runs a program of Waymo's",
    "SegMetric": "it takes labels of points, not boxes",
    "CocoPanopticMetric": "it takes segments, not boxes",
}
# Members of a metric that make it write files, or write instead of computing.
_WRITING = ("outfile_prefix", "pklfile_prefix", "submission_prefix", "format_only")
_KITTI_KEY = re.compile(
    r"(?P<view>pred_instances(?:_3d)?)/KITTI/(?P<label>.+)_(?P<kind>(?:3D|BEV|2D|AOS)_AP\d+_\w+)$"
)


class Figure(NamedTuple):
    """One figure of a metric: ``label`` is its class (None over all), ``kind`` its name, ``points`` 0 to 100."""

    label: str | None
    kind: str
    points: float | None


class Metrics:
    """Metrics of one side of a comparison: takes the predictions frame by frame, then computes."""

    def __init__(self, configs: Sequence[Mapping[str, Any]], data: DataSet) -> None:
        """Build the metrics by upstream's registry."""
        from mmengine.evaluator import Evaluator

        with blaming(f"{data.settings.source}: its metric", DataSetError):
            self._evaluator = Evaluator([dict(config) for config in configs])
        self._evaluator.dataset_meta = data.dataset.metainfo
        self._kinds = [_kind(config) for config in configs]
        self._size = data.size
        if data.is_limited:
            ids = [data.dataset.get_data_info(k).get("img_id") for k in range(data.size)]
            for metric, kind in zip(self._evaluator.metrics, self._kinds, strict=True):
                if kind == "CocoMetric":
                    metric.img_ids = ids

    @property
    def with_masks(self) -> bool:
        """Whether masks are measured."""
        return any("segm" in getattr(metric, "metrics", ()) for metric in self._evaluator.metrics)

    def add(self, sample: Any) -> None:
        """Take a data sample with predictions."""
        with blaming(f"the metric {', '.join(self._kinds)}", DataSetError):
            self._evaluator.process([sample], None)

    def compute(self) -> list[Figure]:
        """Compute all figures, by upstream's code."""
        figures: list[Figure] = []
        for metric, kind in zip(self._evaluator.metrics, self._kinds, strict=True):
            with blaming(f"{kind} of these annotations", DataSetError):
                results = list(metric.results)
                found = metric.evaluate(self._size)
                if kind == "VOCMetric":
                    figures += _voc(metric, found, results)
                else:
                    figures += (_coco if kind == "CocoMetric" else _kitti)(metric, found)
        return figures


@contextlib.contextmanager
def open_metrics(data: DataSet) -> Iterator[list[dict[str, Any]]]:
    """Yield the configs of the metrics of `data`, adapted: one per type of COCO's, with classes, and without files.

    Raises:
        DataSetError: a metric cannot be computed from answers of a server.
    """
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-evaluate-") as scratch:
        adapted: list[dict[str, Any]] = []
        for config in data.settings.metrics:
            kind = _kind(config)
            if kind not in SUPPORTED:
                reason = _REASONS.get(kind, f"supported are {', '.join(SUPPORTED)}")
                raise DataSetError(
                    f"{data.settings.source}: {kind} cannot be computed from answers: {reason}"
                )
            one = {name: value for name, value in config.items() if name not in _WRITING}
            if kind == "CocoMetric":
                types = one.get("metric", "bbox")
                for each in types if isinstance(types, list | tuple) else [types]:
                    # One metric per type: upstream gives classes of two types the same name.
                    classwise = {"classwise": True} if each in ("bbox", "segm") else {}
                    adapted.append({**one, "metric": each, "prefix": f"coco/{each}", **classwise})
                continue
            if kind == "KittiMetric" and data.is_limited:
                one["ann_file"] = _first_entries(one, data.size, Path(scratch, f"{len(adapted)}.pkl"))
            adapted.append(one)
        yield adapted


def _first_entries(config: Mapping[str, Any], size: int, path: Path) -> str:
    """Write the first entries of an annotation file: KittiMetric insists on predictions for all of them."""
    from mmengine.fileio import load

    whole = load(config["ann_file"], backend_args=config.get("backend_args"))
    with path.open("wb") as stream:
        pickle.dump({**whole, "data_list": whole["data_list"][:size]}, stream)
    return str(path)


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("type", "")).rpartition(".")[2]


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
    return [
        figure if figure.points is None or not math.isnan(figure.points) else figure._replace(points=None)
        for figure in figures
    ]
