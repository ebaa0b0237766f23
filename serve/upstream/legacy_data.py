"""Data sets and metrics of configs of mmdet 2.x and mmdet3d 0.x in today's form, so that they can be tested.

`serve.convert.legacy_config` converts the model and the test pipeline. Here the files of the test split and the metric
that 2.x kept in the data set are added, and for a training its data (`serve.upstream.legacy_training`) and schedule
(`serve.upstream.legacy_schedule`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.errors import ArchiveError
from serve.zoo.config_bases import config_bases

__all__ = ["add_files", "is_legacy_file", "modernize_whole", "relate_annotations"]

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
_PREFIXES = {"CocoMetric": "coco", "VOCMetric": "pascal_voc"}
_FORMER = (
    *(
        "evaluation",
        "log_config",
        "checkpoint_config",
        "runner",
        "optimizer",
        "optimizer_config",
        "lr_config",
    ),
    *("workflow", "dist_params", "total_epochs", "resume_from", "momentum_config", "fp16", "custom_hooks"),
    *(
        "cudnn_benchmark",
        "opencv_num_threads",
        "mp_start_method",
        "seed",
        "deterministic",
        "gpu_ids",
        "device",
    ),
    *("find_unused_parameters", "work_dir"),
)


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


def modernize_whole(path: Path, *, training: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert a config of mmdet 2.x or mmdet3d 0.x with the data set and metric of its test split.

    Args:
        path: the config.
        training: convert also what training reads: its data, optimizer, schedules and hooks, and the split ``val``.

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
        today, notes = modernize(full, package_of(full), training=training)
        scope = str(today["default_scope"])
        pattern = today.pop("test_dataloader")
        for former in _FORMER:
            today.pop(former, None)
        made = {
            **_runtime(scope),
            **today,
            **_evaluated(full, pattern, scope, "test"),
            "test_cfg": {"type": "TestLoop"},
        }
        if training:
            made, more = _with_training(full, made, pattern, scope)
            notes = (*notes, *more)
    return made, notes


def _evaluated(full: Mapping[str, Any], pattern: Mapping[str, Any], scope: str, split: str) -> dict[str, Any]:
    """Return loader and metric of a split, with the converted test pipeline."""
    found = _split(full, split)
    if scope == "mmdet3d":
        relate_annotations(found)
    loader = copy.deepcopy(dict(pattern))
    add_files(loader["dataset"], found)
    _add_annotation_loader(loader["dataset"], scope)
    loader.update(_loader(full))
    return {f"{split}_dataloader": loader, f"{split}_evaluator": _metric(full, found)}


def _with_training(
    full: Mapping[str, Any], today: dict[str, Any], pattern: Mapping[str, Any], scope: str
) -> tuple[dict[str, Any], list[str]]:
    from serve.upstream.legacy_schedule import modern_schedule
    from serve.upstream.legacy_training import modern_train_dataloader

    notes: list[str] = []
    made = {**today, **_evaluated(full, pattern, scope, "val")}
    made["train_dataloader"] = modern_train_dataloader(full, scope, notes)
    kind = made["val_evaluator"]["type"]
    schedule = modern_schedule(full, prefix=_PREFIXES.get(kind, ""))
    hooks = {**made["default_hooks"], **schedule.members.pop("default_hooks")}
    made.update(schedule.members)
    made["default_hooks"] = hooks
    made["visualizer"] = {**made["visualizer"], "vis_backends": made["vis_backends"]}
    made["log_processor"] = {
        **made["log_processor"],
        "by_epoch": made["train_cfg"]["type"] == "EpochBasedTrainLoop",
    }
    if full.get("find_unused_parameters"):
        made["find_unused_parameters"] = True
    if not full.get("data", {}).get("val"):
        for name in ("val_dataloader", "val_evaluator", "val_cfg"):
            made[name] = None
        notes.append("without data.val there is no validation during the training")
    return made, [*notes, *schedule.notes]


def _split(full: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a split of 2.x without its wrappers; one that is not there is the other one."""
    data, other = full.get("data", {}), "val" if name == "test" else "test"
    found: Any = data.get(name) or data.get(other) or {}
    while "pipeline" not in found and isinstance(found.get("dataset"), Mapping):
        found = found["dataset"]
    return dict(found)


def relate_annotations(split: dict[str, Any]) -> None:
    """Write the annotation file relative to the root, as today; mmdet3d 0.x did not prepend the root to it."""
    root, file = str(split.get("data_root") or ""), split.get("ann_file")
    if root and isinstance(file, str) and not Path(file).is_absolute():
        split["ann_file"] = os.path.relpath(file, root)


def add_files(dataset: dict[str, Any], split: Mapping[str, Any], *, test: bool = True) -> None:
    """Add root, annotations and folders; a 2.x root is prepended to relative paths, as today's is."""
    for name in ("data_root", "ann_file"):
        if split.get(name) is not None:
            dataset[name] = split[name]
    dataset["test_mode"] = test
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
