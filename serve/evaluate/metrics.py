"""Upstream's metrics, prepared for a comparison: per class, of a part of the data set, without files of their own."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.convert.blame import blaming
from serve.errors import DataSetError
from serve.evaluate.data_set import DataSet
from serve.evaluate.figures import Figure, figures_of

__all__ = ["SUPPORTED", "Metrics", "open_metrics"]

SUPPORTED = ("CocoMetric", "VOCMetric", "CityScapesMetric", "KittiMetric", "NuScenesMetric", "LyftMetric")
_REASONS = {
    "WaymoMetric": "it runs a program of Waymo's",
    "SegMetric": "it takes labels of points, not boxes",
    "CocoPanopticMetric": "it takes segments, not boxes",
}
# Members of a metric that make it write files, or write instead of computing.
_WRITING = (
    *(
        "outfile_prefix",
        "pklfile_prefix",
        "submission_prefix",
        "format_only",
        "jsonfile_prefix",
        "csv_savepath",
    ),
    "dump_matches",
)
# Metrics whose truth is the tables of a release → the function that reads it, by module and name.
_TRUTH_OF_TABLES = {
    "NuScenesMetric": ("nuscenes.eval.detection.evaluate", "load_gt"),
    "LyftMetric": ("mmdet3d.evaluation.functional.lyft_eval", "load_lyft_gts"),
}


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
        self._tokens: frozenset[str] | None = None
        if data.is_limited and any(kind in _TRUTH_OF_TABLES for kind in self._kinds):
            self._tokens = frozenset(data.dataset.get_data_info(k)["token"] for k in range(data.size))
        if data.is_limited:
            ids = [data.dataset.get_data_info(k).get("img_id") for k in range(data.size)]
            for metric, kind in zip(self._evaluator.metrics, self._kinds, strict=True):
                if kind == "CocoMetric":
                    metric.img_ids = ids

    @property
    def with_masks(self) -> bool:
        """Whether masks are measured."""
        return self.with_pixels or any(
            "segm" in getattr(metric, "metrics", ()) for metric in self._evaluator.metrics
        )

    @property
    def with_pixels(self) -> bool:
        """Whether a metric takes masks as pixels, not as run lengths."""
        return "CityScapesMetric" in self._kinds

    def add(self, sample: Any) -> None:
        """Take a data sample with predictions.

        Raises:
            DataSetError: the metric asks for more than boxes, scores and labels.
        """
        found = sample.get("pred_instances_3d")
        if "NuScenesMetric" in self._kinds and found is not None and found.bboxes_3d.tensor.shape[1] < 9:
            raise DataSetError(
                "NuScenesMetric asks for boxes with velocities, the model's have none "
                f"({found.bboxes_3d.tensor.shape[1]} numbers, not 9)"
            )
        with blaming(f"the metric {', '.join(self._kinds)}", DataSetError):
            self._evaluator.process([sample], None)

    def compute(self) -> list[Figure]:
        """Compute all figures, by upstream's code."""
        figures: list[Figure] = []
        for metric, kind in zip(self._evaluator.metrics, self._kinds, strict=True):
            with blaming(f"{kind} of these annotations", DataSetError):
                results = list(metric.results)
                with _tables_limited(kind, self._tokens), _classes_kept(kind, metric):
                    found = metric.evaluate(self._size)
                figures += figures_of(kind, metric, found, results)
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
            if kind == "NuScenesMetric" and data.box_type_3d == "Camera":
                raise DataSetError(
                    f"{data.settings.source}: NuScenesMetric cannot be computed from answers of boxes in camera "
                    "coordinates: it asks for attributes such as vehicle.moving, which answers lack"
                )
            one = {name: value for name, value in config.items() if name not in _WRITING}
            if kind == "CocoMetric":
                types = one.get("metric", "bbox")
                for each in types if isinstance(types, list | tuple) else [types]:
                    # One metric per type: upstream gives classes of two types the same name.
                    classwise = {"classwise": True} if each in ("bbox", "segm") else {}
                    adapted.append({**one, "metric": each, "prefix": f"coco/{each}", **classwise})
                continue
            if kind == "CityScapesMetric":
                one["outfile_prefix"] = None  # a temporary folder of the metric's own
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


@contextlib.contextmanager
def _tables_limited(kind: str, tokens: frozenset[str] | None) -> Iterator[None]:
    """Let a metric find those key frames in its tables only that were predicted: it insists on all others too."""
    if tokens is None or kind not in _TRUTH_OF_TABLES:
        yield
        return
    module, name = _TRUTH_OF_TABLES[kind]
    with _replaced(module, name, lambda load: _limited(load, tokens)):
        yield


def _limited(load: Callable[..., Any], tokens: frozenset[str]) -> Callable[..., Any]:
    def loaded(*args: Any, **named: Any) -> Any:
        found = load(*args, **named)
        if isinstance(found, list):  # Lyft's annotations
            return [each for each in found if each["sample_token"] in tokens]
        for token in set(found.sample_tokens) - tokens:
            del found.boxes[token]
        return found

    return loaded


@contextlib.contextmanager
def _classes_kept(kind: str, metric: Any) -> Iterator[None]:
    """Keep the figures per class that Cityscapes' own code computes, in ``of_classes`` of the metric."""
    if kind != "CityScapesMetric":
        yield
        return

    def keeping(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluated(*args: Any, **named: Any) -> Any:
            found = evaluate(*args, **named)
            metric.of_classes = found["averages"]["classes"]
            return found

        return evaluated

    with _replaced("mmdet.evaluation.metrics.cityscapes_metric", "evaluateImgLists", keeping):
        yield


@contextlib.contextmanager
def _replaced(module: str, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Wrap a function of a module within the block."""
    found = importlib.import_module(module)
    former = getattr(found, name)
    setattr(found, name, wrap(former))
    try:
        yield
    finally:
        setattr(found, name, former)
