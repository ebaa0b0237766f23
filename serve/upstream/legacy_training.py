"""Training data of configs of mmdet 2.x and mmdet3d 0.x in today's form: data sets, their wrappers and pipelines.

`serve.convert.legacy_config` converts the model and the test pipeline, `serve.upstream.legacy_data` the test data,
`serve.upstream.legacy_schedule` optimizer, schedules and hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import ArchiveError

__all__ = ["modern_train_dataloader"]

_PACKERS = ("DefaultFormatBundle", "DefaultFormatBundle3D", "ImageToTensor", "ToTensor", "ToDataContainer")
_WRAPPERS = ("RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset", "CBGSDataset")
# Of data sets: members that another split or step of today has, or nothing.
_DROPPED = (
    "pipeline",
    "img_prefix",
    "pts_prefix",
    "split",
    "classes",
    "filter_empty_gt",
    "test_mode",
    "seg_prefix",
)
_FILTERED_IN_2D = {"filter_empty_gt": True, "min_size": 32}  # what mmdet 2.x did to every data set


def modern_train_dataloader(full: Mapping[str, Any], package: str, notes: list[str]) -> dict[str, Any]:
    """Convert ``data.train`` with its batch size.

    Args:
        full: the resolved config of 2.x or 0.x, of plain dictionaries.
        package: ``mmdet`` or ``mmdet3d``.
        notes: gets a line for what is converted.

    Raises:
        ArchiveError: there is no training data, or a step or wrapper has no form of today.
    """
    data = full.get("data") or {}
    if not data.get("train"):
        raise ArchiveError("the config has no data.train: nothing says which data to train on")
    loader = data.get("train_dataloader") or {}
    batch = int(loader.get("samples_per_gpu", data.get("samples_per_gpu", 1)))
    workers = int(loader.get("workers_per_gpu", data.get("workers_per_gpu", 2)))
    made: dict[str, Any] = {
        "batch_size": batch,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "dataset": _dataset(data["train"], package),
    }
    if package == "mmdet":
        made["batch_sampler"] = {"type": "AspectRatioBatchSampler"}
    notes.append(f"'data.samples_per_gpu' is now: train_dataloader.batch_size={batch}")
    notes.append("'data.train' is now: train_dataloader.dataset")
    return made


def _dataset(given: Any, package: str) -> dict[str, Any]:
    if isinstance(given, list | tuple):
        return {"type": "ConcatDataset", "datasets": [_dataset(one, package) for one in given]}
    kind = str(given.get("type", ""))
    if kind in _WRAPPERS:
        inner = _dataset(given["dataset"], package)
        rest = {name: value for name, value in given.items() if name not in ("dataset", "pipeline")}
        if "pipeline" in given:
            rest["pipeline"] = modern_pipeline(given["pipeline"], package)
        if kind == "MultiImageMixDataset":
            rest.pop("dynamic_scale", None)
        return {**rest, "dataset": inner}
    if kind == "ConcatDataset":
        return {"type": kind, "datasets": [_dataset(one, package) for one in given["datasets"]]}
    if isinstance(given.get("ann_file"), list | tuple):
        files = list(given["ann_file"])
        folders = given.get("img_prefix")
        prefixes = folders if isinstance(folders, list | tuple) else [folders] * len(files)
        parts = [
            {**given, "ann_file": file, "img_prefix": prefix}
            for file, prefix in zip(files, prefixes, strict=True)
        ]
        return {"type": "ConcatDataset", "datasets": [_dataset(one, package) for one in parts]}
    return _plain(given, package)


def _plain(given: Mapping[str, Any], package: str) -> dict[str, Any]:
    from serve.upstream.legacy_data import add_files, relate_annotations

    split = dict(given)
    made = {name: value for name, value in split.items() if name not in (*_DROPPED, "data_root", "ann_file")}
    if package == "mmdet3d":
        relate_annotations(split)
    add_files(made, split, test=False)
    if split.get("classes") is not None:
        made["metainfo"] = {"classes": split["classes"]}
    if package == "mmdet":
        wanted = split.get("filter_empty_gt", True)
        made["filter_cfg"] = {**_FILTERED_IN_2D, "filter_empty_gt": bool(wanted)}
    elif "filter_empty_gt" in split:
        made["filter_empty_gt"] = split["filter_empty_gt"]
    made["pipeline"] = modern_pipeline(split.get("pipeline") or (), package)
    return made


def modern_pipeline(steps: Sequence[Mapping[str, Any]], package: str) -> list[dict[str, Any]]:
    """Convert a training pipeline; normalising and padding go to the model's ``data_preprocessor``.

    Raises:
        ArchiveError: a step has no form of today.
    """
    made: list[dict[str, Any]] = []
    for step in steps:
        made += _step(dict(step), package)
    return made


def _step(step: dict[str, Any], package: str) -> list[dict[str, Any]]:
    kind = str(step.get("type", "")).rpartition(".")[2]
    match kind:
        case "Normalize":
            return []
        case "Pad" if step.get("size_divisor") is not None:
            return []
        case "Pad" if isinstance(step.get("pad_val"), Mapping):
            return [step]
        case "Collect" | "Collect3D":
            return [_packing(step, package)]
        case _ if kind in _PACKERS:
            return []
        case "Resize":
            return [_resize(step)]
        case "RandomFlip" if package == "mmdet":
            step["prob"] = step.pop("flip_ratio", step.get("prob"))
            return [step]
        case "AutoAugment":
            policies = [modern_pipeline(policy, package) for policy in step["policies"]]
            return [{"type": "RandomChoice", "transforms": policies}]
        case "MultiScaleFlipAug" | "MultiScaleFlipAug3D" | "LoadProposals":
            raise ArchiveError(f"{kind} in the training pipeline has no form of today; leave it out")
        case "IndoorPointSample":
            return [{**step, "type": "PointSample"}]
    return [step]


def _resize(step: dict[str, Any]) -> dict[str, Any]:
    """Convert a resizing: to one size, to one of several, or to one between two."""
    given = step.pop("img_scale", step.pop("scale", None))
    mode, ratios = step.pop("multiscale_mode", "range"), step.pop("ratio_range", None)
    step.pop("override", None)
    if "bbox_clip_border" in step:
        step["clip_object_border"] = step.pop("bbox_clip_border")
    scales = [tuple(one) for one in given] if given and isinstance(given[0], list | tuple) else [given]
    if scales == [None]:
        raise ArchiveError("Resize in the training pipeline has no img_scale; name one")
    if ratios is not None:
        return {**step, "type": "RandomResize", "scale": tuple(scales[0]), "ratio_range": tuple(ratios)}
    if len(scales) == 1:
        return {**step, "type": "Resize", "scale": tuple(scales[0])}
    if mode == "value":
        kept = {name: value for name, value in step.items() if name != "type"}
        return {"type": "RandomChoiceResize", "scales": scales, **kept}
    if len(scales) != 2:
        raise ArchiveError(
            f"Resize with multiscale_mode='range' takes two scales, the config has {len(scales)}; use 'value'"
        )
    return {**step, "type": "RandomResize", "scale": scales}


def _packing(step: Mapping[str, Any], package: str) -> dict[str, Any]:
    """Convert what is collected: mmdet packs what there is, mmdet3d what is named."""
    if package == "mmdet":
        return {"type": "PackDetInputs"}
    return {"type": "Pack3DDetInputs", "keys": list(step.get("keys", ("points",)))}
