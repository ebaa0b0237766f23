"""Data sets and metrics of configs of mmdet 2.x and mmdet3d 0.x in today's form, so that they can be tested.

`serve.convert.legacy_config` converts the model and the test pipeline. Here the files of the test split and the metric
that 2.x kept in the data set are added. Training is not converted: pipelines, schedules and optimizers changed
their meaning, not only their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.errors import ArchiveError
from serve.zoo.config_bases import config_bases

__all__ = ["is_legacy_file", "modernize_whole"]

_DATA = re.compile(r"^data\s*=", re.MULTILINE)
_DEPTH = 8
# Metric of today by the data set of 2.x: type and the members that it needs besides the annotations.
_METRICS: dict[str, dict[str, Any]] = {
    "CocoDataset": {"type": "CocoMetric", "metric": "bbox"},
    "CityscapesDataset": {"type": "CocoMetric", "metric": "bbox"},
    "LVISDataset": {"type": "LVISMetric", "metric": "bbox"},
    "LVISV1Dataset": {"type": "LVISMetric", "metric": "bbox"},
    "VOCDataset": {"type": "VOCMetric", "metric": "mAP"},
    "KittiDataset": {"type": "KittiMetric", "metric": "bbox"},
    "NuScenesDataset": {"type": "NuScenesMetric", "metric": "bbox"},
    "LyftDataset": {"type": "LyftMetric", "metric": "bbox"},
    "ScanNetDataset": {"type": "IndoorMetric"},
    "SUNRGBDDataset": {"type": "IndoorMetric"},
}
_WITH_ROOT = ("NuScenesMetric", "LyftMetric")
_WITHOUT_FILE = ("VOCMetric", "IndoorMetric")


def is_legacy_file(path: Path, depth: int = _DEPTH) -> bool:
    """Whether a config or one of its bases has ``data = …``, as only 2.x and 0.x have; runs nothing."""
    import ast

    try:
        text = path.read_text(encoding="utf-8")
        bases = [base for base in config_bases(ast.parse(text)) if "::" not in base]
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return False
    if _DATA.search(text):
        return True
    return depth > 0 and any(is_legacy_file(path.parent / base, depth - 1) for base in bases)


def modernize_whole(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert a config of mmdet 2.x or mmdet3d 0.x with the data set and metric of its test split.

    Returns:
        The config in today's form, and what was converted.

    Raises:
        ArchiveError: it cannot be read or converted.
    """
    from mmengine.config import Config

    from serve.convert.blame import blaming
    from serve.convert.legacy_config import is_legacy, modernize, package_of
    from serve.convert.legacy_pipeline import as_plain
    from serve.convert.local_bases import local_bases

    with blaming(f"config {path}"):
        with local_bases(path) as whole:
            full = as_plain(Config.fromfile(str(whole), import_custom_modules=False).to_dict())
        if not is_legacy(full):
            raise ArchiveError(f"config {path} has no data.test of mmdet 2.x / mmdet3d 0.x")
        package = package_of(full)
        today, notes = modernize(full, package)
        scope = str(today["default_scope"])
        split = _test_split(full)
        if scope == "mmdet3d":
            _relate_annotations(split)
        _add_files(today["test_dataloader"]["dataset"], split)
        _add_annotation_loader(today["test_dataloader"]["dataset"], scope)
        today["test_dataloader"].update(_loader(full))
        today["test_evaluator"] = _metric(full, split)
        today["test_cfg"] = {"type": "TestLoop"}
        for name in (
            "evaluation",
            "log_config",
            "checkpoint_config",
            "runner",
            "optimizer",
            "optimizer_config",
        ):
            today.pop(name, None)
        for name in (
            "lr_config",
            "workflow",
            "dist_params",
            "total_epochs",
            "resume_from",
            "momentum_config",
        ):
            today.pop(name, None)
    return {**_runtime(scope), **today}, notes


