"""Find what describes a frame in the test data set of a config: its pipeline, inside any wrappers.

A wrapper joins or repeats data sets, or mixes their frames; a server has one frame at a time, so that only the
pipeline, the class names and the type of what is wrapped matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve.archive.config_json import ObjectPath, to_json
from serve.convert.legacy_pipeline import is_still
from serve.errors import ArchiveError
from serve.runtime.pipeline import dataset_of

__all__ = ["check_pipeline", "drop_unused_objects", "note_random_steps", "unwrap_dataset"]

_MIXING = "MultiImageMixDataset"
# Steps of training that alter a frame at random, whatever their members; and what others need for that.
_RANDOM = frozenset(
    (
        "Albu",
        "AutoAugment",
        "CutOut",
        "Expand",
        "MinIoURandomCrop",
        "ObjectNoise",
        "PhotoMetricDistortion",
        "PhotoMetricDistortion3D",
        "RandAugment",
        "RandomAffine",
        "RandomChoiceResize",
        "RandomCrop",
        "RandomErasing",
        "RandomJitterPoints",
        "RandomResize",
        "RandomResize3D",
        "RandomShift",
        "RandomShiftScale",
        "YOLOXHSVRandomAug",
    )
)
_FLIPS = ("prob", "flip_ratio", "flip_ratio_bev_horizontal", "flip_ratio_bev_vertical")
# Members of a data set that say how a frame is prepared and what the classes are.
_USED = ("type", "pipeline", "metainfo", "box_type_3d", "data_prefix", "modality")


def unwrap_dataset(config: dict[str, Any]) -> tuple[str, ...]:
    """Replace wrappers around the test data set by what they wrap; in place.

    Returns:
        A note, if a wrapper had steps of its own.

    Raises:
        ArchiveError: there is no data set with a pipeline, or a wrapper mixes several frames.
    """
    loader = config.get("test_dataloader")
    if loader is not None and not isinstance(loader, Mapping):
        raise ArchiveError(f"test_dataloader must be a dict with a dataset, got a {type(loader).__name__}")
    outer = (loader or {}).get("dataset")
    notes: tuple[str, ...] = ()
    if isinstance(outer, Mapping) and _kind(outer) == _MIXING and isinstance(outer.get("dataset"), Mapping):
        inner = dict(dataset_of({"test_dataloader": {"dataset": outer["dataset"]}}))
        check_pipeline(inner["pipeline"])
        own = check_pipeline(outer.get("pipeline") or [])
        if mixing := [_kind(step) for step in own if _mixes(step)]:
            raise ArchiveError(
                f"the test data set is a {_MIXING} whose {', '.join(mixing)} mixes several images, as in training; set "
                "test_dataloader.dataset to a data set with the test pipeline"
            )
        inner["pipeline"] = [*inner["pipeline"], *own]
        notes = (f"the steps of {_MIXING} follow those of the data set that it wraps",)
    else:
        inner = dataset_of(config)
        if mixing := [_kind(step) for step in check_pipeline(inner["pipeline"]) if _mixes(step)]:
            raise ArchiveError(
                f"the test pipeline has {', '.join(mixing)}, which mixes several images, as in training; set "
                "test_dataloader.dataset.pipeline to a test pipeline"
            )
    config["test_dataloader"] = {**(loader or {}), "dataset": inner}
    return notes


def note_random_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Note the steps of a pipeline that alter a frame at random, as upstream runs them too; empty without any."""
    found = [_kind(step) for step in _flat(steps) if _is_random(step)]
    if not found:
        return ()
    return (
        f"the test pipeline alters frames at random, as in training ({', '.join(dict.fromkeys(found))}): objects may "
        "be missing, and boxes beside them; leave these steps out of the test pipeline",
    )


def _flat(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for step in steps:
        yield step
        if _kind(step).startswith("MultiScaleFlipAug"):
            # Its own flip decides for those in it.
            yield from (
                one for one in step.get("transforms") or () if not _kind(one).startswith("RandomFlip")
            )


def _is_random(step: Mapping[str, Any]) -> bool:
    kind = _kind(step)
    if kind.startswith("RandomFlip"):
        ratios = [step.get(name) for name in _FLIPS]
        return any(any(ratio) if isinstance(ratio, list | tuple) else bool(ratio) for ratio in ratios)
    if kind == "GlobalRotScaleTrans":
        return not is_still(step)
    return kind in _RANDOM


def check_pipeline(steps: Any) -> list[dict[str, Any]]:
    """Return the steps of a pipeline.

    Raises:
        ArchiveError: it is not a list of dictionaries with a ``type``.
    """
    if not isinstance(steps, list | tuple):
        raise ArchiveError(f"a pipeline must be a list of steps, got a {type(steps).__name__}")
    for k, step in enumerate(steps):
        if not isinstance(step, Mapping) or not isinstance(step.get("type"), str):
            raise ArchiveError(
                f"step {k} of the test pipeline must be dict(type='…', …), got {str(step)[:80]}"
            )
    return list(steps)


def drop_unused_objects(config: dict[str, Any]) -> None:
    """Drop what is not data from the data set and its loader, where serving has no use for it; in place.

    Raises:
        ArchiveError: the model or the pipeline holds something that is not data; the message names its place.
    """
    loader = {name: value for name, value in config["test_dataloader"].items() if _is_data(value)}
    dataset = config["test_dataloader"]["dataset"]
    kept = {name: value for name, value in dataset.items() if name in _USED or _is_data(value)}
    config["test_dataloader"] = {**loader, "dataset": kept}
    to_json(config)


def _is_data(value: Any) -> bool:
    if isinstance(value, ObjectPath):
        return False
    if isinstance(value, Mapping):
        return all(_is_data(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(_is_data(inner) for inner in value)
    try:
        to_json(value)
    except ArchiveError:
        return False
    return True


def _kind(part: Mapping[str, Any]) -> str:
    return str(part.get("type", "")).rpartition(".")[2]


def _mixes(step: Mapping[str, Any]) -> bool:
    """Whether a step takes frames that a mixing wrapper has drawn, which it asks for by `get_indexes`."""
    from mmdet.registry import TRANSFORMS

    found = TRANSFORMS.get(str(step["type"]))
    return isinstance(found, type) and any("get_indexes" in vars(base) for base in found.__mro__)