def _test_split(full: Mapping[str, Any]) -> dict[str, Any]:
    found: Any = full.get("data", {}).get("test") or full.get("data", {}).get("val") or {}
    while "pipeline" not in found and isinstance(found.get("dataset"), Mapping):
        found = found["dataset"]
    return dict(found)


def _relate_annotations(split: dict[str, Any]) -> None:
    """Write the annotation file relative to the root, as today; mmdet3d 0.x did not prepend the root to it."""
    root, file = str(split.get("data_root") or ""), split.get("ann_file")
    if root and isinstance(file, str) and not Path(file).is_absolute():
        split["ann_file"] = os.path.relpath(file, root)


def _add_files(dataset: dict[str, Any], split: Mapping[str, Any]) -> None:
    """Add root, annotations and folders; a 2.x root is prepended to relative paths, as today's is."""
    for name in ("data_root", "ann_file", "test_mode"):
        if split.get(name) is not None:
            dataset[name] = split[name]
    dataset["test_mode"] = True
    prefixes = {}
    if split.get("img_prefix") is not None:
        key = "sub_data_root" if dataset.get("type") == "VOCDataset" else "img"
        prefixes[key] = split["img_prefix"]
    if split.get("pts_prefix") is not None:
        prefixes["pts"] = "/".join(str(split[name]) for name in ("split", "pts_prefix") if split.get(name))
    if prefixes:
        dataset["data_prefix"] = prefixes


def _add_annotation_loader(dataset: dict[str, Any], scope: str) -> None:
    """Load the annotations that VOC's metric compares with, before the sample is packed."""
    if scope == "mmdet" and dataset.get("type") == "VOCDataset":
        dataset["pipeline"].insert(-1, {"type": "LoadAnnotations", "with_bbox": True})


def _loader(full: Mapping[str, Any]) -> dict[str, Any]:
    data = full.get("data", {})
    test = data.get("test") if isinstance(data.get("test"), Mapping) else {}
    workers = int(data.get("workers_per_gpu", 2))
    return {
        "batch_size": int((test or {}).get("samples_per_gpu", 1)),
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "drop_last": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    }


def _metric(full: Mapping[str, Any], split: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(split.get("type", "")).rpartition(".")[2]
    if kind not in _METRICS:
        raise ArchiveError(
            f"the data set {kind or 'of data.test'} has no metric that this project knows from 2.x; add "
            "test_evaluator = dict(type=…) and test_dataloader to the config"
        )
    metric = dict(_METRICS[kind])
    asked = (full.get("evaluation") or {}).get("metric")
    if asked and metric["type"] in ("CocoMetric", "LVISMetric"):
        metric["metric"] = asked
    root, file = str(split.get("data_root") or ""), str(split.get("ann_file", ""))
    if metric["type"] not in _WITHOUT_FILE:
        metric["ann_file"] = (
            file if not root or Path(file).is_absolute() else os.path.normpath(os.path.join(root, file))
        )
    if metric["type"] in _WITH_ROOT:
        metric["data_root"] = root
    return metric


def _runtime(scope: str) -> dict[str, Any]:
    """Hooks and visualizer, which a 2.x config has not."""
    drawing = "mmdet.DetLocalVisualizer" if scope == "mmdet" else "mmdet3d.Det3DLocalVisualizer"
    hook = "DetVisualizationHook" if scope == "mmdet" else "Det3DVisualizationHook"
    return {
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": 50},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            "checkpoint": {"type": "CheckpointHook", "interval": 1},
            "sampler_seed": {"type": "DistSamplerSeedHook"},
            "visualization": {"type": hook},
        },
        "env_cfg": {
            "cudnn_benchmark": False,
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl"},
        },
        "log_processor": {"type": "LogProcessor", "window_size": 50, "by_epoch": True},
        "vis_backends": [{"type": "LocalVisBackend"}],
        "visualizer": {"type": drawing, "vis_backends": [{"type": "LocalVisBackend"}], "name": "visualizer"},
    }
